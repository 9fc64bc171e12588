//! A cache that is far too small: rows leave the batch and come back, and what others have computed is used again.

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use integration_tests::stack::Stack;
use serde_json::{Value, json};

/// Requests at once.
const CLIENTS: usize = 32;

fn body(client: usize) -> Value {
    let inputs =
        format!("{}Once upon a time there was a child who had {client} toys.", "Hello. ".repeat(client % 7));
    let mut parameters = json!({"max_new_tokens": 120, "details": true});
    if client % 2 == 1 {
        parameters = json!({
            "max_new_tokens": 120, "details": true, "do_sample": true, "seed": client, "temperature": 0.8,
            "repetition_penalty": 1.05, "frequency_penalty": 0.1, "top_k": 40
        });
    }
    json!({"inputs": inputs, "parameters": parameters})
}

/// The whole answer, log-probabilities and counts included.
async fn answer(stack: &Stack, body: &Value) -> Result<Value> {
    let answer = stack.client().post("/generate", body).await?;
    ensure!(answer.status.is_success(), "{}: {}", answer.status, answer.body);
    answer.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_requests_answer_as_each_does_alone() -> Result<()> {
    // A request takes up to 180 tokens; alone each fits, and six fill the cache.
    let stack = Stack::start(&["--max-batch-total-tokens", "1024", "--max-total-tokens", "400"]).await?;
    let bodies: Vec<Value> = (0..CLIENTS).map(body).collect();
    let together = try_join_all(bodies.iter().map(|body| answer(&stack, body))).await?;
    let preempted = stack.metric("tgi_request_preempted").await?;
    assert!(preempted > 0.0, "nobody was preempted");
    println!("{preempted} preemptions");
    for (client, (body, together)) in bodies.iter().zip(together).enumerate() {
        assert_eq!(answer(&stack, body).await?, together, "client {client}");
    }
    stack.idle().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_turns_of_a_chat_are_computed_once() -> Result<()> {
    let cached = Stack::demo().await?;
    let uncached = Stack::start(&["--prefix-caching", "false"]).await?;
    let mut messages = vec![json!({"role": "user", "content": "What is the capital of France?"})];
    for turn in 0..6 {
        let body = json!({"messages": messages, "max_tokens": 40, "temperature": 0, "logprobs": true});
        let with = cached.client().generate("/v1/chat/completions", &body).await?;
        let without = uncached.client().generate("/v1/chat/completions", &body).await?;
        assert_eq!(with["choices"], without["choices"], "turn {turn}");
        // It is absent when there are none.
        let found =
            |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        let prompt = with["usage"]["prompt_tokens"].as_u64().context("a count")?;
        assert_eq!(found(&without), 0, "{without}");
        if turn > 0 {
            // All but the new message and what does not fill a block.
            assert!(found(&with) + 48 > prompt, "turn {turn}: {}", with["usage"]);
        }
        messages.push(with["choices"][0]["message"].clone());
        messages.push(json!({"role": "user", "content": format!("And what is {turn} plus 3?")}));
    }
    let hits = cached.metric("tgi_prefix_cache_hit_tokens").await?;
    assert!(hits > 100.0, "{hits}");
    assert_eq!(uncached.metric("tgi_prefix_cache_hit_tokens").await?, 0.0);
    Ok(())
}
