//! `/tokenize` and `/chat_tokenize`.

use std::sync::Arc;

use axum::extract::State;
use serde::Serialize;

use super::App;
use super::body::Json;
use super::error::ApiError;
use super::openai::chat;
use super::openai::types::ChatRequest;
use crate::infer::InferError;
use crate::request::native::GenerateRequest;
use crate::request::validate::ValidationError;

/// A token and its place: bytes of the text, half-open.
#[derive(Debug, Serialize)]
pub(super) struct SimpleToken {
    id: u32,
    text: String,
    start: usize,
    stop: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatTokenizeResponse {
    tokenize_response: Vec<SimpleToken>,
    templated_text: String,
}

pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    Json(request): Json<GenerateRequest>,
) -> Result<axum::Json<Vec<SimpleToken>>, ApiError> {
    if request.inputs.is_empty() {
        return Err(InferError::Validation(ValidationError::EmptyInputs).into());
    }
    Ok(axum::Json(tokens(&app, request.inputs, true).await?.1))
}

pub(super) async fn chat_tokenize(
    State(app): State<Arc<App>>,
    Json(request): Json<ChatRequest>,
) -> Result<axum::Json<ChatTokenizeResponse>, ApiError> {
    let (prompt, _) = chat::prompt(&app, request).await?;
    // The template has written the special tokens already.
    let (templated_text, tokenize_response) = tokens(&app, prompt, false).await?;
    Ok(axum::Json(ChatTokenizeResponse { tokenize_response, templated_text }))
}

async fn tokens(
    app: &App,
    text: String,
    add_special_tokens: bool,
) -> Result<(String, Vec<SimpleToken>), ApiError> {
    let spans = app.tokenizer.spans(text, add_special_tokens).await;
    let (text, spans) = spans.map_err(|error| InferError::Validation(error.into()))?;
    let bytes = text.as_bytes();
    let tokens = spans.into_iter().map(|span| SimpleToken {
        id: span.id.0,
        // A token may be part of a character.
        text: String::from_utf8_lossy(bytes.get(span.start..span.stop).unwrap_or_default()).into_owned(),
        start: span.start,
        stop: span.stop,
    });
    let tokens = tokens.collect();
    Ok((text, tokens))
}
