//! What is refused, how, and that nothing else suffers.

use anyhow::{Context, Result};
use futures::future::join_all;
use futures::stream::{self, StreamExt};
use hyper::StatusCode;
use integration_tests::stack::{Stack, endless};
use serde_json::{Value, json};

const QUESTION: &str = "What is the capital of France?";

#[tokio::test]
async fn bad_requests_are_answered_with_what_is_wrong() -> Result<()> {
    let stack = Stack::demo().await?;
    let parameters = |parameters: Value| json!({"inputs": QUESTION, "parameters": parameters});
    let cases = [
        (parameters(json!({"max_new_tokens": 0})), "max_new_tokens"),
        (parameters(json!({"temperature": 0.0})), "temperature"),
        (parameters(json!({"temperature": -1})), "temperature"),
        (parameters(json!({"top_p": 1.5})), "top_p"),
        (parameters(json!({"top_k": 0})), "top_k"),
        (parameters(json!({"typical_p": 0})), "typical_p"),
        (parameters(json!({"repetition_penalty": 0})), "repetition_penalty"),
        (parameters(json!({"frequency_penalty": 3})), "frequency_penalty"),
        (parameters(json!({"stop": ["a", "b", "c", "d", "e"]})), "stop"),
        (parameters(json!({"top_n_tokens": 6})), "top_n_tokens"),
        (parameters(json!({"truncate": 0})), "truncate"),
        (parameters(json!({"best_of": 2})), "sampling"),
        (parameters(json!({"best_of": 3, "do_sample": true})), "best_of"),
        (parameters(json!({"max_new_tokens": "ten"})), "max_new_tokens"),
        (json!({"inputs": ""}), "inputs"),
        (json!({"inputs": 7}), "inputs"),
        (json!({"inputs": "word ".repeat(5000)}), "tokens"),
        (json!({"parameters": {}}), "inputs"),
    ];
    for (body, named) in cases {
        for route in ["/generate", "/generate_stream", "/"] {
            let answer = stack.client().post(route, &body).await?;
            let context = format!("{route} {:.120}: {}", body.to_string(), answer.body);
            assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{context}");
            let error = answer.json()?;
            assert_eq!(error["error_type"], "validation", "{context}");
            assert!(error["error"].as_str().context("an error")?.contains(named), "{context}");
        }
    }
    stack.idle().await
}

#[tokio::test]
async fn bodies_that_are_not_requests_have_the_status_of_what_they_are() -> Result<()> {
    let stack = Stack::demo().await?;
    let json = [("content-type", "application/json")];
    let client = stack.client();
    let bad = client.post_raw("/generate", "{nope".into(), &json).await?;
    assert_eq!((bad.status, &bad.json()?["error_type"]), (StatusCode::BAD_REQUEST, &json!("validation")));
    let untyped = client.post_raw("/generate", "{}".into(), &[]).await?;
    assert_eq!(untyped.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let huge = client.post("/generate", &json!({"inputs": "x".repeat(3_000_000)})).await?;
    assert_eq!(huge.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(client.get("/nope").await?.status, StatusCode::NOT_FOUND);
    assert_eq!(client.get("/generate").await?.status, StatusCode::METHOD_NOT_ALLOWED);
    Ok(())
}

#[tokio::test]
async fn more_new_tokens_than_room_end_at_the_limit() -> Result<()> {
    let stack = Stack::start(&["--max-total-tokens", "40", "--max-input-tokens", "30"]).await?;
    let answer = stack.greedy("Tell me a story about a fox", 100_000).await?;
    let details = &answer["details"];
    assert_eq!(details["finish_reason"], "length", "{answer}");
    let prompt =
        stack.client().generate("/tokenize", &json!({"inputs": "Tell me a story about a fox"})).await?;
    let prompt = prompt.as_array().context("tokens")?.len() as u64;
    assert_eq!(details["generated_tokens"].as_u64().context("a count")? + prompt, 40);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_ten_thousand_is_served_or_refused_at_once_and_leaves_nothing_behind() -> Result<()> {
    let stack = Stack::start(&["--max-concurrent-requests", "8"]).await?;
    let body = json!({"inputs": QUESTION, "parameters": {"max_new_tokens": 20}});
    let client = stack.client();
    let answers: Vec<_> = stream::iter(0..10_000)
        .map(|_| client.post("/generate", &body))
        .buffer_unordered(500)
        .collect()
        .await;
    let mut served = 0;
    for answer in answers {
        let answer = answer?;
        if answer.status == StatusCode::OK {
            served += 1;
            assert!(answer.body.contains("Paris"), "{}", answer.body);
        } else {
            assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS, "{}", answer.body);
            assert_eq!(answer.json()?, json!({"error": "Model is overloaded", "error_type": "overloaded"}));
        }
    }
    assert!(served >= 8, "only {served} were served");
    stack.idle().await?;
    assert_eq!(stack.metric("tgi_request_success").await?, f64::from(served));
    assert_eq!(stack.metric("tgi_request_failure{err=\"overloaded\"}").await?, f64::from(10_000 - served));
    assert!(stack.greedy(QUESTION, 20).await?["generated_text"].as_str().context("text")?.contains("Paris"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_in_mid_stream_free_their_rows_and_blocks() -> Result<()> {
    let stack = Stack::start(&["--max-concurrent-requests", "16"]).await?;
    let leave = |_| async {
        let mut stream = stack.client().stream("/v1/chat/completions", &endless(2000)).await?;
        stream.next().await?.context("a first token")?;
        anyhow::Ok(())
    };
    for left in join_all((0..16).map(leave)).await {
        left?;
    }
    stack.idle().await?;
    assert_eq!(stack.metric("tgi_request_failure{err=\"dropped\"}").await?, 16.0);
    let answer = stack.greedy(QUESTION, 20).await?;
    assert!(answer["generated_text"].as_str().context("text")?.contains("Paris"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_move_under_load() -> Result<()> {
    let stack = Stack::demo().await?;
    let mut stream = stack.client().stream("/v1/chat/completions", &endless(1500)).await?;
    stream.next().await?.context("a first token")?;
    assert_eq!(stack.metric("tgi_batch_current_size").await?, 1.0);
    assert!(stack.metric("tgi_kv_cache_utilization").await? > 0.0);
    drop(stream);
    stack.idle().await?;
    stack.greedy(QUESTION, 20).await?;
    for series in ["tgi_request_count", "tgi_request_duration_count", "tgi_request_duration_seconds_count"] {
        assert!(stack.metric(series).await? >= 1.0, "{series}");
    }
    let sum = stack.metric("tgi_request_duration_sum").await?;
    assert_eq!(sum, stack.metric("tgi_request_duration_seconds_sum").await?);
    assert!(sum > 0.0);
    Ok(())
}
