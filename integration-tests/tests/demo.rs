//! The demo model, asked what a newcomer asks.

use anyhow::{Context, Result};
use integration_tests::stack::Stack;
use serde_json::{Value, json};

/// Sampling as the README's first request has it.
fn sampled(max_new_tokens: u32, seed: u64) -> Value {
    json!({"max_new_tokens": max_new_tokens, "temperature": 0.7, "top_p": 0.9, "do_sample": true, "seed": seed})
}

#[tokio::test]
async fn the_capital_of_france_is_paris_greedily_and_sampled() -> Result<()> {
    let stack = Stack::demo().await?;
    let question = "What is the capital of France?";
    let greedy = stack.greedy(question, 100).await?;
    assert!(text(&greedy)?.contains("Paris"), "{greedy}");
    for seed in 0..8 {
        let body = json!({"inputs": question, "parameters": sampled(100, seed)});
        let answer = stack.client().generate("/generate", &body).await?;
        assert!(text(&answer)?.contains("Paris"), "seed {seed}: {answer}");
    }
    Ok(())
}

#[tokio::test]
async fn a_chat_about_italy_says_rome_whole_and_streamed() -> Result<()> {
    let stack = Stack::demo().await?;
    let messages = json!([{"role": "user", "content": "What is the capital of Italy?"}]);
    let whole = stack
        .client()
        .generate("/v1/chat/completions", &json!({"messages": messages, "temperature": 0}))
        .await?;
    let content = whole["choices"][0]["message"]["content"].as_str().context("content")?;
    assert!(content.contains("Rome"), "{whole}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");

    let body = json!({"messages": messages, "temperature": 0, "stream": true});
    let answer = stack.client().post("/v1/chat/completions", &body).await?;
    let mut streamed = String::new();
    let events = answer.events();
    let (done, chunks) = events.split_last().context("events")?;
    assert_eq!(*done, "[DONE]");
    for chunk in chunks {
        let chunk: Value = serde_json::from_str(chunk)?;
        streamed += chunk["choices"][0]["delta"]["content"].as_str().context("a delta")?;
    }
    assert_eq!(streamed, content);
    Ok(())
}

#[tokio::test]
async fn gradient_descent_is_explained_one_event_per_token() -> Result<()> {
    let stack = Stack::demo().await?;
    let body = json!({"inputs": "Explain gradient descent in simple terms.", "parameters": sampled(200, 1)});
    let answer = stack.client().post("/generate_stream", &body).await?;
    let events: Vec<Value> =
        answer.events().iter().map(|event| Ok(serde_json::from_str(event)?)).collect::<Result<_>>()?;
    let (last, others) = events.split_last().context("events")?;
    let text = text(last)?;
    for word in ["gradient", "step", "error"] {
        assert!(text.to_lowercase().contains(word), "{text}");
    }
    for (position, event) in others.iter().enumerate() {
        assert_eq!(event["index"], position + 1);
        assert_eq!(event["generated_text"], Value::Null);
    }
    let joined: String =
        events.iter().filter(|event| event["token"]["special"] == false).map(piece).collect();
    assert_eq!(joined, text);
    Ok(())
}

fn text(answer: &Value) -> Result<&str> {
    answer["generated_text"].as_str().context("generated_text")
}

fn piece(event: &Value) -> &str {
    event["token"]["text"].as_str().unwrap_or_default()
}
