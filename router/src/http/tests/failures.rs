//! What goes wrong, and how it is answered and counted.

use super::*;
use crate::http::testing::BODY_BYTES_MAX;
use crate::metrics::Metrics;
use crate::shards::ShardError;

#[tokio::test]
async fn above_the_limit_the_answer_is_429_until_a_stream_is_dropped() {
    let (client, mut mail) = Setup::default().start();
    let body = generate(json!({}));
    let first = tokio::spawn({
        let (client, body) = (client.clone(), body.clone());
        async move { client.post("/generate", &body).await }
    });
    let running = mail.recv().await.unwrap();
    let open = client.open("/generate_stream", &body);
    let (stream, waiting) = tokio::join!(open, async {
        let waiting = mail.recv().await.unwrap();
        send(&waiting, Event::Token(step(PARIS, 0, 0))).await;
        waiting
    });
    let overloaded = client.post("/generate_stream", &body).await;
    overloaded.assert_error(429, "overloaded", "Model is overloaded");
    assert_eq!(overloaded.headers["retry-after"], "1");

    drop(stream);
    waiting.events.closed().await;
    let (again, _) = tokio::join!(client.open("/generate_stream", &body), async {
        answer(&mail.recv().await.unwrap(), PARIS).await;
    });
    assert_eq!(again.status(), StatusCode::OK);
    answer(&running, PARIS).await;
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
}

#[tokio::test]
async fn a_failed_step_before_the_first_token_is_the_status() {
    let (client, mut mail) = Setup::default().start();
    let fail = async {
        let waiting = mail.recv().await.unwrap();
        waiting.events.send(Err(ShardError::Server("oops".to_owned()))).await.unwrap();
    };
    let body = generate(json!({}));
    let (answer, ()) = tokio::join!(client.post("/generate_stream", &body), fail);
    answer.assert_error(424, "generation", "Request failed during generation: Server error: oops");
}

#[tokio::test]
async fn a_failed_step_after_it_is_an_event() {
    for (path, body) in
        [("/generate_stream", generate(json!({}))), ("/v1/chat/completions", chat(json!({"stream": true})))]
    {
        let (client, mut mail) = Setup::default().start();
        let fail = async {
            let waiting = mail.recv().await.unwrap();
            send(&waiting, Event::Token(step(PARIS, 0, 0))).await;
            waiting.events.send(Err(ShardError::Empty)).await.unwrap();
        };
        let (answer, ()) = tokio::join!(client.post(path, &body), fail);
        assert_eq!(answer.status, StatusCode::OK);
        let message = "Request failed during generation: Sharded results are empty";
        let expected = match path {
            "/generate_stream" => vec![json!({"error": message, "error_type": "generation"})],
            _ => vec![json!({"error": {"message": message, "http_status_code": 424}}), json!("[DONE]")],
        };
        assert_eq!(answer.events()[1..], expected);
    }
}

#[tokio::test]
async fn a_stream_without_an_end_is_incomplete() {
    let (client, mut mail) = Setup::default().start();
    let body = generate(json!({}));
    let (answer, ()) = tokio::join!(client.post("/generate", &body), async {
        send(&mail.recv().await.unwrap(), Event::Token(step(PARIS, 0, 0))).await;
    });
    answer.assert_error(500, "incomplete_generation", "Incomplete generation");
}

#[tokio::test]
async fn validation_fails_with_a_status_on_streams_too() {
    let client = Setup::default().answering(PARIS);
    let answer = client.post("/generate_stream", &generate(json!({"best_of": 2, "do_sample": true}))).await;
    let message = "Input validation error: `best_of` is 2, but must be 1 when streaming, sampling or not";
    answer.assert_error(422, "validation", message);
    let answer = client.post("/v1/chat/completions", &chat(json!({"stream": true, "max_tokens": 0}))).await;
    let message = "Input validation error: `max_tokens` is 0, but must be at least 1";
    answer.assert_error(422, "validation", message);
}

#[tokio::test]
async fn bodies_are_refused_by_kind() {
    let client = Setup::default().answering(PARIS);
    let json = ("content-type", "application/json");
    let text = ("content-type", "text/plain");
    let large = " ".repeat(BODY_BYTES_MAX) + "{}";
    let ask =
        async |header, body: &str| client.ask("POST", "/generate", &[header], body).await.status.as_u16();
    assert_eq!(ask(text, "{}").await, 415);
    assert_eq!(ask(json, "{").await, 400);
    assert_eq!(ask(json, "{}").await, 422);
    assert_eq!(ask(json, &large).await, 413);
    let answer = client.ask("POST", "/generate", &[json], &large).await;
    let message = "The request body is larger than the limit of 2000 bytes (`--payload-limit`)";
    answer.assert_error(413, "validation", message);
}

#[tokio::test]
async fn a_request_is_counted_once_whatever_becomes_of_it() {
    let metrics = Setup::default().metrics;
    let client = Setup { metrics: metrics.clone(), ..Setup::default() }.answering(PARIS);
    client.post("/v1/chat/completions", &chat(json!({"n": 2}))).await;
    client.post("/generate", &generate(json!({"top_k": 0}))).await;
    client.post("/v1/chat/completions", &json!({"messages": []})).await;
    let text = metrics.render();
    for line in [
        "tgi_request_count 3",
        "tgi_request_success 1",
        "tgi_request_failure{err=\"validation\"} 1",
        "tgi_request_failure{err=\"template\"} 1",
        "tgi_request_generated_tokens_sum 6",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
}

/// Requests by outcome: successes, dropped, failed steps, incomplete ones.
fn outcomes(metrics: &Metrics) -> [u32; 4] {
    let text = metrics.render();
    let value = |series: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no series {series}")).parse().unwrap()
    };
    let failed = |cause: &str| value(&format!("tgi_request_failure{{err=\"{cause}\"}}"));
    [value("tgi_request_success"), failed("dropped"), failed("generation"), failed("incomplete")]
}

#[tokio::test]
async fn a_client_that_leaves_is_counted_once_even_behind_its_last_event() {
    let setup = Setup::default();
    let metrics = setup.metrics.clone();
    let (client, mut mail) = setup.start();
    let body = chat(json!({"n": 2, "stream": true}));
    let (response, waiting) = tokio::join!(client.open("/v1/chat/completions", &body), async {
        let waiting = [mail.recv().await.unwrap(), mail.recv().await.unwrap()];
        for waiting in &waiting {
            answer(waiting, PARIS).await;
        }
        waiting
    });
    assert_eq!(outcomes(&metrics), [0; 4], "its events are on their way");
    drop(response);
    assert_eq!(outcomes(&metrics), [0, 1, 0, 0]);
    drop(waiting);

    for parameters in [json!({}), json!({"best_of": 2, "do_sample": true})] {
        let body = generate(parameters);
        tokio::select! {
            _ = client.post("/generate", &body) => panic!("nobody answers"),
            _ = mail.recv() => {}
        }
    }
    assert_eq!(outcomes(&metrics), [0, 3, 0, 0]);
}

#[tokio::test]
async fn a_request_fails_once_however_many_sequences_it_has() {
    let setup = Setup::default();
    let metrics = setup.metrics.clone();
    let (client, mut mail) = setup.start();
    let body = generate(json!({"best_of": 2, "do_sample": true}));
    let (answer, ()) = tokio::join!(client.post("/generate", &body), async {
        for waiting in [mail.recv().await.unwrap(), mail.recv().await.unwrap()] {
            waiting.events.send(Err(ShardError::Empty)).await.unwrap();
        }
    });
    assert_eq!(answer.status.as_u16(), 424);
    assert_eq!(outcomes(&metrics), [0, 0, 1, 0]);
}

#[tokio::test]
async fn of_several_sequences_the_tokens_of_the_best_are_observed() {
    let setup = Setup::default();
    let metrics = setup.metrics.clone();
    let (client, mut mail) = setup.start();
    let body = generate(json!({"best_of": 2, "do_sample": true}));
    tokio::join!(client.post("/generate", &body), async {
        // Of equals the first wins.
        answer(&mail.recv().await.unwrap(), &PARIS[..1]).await;
        answer(&mail.recv().await.unwrap(), PARIS).await;
    });
    assert_eq!(outcomes(&metrics), [1, 0, 0, 0]);
    assert!(metrics.render().lines().any(|line| line == "tgi_request_generated_tokens_sum 1"));
}
