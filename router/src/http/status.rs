//! What operators ask: health, served model and limits, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use serde::Serialize;

use super::{App, error};
use crate::availability::Unavailable;

/// Answer of `/info`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Info {
    pub(crate) model_id: String,
    pub(crate) model_sha: Option<String>,
    pub(crate) model_pipeline_tag: Option<String>,
    pub(crate) max_concurrent_requests: usize,
    pub(crate) max_best_of: u32,
    pub(crate) max_stop_sequences: u32,
    pub(crate) max_input_tokens: u32,
    pub(crate) max_total_tokens: u32,
    pub(crate) validation_workers: usize,
    pub(crate) max_client_batch_size: u32,
    pub(crate) router: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha: &'static str,
    pub(crate) docker_label: Option<&'static str>,
}

impl Info {
    /// Whether the model is one that continues texts, as far as is known.
    pub(super) fn continues_text(&self) -> bool {
        self.model_pipeline_tag.as_deref().is_none_or(|tag| tag == "text-generation")
    }

    /// What OpenAI's answers call the build that made them.
    pub(super) fn fingerprint(&self) -> String {
        format!("{}-{}", self.version, self.docker_label.unwrap_or("native"))
    }
}

pub(super) async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.info.clone())
}

/// Takes no permit and asks nobody: the answer comes at once, under overload too.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    error::health(match app.infer.is_alive() {
        true => app.availability.check(),
        false => Err(Unavailable::unhealthy("the batcher has stopped".to_owned())),
    })
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], app.metrics.render()).into_response()
}
