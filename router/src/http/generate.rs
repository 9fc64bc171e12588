//! `/generate`, `/generate_stream` and the root route, which is either.

use std::sync::Arc;
use std::time::Instant;

use async_stream::try_stream;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::Stream;
use uuid::Uuid;

use super::body::Json;
use super::error::ApiError;
use super::headers::{self, Summary};
use super::native::{BestOfSequence, Details, GenerateResponse, StreamDetails, StreamResponse};
use super::terms::Headers;
use super::{App, sse};
use crate::batching::Event;
use crate::infer::{Generating, Generation, Request};
use crate::request::native::{GenerateRequest, Presentation};
use crate::request::params::Dialect;
use crate::request::terms::Terms;

pub(super) async fn generate(
    State(app): State<Arc<App>>,
    Headers(terms): Headers,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let (summary, body) = whole(&app, request, terms, false).await?;
    Ok((headers::whole(&app.compute_type, &summary), axum::Json(body)).into_response())
}

pub(super) async fn generate_stream(
    State(app): State<Arc<App>>,
    Headers(terms): Headers,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    streamed(&app, request, terms, false).await
}

/// As the hub's own inference service: the prompt comes back with the text unless the client or the kind of model says
/// otherwise, and a plain answer is a list of one.
pub(super) async fn root(
    State(app): State<Arc<App>>,
    Headers(terms): Headers,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let full_text = app.info.continues_text();
    if request.stream {
        return streamed(&app, request, terms, full_text).await;
    }
    let (summary, body) = whole(&app, request, terms, full_text).await?;
    Ok((headers::whole(&app.compute_type, &summary), axum::Json([body])).into_response())
}

async fn whole(
    app: &App,
    request: GenerateRequest,
    terms: Terms,
    full_text: bool,
) -> Result<(Summary, GenerateResponse), ApiError> {
    let received = Instant::now();
    let (inputs, params, presentation) = request.split();
    let characters = inputs.chars().count();
    let prefix = prefix(&inputs, presentation, full_text);
    let request = Request { id: Uuid::new_v4(), received, inputs, params, terms, streamed: false };
    let mut generations = app.infer.generate(request).await?.into_iter();
    let best = generations.next().expect("a request has at least one sequence");
    let summary = Summary {
        characters,
        prompt_tokens: best.prompt_tokens.0,
        cached_tokens: best.finished.cached.0,
        generated_tokens: best.finished.tokens.0,
        timings: best.timings,
    };
    let text = |generation: &Generation| format!("{prefix}{}", generation.finished.text);
    let generated_text = text(&best);
    let details = presentation.details.then(|| {
        let others = generations.map(|generation| BestOfSequence {
            generated_text: text(&generation),
            details: Details::new(generation),
        });
        Details::new(best).beside(others.collect())
    });
    Ok((summary, GenerateResponse { generated_text, details }))
}

async fn streamed(
    app: &App,
    request: GenerateRequest,
    terms: Terms,
    full_text: bool,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let (inputs, params, presentation) = request.split();
    let headers = headers::streamed(&app.compute_type, inputs.chars().count());
    let prefix = prefix(&inputs, presentation, full_text);
    let request = Request { id: Uuid::new_v4(), received, inputs, params, terms, streamed: true };
    let mut sequences = app.infer.start(request).await?;
    let sequence = sequences.pop().expect("a streamed request has one sequence");
    sse::respond(frames(sequence, prefix, presentation.details), Dialect::Native, headers).await
}

fn frames(
    mut sequence: Generating,
    prefix: String,
    details: bool,
) -> impl Stream<Item = Result<Bytes, ApiError>> {
    try_stream! {
        let mut index = 0;
        while let Some(event) = sequence.next().await {
            let (step, finished) = match event? {
                Event::Prompt(_) => continue,
                Event::Token(step) => (step, None),
                Event::Last(step, finished) => (step, Some(finished)),
            };
            index += 1;
            let mut response = StreamResponse::new(index, step);
            if let Some(finished) = finished {
                response.details = details.then(|| {
                    let input_length = sequence.prompt_tokens().0;
                    StreamDetails::new(finished.reason, finished.tokens.0, finished.seed, input_length)
                });
                response.generated_text = Some(format!("{prefix}{}", finished.text));
            }
            yield sse::frame(&response);
        }
    }
}

/// What stands in front of the generated text: the prompt as it was sent, or nothing.
fn prefix(inputs: &str, presentation: Presentation, full_text: bool) -> String {
    if presentation.full_text.unwrap_or(full_text) { inputs.to_owned() } else { String::new() }
}
