//! The whole server with GPUs: with one that is emulated, and without any.

use anyhow::{Result, ensure};
use integration_tests::stack;

#[cfg(feature = "emulation")]
mod emulated {
    use anyhow::{Context, Result, ensure};
    use integration_tests::fixtures;
    use integration_tests::stack::Stack;
    use serde_json::{Value, json};

    /// Log-probabilities differ by the order of summation.
    const TOLERANCE: f64 = 0.002;

    /// Every stage of sampling, and what is reported of it.
    fn parameters() -> Vec<Value> {
        let details = |more: Value| {
            let mut parameters = json!({
                "max_new_tokens": 12, "details": true, "decoder_input_details": true, "top_n_tokens": 3, "seed": 7
            });
            parameters
                .as_object_mut()
                .expect("it is one")
                .extend(more.as_object().expect("it is one").clone());
            parameters
        };
        vec![
            details(json!({})),
            details(json!({"do_sample": true})),
            details(json!({"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.9})),
            details(json!({"do_sample": true, "typical_p": 0.8})),
            details(json!({"repetition_penalty": 1.3, "frequency_penalty": 0.4})),
            details(json!({"do_sample": true, "temperature": 1.5, "repetition_penalty": 1.2})),
            details(json!({"do_sample": true, "watermark": true})),
        ]
    }

    #[tokio::test]
    async fn a_gpu_answers_as_the_cpu_does_whatever_the_sampling() -> Result<()> {
        let directory = fixtures::directory("llama");
        let model = directory.to_str().context("a path in UTF-8")?;
        let cpu = Stack::start(&["--model-id", model, "--dtype", "float32", "--device", "cpu"]).await?;
        let gpu = Stack::start(&["--model-id", model, "--dtype", "float32", "--device", "emulated"]).await?;
        for parameters in parameters() {
            let body = json!({"inputs": "def main(): the quick brown", "parameters": parameters});
            let [expected, found] = [
                cpu.client().generate("/generate", &body).await?,
                gpu.client().generate("/generate", &body).await?,
            ];
            ensure!(
                found["generated_text"] == expected["generated_text"],
                "{body}: {found}, on the CPU {expected}"
            );
            alike(&found["details"], &expected["details"]).with_context(|| format!("{body}"))?;
        }
        gpu.idle().await
    }

    /// The same but for rounding.
    fn alike(found: &Value, expected: &Value) -> Result<()> {
        match (found, expected) {
            (Value::Object(found), Value::Object(expected)) => {
                ensure!(found.keys().eq(expected.keys()), "{found:?}, on the CPU {expected:?}");
                found.iter().try_for_each(|(key, found)| alike(found, &expected[key]))
            }
            (Value::Array(found), Value::Array(expected)) => {
                ensure!(found.len() == expected.len(), "{found:?}, on the CPU {expected:?}");
                found.iter().zip(expected).try_for_each(|(found, expected)| alike(found, expected))
            }
            (Value::Number(found), Value::Number(expected)) => {
                let difference = found.as_f64().unwrap_or(f64::NAN) - expected.as_f64().unwrap_or(f64::NAN);
                ensure!(difference.abs() < TOLERANCE, "{found}, on the CPU {expected}");
                Ok(())
            }
            _ => {
                ensure!(found == expected, "{found}, on the CPU {expected}");
                Ok(())
            }
        }
    }
}

/// Tests run where there is no driver; with one this says nothing.
fn has_driver() -> bool {
    std::path::Path::new("/proc/driver/nvidia/version").exists()
}

#[tokio::test]
async fn a_gpu_that_was_asked_for_and_is_not_there_is_one_line() -> Result<()> {
    if has_driver() {
        return Ok(());
    }
    let (status, output) = stack::run(&["--device", "cuda"]).await?;
    ensure!(!status.success(), "{output}");
    let expected = match cfg!(feature = "cuda") {
        true => "there is no CUDA driver on this machine",
        false => "this program was built without CUDA",
    };
    let lines = output.lines().filter(|line| line.contains(expected)).count();
    ensure!(lines > 0, "{output}");
    Ok(())
}

#[cfg(feature = "cuda")]
#[tokio::test]
async fn without_a_driver_the_cpu_computes_and_one_line_says_so() -> Result<()> {
    if has_driver() {
        return Ok(());
    }
    let stack = stack::Stack::demo().await?;
    let log = stack.log()?;
    let lines = log.lines().filter(|line| line.contains("no GPU is used")).count();
    ensure!(lines == 1, "{lines} lines: {log}");
    let answer = stack.greedy("What is the capital of France?", 20).await?;
    ensure!(answer["generated_text"].as_str().is_some_and(|text| text.contains("Paris")), "{answer}");
    Ok(())
}
