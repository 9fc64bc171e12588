//! Errors as clients see them: the only place that knows status codes, for plain answers and for events in a stream.

use std::any::Any;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;
use serde_json::json;

use super::body::BodyError;
use crate::adapters::AdapterError;
use crate::infer::InferError;
use crate::request::params::Dialect;

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
        (self.status, Json(body)).into_response()
    }
}

impl From<InferError> for ApiError {
    fn from(error: InferError) -> Self {
        let (status, error_type) = match &error {
            InferError::Validation(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            InferError::Overloaded => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            InferError::Shard(_) => (StatusCode::FAILED_DEPENDENCY, "generation"),
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

/// The health check has failed; probes read the status, people the reason.
pub(super) fn unhealthy(reason: &str) -> Response {
    let body = json!({ "error": "unhealthy", "error_type": "healthcheck", "reason": reason });
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
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
    use super::*;
    use crate::adapters::Adapters;
    use crate::batching::Stopped;
    use crate::chat::template::TemplateError;
    use crate::request::validate::ValidationError;
    use crate::shards::ShardError;

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
    fn events_have_the_shape_of_their_api() {
        let error = ApiError::from(InferError::Overloaded);
        let native = json!({"error": "Model is overloaded", "error_type": "overloaded"});
        assert_eq!(error.event(Dialect::Native), native);
        let openai = json!({"error": {"message": "Model is overloaded", "http_status_code": 429}});
        assert_eq!(error.event(Dialect::OpenAi), openai);
        let incomplete = ApiError::from(InferError::Incomplete).event(Dialect::Native);
        assert_eq!(incomplete["error_type"], "incomplete_generation_stream");
    }
}
