//! Priorities and deadlines, as headers and bodies say them.

use std::time::{Duration, Instant};

use super::*;
use crate::request::{Deadline, Priority, ValidRequest};
use crate::shards::ShardError;

const CHAT: &str = "/v1/chat/completions";
const JSON: (&str, &str) = ("content-type", "application/json");

/// A request as it reaches the batcher.
async fn received(path: &str, headers: &[(&str, &str)], body: Value) -> ValidRequest {
    let (client, mut mail) = Setup::default().start();
    let reply = async {
        let waiting = mail.recv().await.unwrap();
        answer(&waiting, PARIS).await;
        waiting.request
    };
    let (headers, body) = ([headers, &[JSON]].concat(), body.to_string());
    let (answer, request) = tokio::join!(client.ask("POST", path, &headers, &body), reply);
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    request
}

#[tokio::test]
async fn a_request_is_as_urgent_as_its_header_or_else_its_body_says() {
    let priority = async |path, headers: &[_], body| received(path, headers, body).await.priority.get();
    let native = generate(json!({"priority": 7}));
    for path in ["/", "/generate", "/generate_stream"] {
        assert_eq!(priority(path, &[], native.clone()).await, 7, "{path}");
        assert_eq!(priority(path, &[("x-priority", "0")], native.clone()).await, 0, "{path}");
    }
    for stream in [false, true] {
        let openai = chat(json!({"priority": 9, "stream": stream}));
        assert_eq!(priority(CHAT, &[], openai.clone()).await, 9);
        assert_eq!(priority(CHAT, &[("x-priority", "1")], openai).await, 1);
        assert_eq!(priority(CHAT, &[], chat(json!({"priority": null}))).await, Priority::default().get());
    }
}

#[tokio::test]
async fn a_timeout_counts_from_the_arrival() {
    assert_eq!(received("/generate", &[], generate(json!({}))).await.deadline, None);
    for (path, body) in [
        ("/", generate(json!({}))),
        ("/generate", generate(json!({}))),
        ("/generate_stream", generate(json!({}))),
        (CHAT, chat(json!({}))),
        (CHAT, chat(json!({"stream": true}))),
    ] {
        let before = Instant::now();
        let request = received(path, &[("x-request-timeout", "1.5")], body).await;
        let Deadline { at, after } = request.deadline.unwrap();
        assert_eq!(after, Duration::from_millis(1500), "{path}");
        assert!((before..Instant::now()).contains(&(at - after)), "{path}");
    }
    let for_ever = received("/generate", &[("x-request-timeout", "1e30")], generate(json!({}))).await;
    assert_eq!(for_ever.deadline, None);
}

#[tokio::test]
async fn what_is_no_number_is_told_from_what_is_out_of_range() {
    let client = Setup::default().answering(PARIS);
    let cases = [
        ("x-priority", "10", 422, "`x-priority` is 10, but must be a whole number from 0 to 9"),
        ("x-priority", "high", 400, "`x-priority` is `high`, but must be a number"),
        ("x-request-timeout", "0", 422, "`x-request-timeout` is 0, but must be above 0 (seconds)"),
        ("x-request-timeout", "2s", 400, "`x-request-timeout` is `2s`, but must be a number"),
    ];
    for (path, body) in [("/generate", generate(json!({}))), (CHAT, chat(json!({"stream": true})))] {
        for (name, value, status, complaint) in cases {
            let answer = client.ask("POST", path, &[JSON, (name, value)], &body.to_string()).await;
            answer.assert_error(status, "validation", &format!("Input validation error: {complaint}"));
        }
    }
    let complaint = "Input validation error: `priority` is -1, but must be a whole number from 0 to 9";
    for (path, body) in
        [("/generate", generate(json!({"priority": -1}))), (CHAT, chat(json!({"priority": -1})))]
    {
        client.post(path, &body).await.assert_error(422, "validation", complaint);
    }
    let text = client.post(CHAT, &chat(json!({"priority": "high"}))).await;
    assert_eq!(text.status.as_u16(), 422);
    assert!(text.text.contains("`priority`"), "{}", text.text);
}

#[tokio::test]
async fn a_deadline_that_passes_is_a_504_or_an_event() {
    let late = || Err(ShardError::Deadline(Duration::from_secs(2)));
    let message =
        "Request failed during generation: the request did not end within the 2 s that it was given";
    let setup = Setup::default();
    let metrics = setup.metrics.clone();
    let (client, mut mail) = setup.start();
    let body = generate(json!({}));
    let (answer, ()) = tokio::join!(client.post("/generate", &body), async {
        mail.recv().await.unwrap().events.send(late()).await.unwrap();
    });
    answer.assert_error(504, "timeout", message);
    let (answer, ()) = tokio::join!(client.post("/generate_stream", &body), async {
        let waiting = mail.recv().await.unwrap();
        send(&waiting, Event::Token(step(PARIS, 0, 0))).await;
        waiting.events.send(late()).await.unwrap();
    });
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.events()[1], json!({"error": message, "error_type": "timeout"}));
    assert!(metrics.render().lines().any(|line| line == "tgi_request_failure{err=\"timeout\"} 2"));
}
