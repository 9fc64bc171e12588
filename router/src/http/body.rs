//! JSON bodies in. What does not fit is answered with the field and the place.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{FromRequest, Request};
use futures::StreamExt as _;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HeaderMap};
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::App;
use super::error::ApiError;

/// How much of a body that is too large is read and dropped. A client that still sends when the connection closes may
/// never see the answer.
const DRAIN_BYTES_MAX: usize = 64 << 20;
/// How long that may take.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);
/// Memory that is set aside for an announced body; beyond it only what arrives takes memory.
const RESERVED_BYTES_MAX: usize = 64 << 10;

/// A body that is no request.
#[derive(Debug, Error)]
pub(crate) enum BodyError {
    #[error("Expected a request with `Content-Type: application/json`")]
    ContentType,
    #[error("The request body is larger than the limit of {limit} bytes (`--payload-limit`)")]
    TooLarge { limit: usize },
    #[error("The request body could not be read: {0}")]
    Unreadable(axum::Error),
    #[error("The request body is not JSON: {0}")]
    Syntax(serde_json::Error),
    #[error("Input validation error: {place}{error}")]
    Data { place: Place, error: serde_json::Error },
}

/// A JSON body as `T`.
#[derive(Debug)]
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(BodyError::ContentType.into());
        }
        let body = read(request, app.body_bytes_max).await?;
        Ok(Self(parse(&body)?))
    }
}

/// `application/json`, or `application/…+json`, with or without parameters.
fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.strip_prefix("application/").is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}

async fn read(request: Request, limit: usize) -> Result<Vec<u8>, BodyError> {
    let (parts, body) = request.into_parts();
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let announced: Option<usize> = announced.and_then(|value| value.parse().ok());
    // Such a client waits for a sign to go on, and sends nothing without it.
    let waits = parts.headers.contains_key(EXPECT);
    if waits && announced.is_some_and(|length| length > limit) {
        return Err(BodyError::TooLarge { limit });
    }
    let mut pieces = Body::into_data_stream(body);
    let mut body = Vec::with_capacity(announced.unwrap_or_default().min(limit).min(RESERVED_BYTES_MAX));
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(BodyError::Unreadable)?;
        if piece.len() > limit - body.len() {
            drop(body);
            drain(pieces).await;
            return Err(BodyError::TooLarge { limit });
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

/// Reads and drops a body that nobody wants, as far as that takes neither long nor much.
pub(super) async fn discard(body: Body) {
    drain(body.into_data_stream()).await;
}

async fn drain(mut pieces: BodyDataStream) {
    let all = async {
        let mut left = DRAIN_BYTES_MAX;
        while let Some(Ok(piece)) = pieces.next().await {
            match left.checked_sub(piece.len()) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    // Failing to read what is thrown away changes nothing.
    let _ = tokio::time::timeout(DRAIN_TIME_MAX, all).await;
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, BodyError> {
    serde_json::from_slice(body).map_err(|error| match error.is_data() {
        true => BodyError::Data { place: Place::find(body, error.line(), error.column()), error },
        false => BodyError::Syntax(error),
    })
}

/// Where in a document something is: `messages[2].content`. Empty at the top.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place(Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Item(usize),
}

impl Place {
    /// The value that ends at a line and a column of valid JSON, both from 1.
    fn find(body: &[u8], line: usize, column: usize) -> Self {
        let before: usize =
            body.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
        let end = (before + column).min(body.len());
        let mut place = Self::default();
        let mut position = 0;
        while position < end {
            match body[position] {
                b'{' => place.0.push(Step::Field(String::new())),
                b'[' => place.0.push(Step::Item(0)),
                b'}' | b']' => {
                    place.0.pop();
                }
                b',' => {
                    if let Some(Step::Item(index)) = place.0.last_mut() {
                        *index += 1;
                    }
                }
                b'"' => {
                    let length = string_length(&body[position..]);
                    let text = &body[position..position + length];
                    let rest = body[position + length..].trim_ascii_start();
                    if let (Some(Step::Field(name)), Some(b':')) = (place.0.last_mut(), rest.first()) {
                        *name = serde_json::from_slice(text).unwrap_or_default();
                    }
                    position += length - 1;
                }
                _ => {}
            }
            position += 1;
        }
        place
    }
}

/// Bytes of the string that begins here, quotes included.
fn string_length(text: &[u8]) -> usize {
    let mut position = 1;
    while position < text.len() && text[position] != b'"' {
        position += if text[position] == b'\\' { 2 } else { 1 };
    }
    (position + 1).min(text.len())
}

impl std::fmt::Display for Place {
    /// In backticks, with a colon behind it.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut path = String::new();
        for step in &self.0 {
            match step {
                Step::Field(name) if name.is_empty() => {}
                Step::Field(name) if path.is_empty() => path.push_str(name),
                Step::Field(name) => path.extend([".", name]),
                Step::Item(index) => path.push_str(&format!("[{index}]")),
            }
        }
        if path.is_empty() { Ok(()) } else { write!(formatter, "`{path}`: ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::openai::types::ChatRequest;
    use crate::request::native::GenerateRequest;

    #[track_caller]
    fn check<T: DeserializeOwned + std::fmt::Debug>(body: &str, status: &str, expected: &str) {
        let error = parse::<T>(body.as_bytes()).unwrap_err();
        let kind = if matches!(error, BodyError::Syntax(_)) { "syntax" } else { "data" };
        assert_eq!(kind, status);
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn what_is_not_json_is_told_from_what_does_not_fit() {
        check::<GenerateRequest>(
            "{nope",
            "syntax",
            "The request body is not JSON: key must be a string at line 1 column 2",
        );
        check::<GenerateRequest>(
            r#"{"parameters": {}}"#,
            "data",
            "Input validation error: missing field `inputs` at line 1 column 18",
        );
    }

    #[test]
    fn a_wrong_value_is_named_with_its_place() {
        check::<GenerateRequest>(
            "{\"inputs\": \"a, {b\",\n \"parameters\": {\"temperature\": \"hot\", \"top_p\": 1}}",
            "data",
            "Input validation error: `parameters.temperature`: invalid type: string \"hot\", expected f32 \
             at line 2 column 36",
        );
        check::<GenerateRequest>(
            r#"{"inputs": "a", "parameters": {"seed": -1, "stop": []}}"#,
            "data",
            "Input validation error: `parameters.seed`: invalid value: integer `-1`, expected u64 \
             at line 1 column 41",
        );
        check::<GenerateRequest>(
            r#"{"inputs": "a", "parameters": {"stop": ["a", 1]}}"#,
            "data",
            "Input validation error: `parameters.stop[1]`: invalid type: integer `1`, expected a string \
             at line 1 column 46",
        );
        check::<GenerateRequest>(
            r#"{"inputs": 1}"#,
            "data",
            "Input validation error: `inputs`: invalid type: integer `1`, expected a string at line 1 column 12",
        );
        check::<ChatRequest>(
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}], "n": 1}"#,
            "data",
            "Input validation error: `messages[1]`: `content` must be a string or a list of parts \
             at line 1 column 78",
        );
        check::<ChatRequest>(
            r#"{"messages": [], "stop": [1]}"#,
            "data",
            "Input validation error: `stop[0]`: invalid type: integer `1`, expected a string at line 1 column 27",
        );
    }

    #[test]
    fn json_is_recognized_by_its_type_alone() {
        let is = |value: &str| is_json(&HeaderMap::from_iter([(CONTENT_TYPE, value.parse().unwrap())]));
        assert!(is("application/json"));
        assert!(is("Application/JSON; charset=utf-8"));
        assert!(is("application/vnd.api+json"));
        assert!(!is("text/json"));
        assert!(!is("application/jsonp"));
        assert!(!is_json(&HeaderMap::new()));
    }
}
