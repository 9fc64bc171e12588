//! A request's tokens depend on the request alone.

use anyhow::{Context, Result};
use futures::future::try_join_all;
use integration_tests::stack::Stack;
use serde_json::{Value, json};

/// Different prompts, raw and of different lengths, so that rows join and leave at different steps.
fn prompts() -> Vec<String> {
    let countries = ["France", "Japan", "Peru", "Kenya", "Norway", "India", "Chile", "Egypt"];
    let openings = [
        "What is the capital of",
        "Once upon a time in",
        "My name is Anna and I live in",
        "Tell me a story about",
    ];
    let mut prompts = Vec::new();
    for (index, country) in countries.iter().enumerate() {
        for opening in openings {
            prompts.push(format!("{opening} {country}"));
            prompts.push(format!("{}{opening} {country}", "Hello. ".repeat(index * 5 + 1)));
        }
    }
    prompts
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_at_once_equal_each_alone_token_for_token() -> Result<()> {
    let stack = Stack::demo().await?;
    let prompts = prompts();
    assert_eq!(prompts.len(), 64);
    let greedy = |prompt: &String| json!({"inputs": prompt, "parameters": {"max_new_tokens": 100}});
    equal_alone_and_together(&stack, &prompts.iter().map(greedy).collect::<Vec<_>>()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sampled_requests_with_a_seed_equal_each_alone_token_for_token() -> Result<()> {
    let stack = Stack::demo().await?;
    let sampled = |(seed, prompt): (usize, &String)| {
        let parameters = json!({
            "max_new_tokens": 40, "seed": seed, "temperature": 1.1, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.05
        });
        json!({"inputs": prompt, "parameters": parameters})
    };
    equal_alone_and_together(&stack, &prompts().iter().enumerate().map(sampled).collect::<Vec<_>>()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_cut_into_chunks_gives_the_same_tokens() -> Result<()> {
    let whole = Stack::demo().await?;
    let chunked = Stack::start(&["--max-batch-prefill-tokens", "16"]).await?;
    let long = "Hello. ".repeat(120) + "What is the capital of Japan?";
    let body = json!({"inputs": long, "parameters": {"max_new_tokens": 30}});
    assert_eq!(tokens(&whole, &body).await?, tokens(&chunked, &body).await?);
    Ok(())
}

async fn equal_alone_and_together(stack: &Stack, bodies: &[Value]) -> Result<()> {
    let together = try_join_all(bodies.iter().map(|body| tokens(stack, body))).await?;
    for (body, together) in bodies.iter().zip(together) {
        assert_eq!(tokens(stack, body).await?, together, "{body}");
    }
    stack.idle().await
}

/// Streams a request: ids and log-probabilities of its tokens, bit for bit.
async fn tokens(stack: &Stack, body: &Value) -> Result<Vec<(u64, String)>> {
    let mut stream = stack.client().stream("/generate_stream", body).await?;
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await? {
        let event: Value = serde_json::from_str(&event)?;
        let id = event["token"]["id"].as_u64().with_context(|| event.to_string())?;
        tokens.push((id, event["token"]["logprob"].to_string()));
    }
    Ok(tokens)
}
