//! Once the server is to end.

use futures::FutureExt as _;

use super::*;

const REASON: &str = "the server is shutting down and takes no new requests";

#[tokio::test]
async fn from_its_beginning_nothing_new_is_taken_and_what_runs_finishes() {
    let setup = Setup::default();
    let availability = setup.availability.clone();
    let (client, mut mail) = setup.start();
    let body = generate(json!({}));
    let (stream, waiting) = tokio::join!(client.open("/generate_stream", &body), async {
        let waiting = mail.recv().await.unwrap();
        send(&waiting, Event::Token(step(PARIS, 0, 0))).await;
        waiting
    });
    availability.draining();
    let health = client.get("/health").await;
    health.assert_error(503, "healthcheck", "unhealthy");
    assert_eq!((&health.json()["status"], &health.json()["reason"]), (&json!("draining"), &json!(REASON)));
    for path in ["/", "/generate", "/generate_stream", "/v1/chat/completions", "/tokenize", "/chat_tokenize"]
    {
        // Whatever the body says.
        let refused = client.post(path, &body).await;
        refused.assert_error(503, "unavailable", REASON);
        assert_eq!(refused.headers["retry-after"], "1");
        assert!(has_header(&refused, "access-control-allow-origin"));
    }
    for path in ["/info", "/metrics"] {
        assert_eq!(client.get(path).await.status, StatusCode::OK, "{path}");
    }
    assert!(availability.drained().now_or_never().is_none(), "a stream is under way");
    answer(&waiting, PARIS).await;
    let bytes = axum::body::to_bytes(stream.into_body(), usize::MAX).await.unwrap();
    assert!(String::from_utf8_lossy(&bytes).contains("\"generated_text\":\"Paris\""));
    assert!(availability.drained().now_or_never().is_some());
}

#[tokio::test]
async fn a_request_is_waited_for_before_it_has_reached_the_batcher_and_until_its_answer_is_read() {
    let setup = Setup::default();
    let availability = setup.availability.clone();
    let (client, mut mail) = setup.start();
    let body = generate(json!({}));
    let mut open = std::pin::pin!(client.open("/generate", &body));
    assert!(open.as_mut().now_or_never().is_none(), "it is with the tokenizer");
    availability.draining();
    assert!(availability.drained().now_or_never().is_none());
    let (response, ()) = tokio::join!(open, async { answer(&mail.recv().await.unwrap(), PARIS).await });
    assert_eq!(response.status(), StatusCode::OK);
    assert!(availability.drained().now_or_never().is_none(), "its body is on its way");
    drop(response);
    assert!(availability.drained().now_or_never().is_some());
}

#[tokio::test]
async fn a_client_that_leaves_holds_nothing_back() {
    let setup = Setup::default();
    let availability = setup.availability.clone();
    let (client, mut mail) = setup.start();
    let body = generate(json!({}));
    tokio::select! {
        _ = client.post("/generate", &body) => panic!("nobody answers"),
        _ = mail.recv() => {}
    }
    availability.draining();
    assert!(availability.drained().now_or_never().is_some());
}
