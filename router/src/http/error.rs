//! Errors as clients see them: the only place that knows status codes, for plain answers and for events in a stream.

use std::any::Any;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{HeaderValue, RETRY_AFTER};
use serde::Serialize;
use serde_json::json;

use super::body::BodyError;
use crate::adapters::AdapterError;
use crate::availability::Unavailable;
use crate::infer::InferError;
use crate::request::params::Dialect;
use crate::request::terms::TermsError;
use crate::shards::ShardError;

/// Seconds after which it makes sense to ask again. Places become free at any time, and who balances the load of several
/// servers has another one at once.
const RETRY_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// A failed request: a status and the body `{"error", "error_type"}`, the same on every route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    error_type: &'static str,
    message: String,
}

#[derive(Serialize)]
struct Body<'a> {
    error: &'a str,
    error_type: &'static str,
}

impl ApiError {
    /// The error as an event of a stream that has begun.
    pub(super) fn event(&self, dialect: Dialect) -> serde_json::Value {
        let (message, error_type) = match self.error_type {
            "incomplete_generation" => ("Incomplete generation stream", "incomplete_generation_stream"),
            other => (self.message.as_str(), other),
        };
        match dialect {
            Dialect::Native => json!({ "error": message, "error_type": error_type }),
            Dialect::OpenAi => {
                json!({ "error": { "message": message, "http_status_code": self.status.as_u16() } })
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = Body { error: &self.message, error_type: self.error_type };
        answer(self.status, body)
    }
}

/// What is refused for the moment says when to come again.
fn answer(status: StatusCode, body: impl Serialize) -> Response {
    let mut response = (status, Json(body)).into_response();
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS);
    }
    response
}

impl From<InferError> for ApiError {
    fn from(error: InferError) -> Self {
        let (status, error_type) = match &error {
            InferError::Validation(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            InferError::Overloaded => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            InferError::Shard(error) => shard(error),
            InferError::Stopped(_) | InferError::ShuttingDown => {
                (StatusCode::SERVICE_UNAVAILABLE, "generation")
            }
            InferError::Incomplete => (StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation"),
            InferError::Template(_) => (StatusCode::UNPROCESSABLE_ENTITY, "template_error"),
            InferError::GrammarWithTools => (StatusCode::UNPROCESSABLE_ENTITY, "tool_error"),
            InferError::UnknownAdapter(_) => (StatusCode::NOT_FOUND, "adapter_not_found"),
        };
        Self { status, error_type, message: error.to_string() }
    }
}

/// What became of a request behind the batcher's door.
fn shard(error: &ShardError) -> (StatusCode, &'static str) {
    match error {
        ShardError::Deadline(_) => (StatusCode::GATEWAY_TIMEOUT, "timeout"),
        ShardError::Abandoned(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        ShardError::Poisonous(_) => (StatusCode::INTERNAL_SERVER_ERROR, "poisonous_request"),
        ShardError::Connection(_)
        | ShardError::Server(_)
        | ShardError::Refused(_)
        | ShardError::Hung(_)
        | ShardError::Request(_)
        | ShardError::Empty
        | ShardError::Answer(_)
        | ShardError::Capacity { .. }
        | ShardError::Prompt { .. }
        | ShardError::Unsupported(_) => (StatusCode::FAILED_DEPENDENCY, "generation"),
    }
}

impl From<Unavailable> for ApiError {
    fn from(error: Unavailable) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self { status, error_type: "unavailable", message: error.to_string() }
    }
}

impl From<TermsError> for ApiError {
    fn from(error: TermsError) -> Self {
        // As of a body: what cannot be read is told from what does not fit.
        let status = match &error {
            TermsError::NoNumber { .. } => StatusCode::BAD_REQUEST,
            TermsError::Range { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self { status, error_type: "validation", message: error.to_string() }
    }
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let (status, error_type) = match &error {
            AdapterError::Forbidden => (StatusCode::FORBIDDEN, "adapters_forbidden"),
            AdapterError::Unsupported => (StatusCode::NOT_IMPLEMENTED, "adapters_unsupported"),
            // What is taken is no conflict to vLLM, whose clients look for this status.
            AdapterError::EmptyName
            | AdapterError::LongName(_)
            | AdapterError::Name(_)
            | AdapterError::BaseModel(_)
            | AdapterError::Taken(_)
            | AdapterError::Path(_) => (StatusCode::BAD_REQUEST, "validation"),
            AdapterError::Unknown(_) => (StatusCode::NOT_FOUND, "adapter_not_found"),
            AdapterError::Refused { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "adapter_refused"),
            AdapterError::Shard { .. } => (StatusCode::FAILED_DEPENDENCY, "adapter_not_loaded"),
        };
        Self { status, error_type, message: error.to_string() }
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        let status = match &error {
            BodyError::ContentType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            BodyError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            BodyError::Unreadable(_) | BodyError::Syntax(_) => StatusCode::BAD_REQUEST,
            BodyError::Data { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self { status, error_type: "validation", message: error.to_string() }
    }
}

/// Answer of the health check: probes read the status code, programs `status`, people the reason.
pub(super) fn health(health: Result<(), Unavailable>) -> Response {
    let Err(Unavailable { status, reason }) = health else { return StatusCode::OK.into_response() };
    let body = json!({
        "error": "unhealthy", "error_type": "healthcheck", "status": status.to_string(), "reason": reason,
    });
    answer(StatusCode::SERVICE_UNAVAILABLE, body)
}

/// The API key is missing or wrong.
pub(super) fn unauthorized() -> Response {
    StatusCode::UNAUTHORIZED.into_response()
}

/// A handler has panicked; its message is for the log.
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str);
    let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    tracing::error!("a request handler panicked: {message}");
    let error = ApiError {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        error_type: "internal",
        message: "Internal error".to_owned(),
    };
    error.into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::adapters::Adapters;
    use crate::batching::Stopped;
    use crate::chat::template::TemplateError;
    use crate::request::validate::ValidationError;

    #[track_caller]
    fn check(error: impl Into<ApiError>, status: u16, error_type: &str, message: &str) {
        let error = error.into();
        assert_eq!((error.status.as_u16(), error.error_type), (status, error_type));
        assert_eq!(error.message, message);
    }

    #[test]
    fn every_failure_has_its_status_type_and_prefix() {
        let validation = InferError::Validation(ValidationError::EmptyInputs);
        check(validation, 422, "validation", "Input validation error: `inputs` is empty");
        check(InferError::Overloaded, 429, "overloaded", "Model is overloaded");
        let shard = InferError::Shard(ShardError::Server("oops".to_owned()));
        check(shard, 424, "generation", "Request failed during generation: Server error: oops");
        let deadline = InferError::Shard(ShardError::Deadline(Duration::from_millis(1500)));
        let late =
            "Request failed during generation: the request did not end within the 1.5 s that it was given";
        check(deadline, 504, "timeout", late);
        let abandoned = InferError::Shard(ShardError::Abandoned("gone".to_owned()));
        let gone = "Request failed during generation: the model server has failed for good: gone";
        check(abandoned, 503, "unavailable", gone);
        let poisonous = InferError::Shard(ShardError::Poisonous("dead".to_owned()));
        let dead = "Request failed during generation: the model server failed twice while it computed this request: dead";
        check(poisonous, 500, "poisonous_request", dead);
        let stopped = "Request failed during generation: the batcher has stopped";
        check(InferError::Stopped(Stopped), 503, "generation", stopped);
        check(InferError::Incomplete, 500, "incomplete_generation", "Incomplete generation");
        let template = InferError::Template(TemplateError::Render("no".to_owned()));
        check(template, 422, "template_error", "Template error: no");
        let tools = "Tool error: Grammar and tools are mutually exclusive";
        check(InferError::GrammarWithTools, 422, "tool_error", tools);
        let adapter = "`adapter_id` is `x`, but no adapter of this name is loaded";
        let unknown = Adapters::fixed(&[]).unknown("adapter_id", "x");
        check(InferError::UnknownAdapter(unknown), 404, "adapter_not_found", adapter);
    }

    #[test]
    fn what_is_refused_for_the_moment_says_when_to_come_again() {
        let retry = |error: InferError| {
            let response = ApiError::from(error).into_response();
            response.headers().get(RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(retry(InferError::Overloaded).as_deref(), Some("1"));
        assert_eq!(retry(InferError::ShuttingDown).as_deref(), Some("1"));
        assert_eq!(retry(InferError::Incomplete), None);
    }

    #[test]
    fn events_have_the_shape_of_their_api() {
        let error = ApiError::from(InferError::Overloaded);
        let native = json!({"error": "Model is overloaded", "error_type": "overloaded"});
        assert_eq!(error.event(Dialect::Native), native);
        let openai = json!({"error": {"message": "Model is overloaded", "http_status_code": 429}});
        assert_eq!(error.event(Dialect::OpenAi), openai);
        let late = ApiError::from(InferError::Shard(ShardError::Deadline(Duration::from_secs(2))));
        assert_eq!(late.event(Dialect::OpenAi)["error"]["http_status_code"], 504);
        assert_eq!(late.event(Dialect::Native)["error_type"], "timeout");
        let incomplete = ApiError::from(InferError::Incomplete).event(Dialect::Native);
        assert_eq!(incomplete["error_type"], "incomplete_generation_stream");
    }
}
