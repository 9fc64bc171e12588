//! Every family answers as the reference library does, through the whole server, on one shard and on several. Prints a table.

use anyhow::{Context, Result, bail, ensure};
use futures::future::try_join_all;
use integration_tests::fixtures::{self, Expected, Prompt};
use integration_tests::stack::Stack;
use serde_json::{Value, json};

/// Log-probabilities are computed in float32 on both sides; what is left is the order of summation.
const TOLERANCE: f64 = 0.02;

#[tokio::test]
async fn every_family_answers_as_the_reference_does_and_alike_in_a_batch() -> Result<()> {
    table(&[1]).await
}

#[tokio::test]
async fn every_family_answers_as_the_reference_does_on_two_shards_and_on_four() -> Result<()> {
    table(&[2, 4]).await
}

/// Checks every fixture on so many shards; a line each.
async fn table(shards: &[usize]) -> Result<()> {
    let mut wrong = 0;
    println!("{:22} {:9} {:>6}  largest difference of a log-probability", "family", "dtype", "shards");
    for name in fixtures::names()? {
        let expected = fixtures::expected(&name)?;
        for &shards in shards {
            let found = match check(&name, &expected, shards).await {
                Ok(Some(worst)) => format!("{worst:.6}"),
                Ok(None) => "cannot be split".to_owned(),
                Err(error) => {
                    wrong += 1;
                    format!("WRONG: {error:#}")
                }
            };
            println!("{name:22} {:9} {shards:>6}  {found}", expected.stored_dtype);
        }
    }
    ensure!(wrong == 0, "{wrong} are wrong");
    Ok(())
}

/// The largest difference, or none where the launcher says that the model cannot be split so.
async fn check(name: &str, expected: &Expected, shards: usize) -> Result<Option<f64>> {
    let directory = fixtures::directory(name);
    let (directory, count) = (directory.to_str().context("a path in UTF-8")?, shards.to_string());
    let flags = ["--model-id", directory, "--num-shard", &count, "--cpu-threads", &count];
    let stack = match Stack::start(&flags).await {
        Ok(stack) => stack,
        Err(error) if error.to_string().contains(&format!("cannot be split over {shards} shards")) => {
            let odd = !fixtures::heads(name)?.is_multiple_of(shards);
            ensure!(odd || shards == 4, "{error}");
            return Ok(None);
        }
        Err(error) => bail!(error),
    };
    let mut worst: f64 = 0.0;
    for prompt in &expected.prompts {
        let answer = stack.client().generate("/generate", &body(&prompt.text, expected)).await?;
        let difference = compare(prompt, &answer).with_context(|| format!("prompt {}", prompt.name))?;
        worst = worst.max(difference);
        if shards == 1 {
            stream_equals(&stack, prompt, expected.max_new_tokens).await?;
        }
    }
    if shards == 1 {
        together_equals_alone(&stack, expected).await?;
    }
    Ok(Some(worst))
}

fn body(text: &str, expected: &Expected) -> Value {
    let parameters = json!({
        "max_new_tokens": expected.max_new_tokens, "details": true, "decoder_input_details": true
    });
    json!({"inputs": text, "parameters": parameters})
}

/// Eight different requests at once are answered as each alone is, to the last bit of every log-probability.
async fn together_equals_alone(stack: &Stack, expected: &Expected) -> Result<()> {
    let half = |text: &str| text.chars().take(text.chars().count() / 2 + 1).collect::<String>();
    let texts = expected.prompts.iter().flat_map(|prompt| [prompt.text.clone(), half(&prompt.text)]);
    let bodies: Vec<Value> = texts.map(|text| body(&text, expected)).collect();
    let client = stack.client();
    let together = try_join_all(bodies.iter().map(|body| client.generate("/generate", body))).await?;
    for (body, mut together) in bodies.iter().zip(together) {
        let mut alone = stack.client().generate("/generate", body).await?;
        for answer in [&mut alone, &mut together] {
            // Drawn anew for every request, and of no use to greedy ones.
            answer["details"]["seed"] = Value::Null;
        }
        ensure!(alone == together, "{body}: alone {alone}, together {together}");
    }
    Ok(())
}

/// The largest difference of a log-probability. Errors when an id or a text is another.
fn compare(prompt: &Prompt, answer: &Value) -> Result<f64> {
    let details = &answer["details"];
    ensure!(ids(&details["prefill"])? == prompt.input_ids, "prompt ids: {answer}");
    ensure!(ids(&details["tokens"])? == prompt.generated_ids, "generated ids: {answer}");
    ensure!(texts(&details["tokens"])? == prompt.stream_texts, "token texts: {answer}");
    ensure!(details["finish_reason"] == prompt.finish_reason, "finish reason: {answer}");
    if !prompt.stream_text.is_empty() {
        ensure!(answer["generated_text"] == prompt.stream_text.as_str(), "text: {answer}");
    }
    let generated: Vec<Option<f64>> = prompt.logprobs.iter().copied().map(Some).collect();
    let prefill = difference(&details["prefill"], &prompt.prefill_logprobs)?;
    Ok(prefill.max(difference(&details["tokens"], &generated)?))
}

async fn stream_equals(stack: &Stack, prompt: &Prompt, max_new_tokens: u32) -> Result<()> {
    let body = json!({"inputs": prompt.text, "parameters": {"max_new_tokens": max_new_tokens}});
    let answer = stack.client().post("/generate_stream", &body).await?;
    let events: Vec<Value> =
        answer.events().iter().map(|event| Ok(serde_json::from_str(event)?)).collect::<Result<_>>()?;
    let tokens = Value::Array(events.iter().map(|event| event["token"].clone()).collect());
    ensure!(ids(&tokens)? == prompt.generated_ids, "streamed ids of {}", prompt.name);
    ensure!(texts(&tokens)? == prompt.stream_texts, "streamed texts of {}", prompt.name);
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

fn difference(tokens: &Value, expected: &[Option<f64>]) -> Result<f64> {
    let tokens = tokens.as_array().context("a list of tokens")?;
    let (found, wanted) = (tokens.len(), expected.len());
    ensure!(found == wanted, "{found} log-probabilities, {wanted} expected");
    let mut worst: f64 = 0.0;
    for (index, (token, expected)) in tokens.iter().zip(expected).enumerate() {
        let difference = match (token["logprob"].as_f64(), expected) {
            (Some(found), Some(expected)) => (found - expected).abs(),
            (None, None) => 0.0,
            (found, expected) => bail!("log-probability {index}: {found:?}, {expected:?} expected"),
        };
        ensure!(difference < TOLERANCE, "log-probability {index} differs by {difference}");
        worst = worst.max(difference);
    }
    Ok(worst)
}
