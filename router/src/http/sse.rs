//! Token stream to server-sent events.
//!
//! The frames are written by hand, because clients compare bytes: `data: `, compact JSON, an empty line, nothing else.
//! The first frame, or the error that comes instead, is waited for before the status is sent.

use std::convert::Infallible;
use std::time::Duration;

use async_stream::stream;
use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Serialize;
use tokio::time::timeout;

use super::error::ApiError;
use crate::request::params::Dialect;

/// After this long without a frame, a comment shows that the connection lives.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(15);

const KEEP_ALIVE: Bytes = Bytes::from_static(b":\n\n");
const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// One event.
pub(super) fn frame(event: &impl Serialize) -> Bytes {
    let mut bytes = b"data: ".to_vec();
    serde_json::to_writer(&mut bytes, event).expect("our events have string keys and are written to memory");
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// Answers with a stream of frames. An error that comes first, and soon, is the answer instead.
pub(super) async fn respond(
    frames: impl Stream<Item = Result<Bytes, ApiError>> + Send + 'static,
    dialect: Dialect,
    mut headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut frames = frames.boxed();
    let first = match timeout(SILENCE_MAX, frames.next()).await {
        Ok(Some(first)) => Some(first?),
        Ok(None) => None,
        // Proxies cut connections on which nothing moves: the status must go now, whatever comes of the request.
        Err(_silence) => Some(KEEP_ALIVE),
    };
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    let body = Body::from_stream(body(first, frames, dialect).map(Ok::<_, Infallible>));
    Ok((headers, body).into_response())
}

/// The frames with what belongs between and behind them.
fn body(
    first: Option<Bytes>,
    mut frames: impl Stream<Item = Result<Bytes, ApiError>> + Unpin,
    dialect: Dialect,
) -> impl Stream<Item = Bytes> {
    stream! {
        if let Some(first) = first {
            yield first;
        }
        loop {
            match timeout(SILENCE_MAX, frames.next()).await {
                Ok(Some(Ok(frame))) => yield frame,
                Ok(Some(Err(error))) => {
                    yield frame(&error.event(dialect));
                    break;
                }
                Ok(None) => break,
                Err(_silence) => yield KEEP_ALIVE,
            }
        }
        if dialect == Dialect::OpenAi {
            yield DONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use serde_json::json;

    use super::*;
    use crate::infer::InferError;

    fn failure() -> Result<Bytes, ApiError> {
        Err(InferError::Incomplete.into())
    }

    async fn text(
        frames: impl Stream<Item = Result<Bytes, ApiError>> + Send + 'static,
        dialect: Dialect,
    ) -> Result<String, ApiError> {
        let response = respond(frames, dialect, HeaderMap::new()).await?;
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        Ok(String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn events_are_one_line_and_an_empty_one() {
        let frames = || stream::iter([Ok(frame(&json!({"a": "x\ny"}))), Ok(frame(&json!(null)))]);
        assert_eq!(
            text(frames(), Dialect::Native).await.unwrap(),
            "data: {\"a\":\"x\\ny\"}\n\ndata: null\n\n"
        );
        let openai = text(frames(), Dialect::OpenAi).await.unwrap();
        assert!(openai.ends_with("data: null\n\ndata: [DONE]\n\n"), "{openai}");
    }

    #[test]
    fn what_json_has_no_number_for_is_null() {
        assert_eq!(frame(&[f32::NEG_INFINITY, f32::NAN, 0.1]), "data: [null,null,0.1]\n\n");
    }

    #[tokio::test]
    async fn an_error_before_the_first_event_is_the_answer() {
        assert_eq!(
            text(stream::iter([failure()]), Dialect::OpenAi).await,
            Err(InferError::Incomplete.into())
        );
    }

    #[tokio::test]
    async fn an_error_after_it_is_the_last_event() {
        let frames = || stream::iter([Ok(frame(&1)), failure(), Ok(frame(&2))]);
        let native = "data: 1\n\ndata: {\"error\":\"Incomplete generation stream\",\
                      \"error_type\":\"incomplete_generation_stream\"}\n\n";
        assert_eq!(text(frames(), Dialect::Native).await.unwrap(), native);
        let openai = "data: 1\n\ndata: {\"error\":{\"message\":\"Incomplete generation stream\",\
                      \"http_status_code\":500}}\n\ndata: [DONE]\n\n";
        assert_eq!(text(frames(), Dialect::OpenAi).await.unwrap(), openai);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments() {
        let frames = stream! {
            tokio::time::sleep(SILENCE_MAX * 2 + SILENCE_MAX / 2).await;
            yield Ok(frame(&1));
            yield failure();
        };
        let text = text(frames, Dialect::Native).await.unwrap();
        assert!(text.starts_with(":\n\n:\n\ndata: 1\n\ndata: {\"error\""), "{text}");
    }
}
