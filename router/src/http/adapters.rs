//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: the routes and fields of vLLM.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;

use super::App;
use super::body::Json;
use super::error::ApiError;

#[derive(Debug, Deserialize)]
pub(super) struct LoadRequest {
    lora_name: String,
    lora_path: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct UnloadRequest {
    lora_name: String,
}

pub(super) async fn load(
    State(app): State<Arc<App>>,
    Json(request): Json<LoadRequest>,
) -> Result<String, ApiError> {
    let LoadRequest { lora_name, lora_path } = request;
    app.adapters.load(&lora_name, &lora_path).await?;
    Ok(format!("Success: adapter `{lora_name}` is loaded"))
}

pub(super) async fn unload(
    State(app): State<Arc<App>>,
    Json(request): Json<UnloadRequest>,
) -> Result<String, ApiError> {
    let UnloadRequest { lora_name } = request;
    app.adapters.unload(&lora_name)?;
    Ok(format!("Success: adapter `{lora_name}` is unloaded"))
}
