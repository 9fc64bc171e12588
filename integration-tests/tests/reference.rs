//! Answers equal those of the reference library.

use anyhow::{Context, Result, ensure};
use integration_tests::fixtures::{self, Prompt};
use integration_tests::stack::Stack;
use serde_json::{Value, json};

/// Log-probabilities are computed in float32 on both sides; what is left is the order of summation.
const TOLERANCE: f64 = 0.02;

#[tokio::test]
async fn llama_answers_as_the_reference_does() -> Result<()> {
    check("llama").await
}

async fn check(name: &str) -> Result<()> {
    let expected = fixtures::expected(name)?;
    let directory = fixtures::directory(name);
    let stack = Stack::start(&["--model-id", directory.to_str().context("a path in UTF-8")?]).await?;
    for prompt in &expected.prompts {
        let parameters = json!({
            "max_new_tokens": expected.max_new_tokens, "details": true, "decoder_input_details": true
        });
        let body = json!({"inputs": prompt.text, "parameters": parameters});
        let answer = stack.client().generate("/generate", &body).await?;
        compare(prompt, &answer).with_context(|| format!("{name}, prompt {}: {answer}", prompt.name))?;
        stream_equals(&stack, prompt, expected.max_new_tokens).await?;
    }
    Ok(())
}

fn compare(prompt: &Prompt, answer: &Value) -> Result<()> {
    let details = &answer["details"];
    assert_eq!(ids(&details["prefill"])?, prompt.input_ids, "prompt ids");
    assert_eq!(ids(&details["tokens"])?, prompt.generated_ids, "generated ids");
    assert_eq!(texts(&details["tokens"])?, prompt.stream_texts, "token texts");
    assert_eq!(details["finish_reason"], prompt.finish_reason);
    close(&details["prefill"], &prompt.prefill_logprobs)?;
    close(&details["tokens"], &prompt.logprobs.iter().copied().map(Some).collect::<Vec<_>>())?;
    if !prompt.stream_text.is_empty() {
        assert_eq!(answer["generated_text"], prompt.stream_text.as_str(), "text");
    }
    Ok(())
}

async fn stream_equals(stack: &Stack, prompt: &Prompt, max_new_tokens: u32) -> Result<()> {
    let body = json!({"inputs": prompt.text, "parameters": {"max_new_tokens": max_new_tokens}});
    let answer = stack.client().post("/generate_stream", &body).await?;
    let events: Vec<Value> =
        answer.events().iter().map(|event| Ok(serde_json::from_str(event)?)).collect::<Result<_>>()?;
    let tokens = Value::Array(events.iter().map(|event| event["token"].clone()).collect());
    assert_eq!(ids(&tokens)?, prompt.generated_ids, "streamed ids of {}", prompt.name);
    assert_eq!(texts(&tokens)?, prompt.stream_texts, "streamed texts of {}", prompt.name);
    Ok(())
}

fn ids(tokens: &Value) -> Result<Vec<u32>> {
    let tokens = tokens.as_array().context("a list of tokens")?;
    tokens.iter().map(|token| Ok(token["id"].as_u64().context("an id")?.try_into()?)).collect()
}

fn texts(tokens: &Value) -> Result<Vec<String>> {
    let tokens = tokens.as_array().context("a list of tokens")?;
    tokens.iter().map(|token| Ok(token["text"].as_str().context("a text")?.to_owned())).collect()
}

fn close(tokens: &Value, expected: &[Option<f64>]) -> Result<()> {
    let tokens = tokens.as_array().context("a list of tokens")?;
    ensure!(
        tokens.len() == expected.len(),
        "{} log-probabilities, {} expected",
        tokens.len(),
        expected.len()
    );
    for (index, (token, expected)) in tokens.iter().zip(expected).enumerate() {
        let found = token["logprob"].as_f64();
        let near = match (found, expected) {
            (Some(found), Some(expected)) => (found - expected).abs() < TOLERANCE,
            (found, expected) => found.is_none() && expected.is_none(),
        };
        ensure!(near, "log-probability {index}: {found:?}, {expected:?} expected");
    }
    Ok(())
}
