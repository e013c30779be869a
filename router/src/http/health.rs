//! Probes, `/info` and `/metrics`.

use axum::Json;
use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::State;
use super::error::ApiError;

type Shared = extract::State<State>;

/// 200 while requests are computed. Also `/ping`, GET `/` and `/readyz`.
pub(super) async fn health(extract::State(state): Shared) -> Result<(), ApiError> {
    let status = state.engine.status();
    let status = status.borrow();
    if status.is_ready && !status.is_draining { Ok(()) } else { Err(ApiError::unhealthy()) }
}

/// 200 as long as this process answers.
pub(super) async fn livez() {}

/// 200 once the first start is over; the phase in words. While the server drains it says so first.
pub(super) async fn startupz(extract::State(state): Shared) -> (StatusCode, Json<Phase>) {
    let status = state.engine.status();
    let status = status.borrow();
    let code = if status.was_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let detail = &status.detail;
    let phase = if status.is_draining { format!("draining; {detail}") } else { detail.clone() };
    (code, Json(Phase { phase, generation: status.generation, epoch: status.epoch }))
}

/// The answer of `/startupz`.
#[derive(Debug, Serialize)]
pub(super) struct Phase {
    phase: String,
    generation: u64,
    epoch: u64,
}

/// TGI's `/info`.
#[derive(Debug, Serialize)]
pub(super) struct Info {
    model_id: String,
    model_sha: Option<String>,
    model_pipeline_tag: Option<String>,
    model_dtype: String,
    model_device_type: String,
    max_concurrent_requests: usize,
    max_best_of: usize,
    max_stop_sequences: usize,
    max_input_tokens: usize,
    max_total_tokens: usize,
    validation_workers: usize,
    max_client_batch_size: usize,
    router: &'static str,
    version: &'static str,
    sha: Option<String>,
    docker_label: Option<String>,
}

/// The model and its limits.
pub(super) async fn info(extract::State(state): Shared) -> Result<Json<Info>, ApiError> {
    let model = state.model().ok_or_else(ApiError::not_ready)?;
    let config = &state.config;
    Ok(Json(Info {
        model_id: config.model_id.clone(),
        model_sha: config.revision.clone(),
        model_pipeline_tag: None,
        model_dtype: model.dtype.clone(),
        model_device_type: model.device.clone(),
        max_concurrent_requests: config.max_concurrent_requests,
        max_best_of: 1,
        max_stop_sequences: config.max_stop_sequences,
        max_input_tokens: model.max_input_tokens,
        max_total_tokens: model.max_total_tokens,
        validation_workers: config.validation_workers,
        max_client_batch_size: 1,
        router: "text-generation-router",
        version: env!("CARGO_PKG_VERSION"),
        sha: None,
        docker_label: None,
    }))
}

/// In the text format of Prometheus.
pub(super) async fn metrics(extract::State(state): Shared) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.config.metrics.text()).into_response()
}
