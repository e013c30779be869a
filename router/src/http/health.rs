//! Probes, `/info` and `/metrics`.

use axum::Json;
use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::State;
use super::error::{ApiError, ErrorBody};

type Shared = extract::State<State>;

/// Whether requests are computed
#[utoipa::path(get, path = "/health", tag = super::docs::TAG,
    responses((status = 200, description = "Everything is working fine"), (status = 503, body = ErrorBody)))]
pub(super) async fn health(extract::State(state): Shared) -> Result<(), ApiError> {
    let status = state.engine.status();
    let status = status.borrow();
    if status.is_ready && !status.is_draining { Ok(()) } else { Err(ApiError::unhealthy()) }
}

/// The same as `/health`
#[utoipa::path(get, path = "/ping", tag = super::docs::TAG, responses((status = 200), (status = 503, body = ErrorBody)))]
pub(super) async fn ping(state: extract::State<State>) -> Result<(), ApiError> {
    health(state).await
}

/// The same as `/health`
#[utoipa::path(get, path = "/readyz", tag = super::docs::TAG, responses((status = 200), (status = 503, body = ErrorBody)))]
pub(super) async fn readyz(state: extract::State<State>) -> Result<(), ApiError> {
    health(state).await
}

/// Whether this process answers
#[utoipa::path(get, path = "/livez", tag = super::docs::TAG, responses((status = 200)))]
pub(super) async fn livez() {}

/// Whether the first start is over; what the server does, in words
#[utoipa::path(get, path = "/startupz", tag = super::docs::TAG, responses((status = 200, body = Phase), (status = 503, body = Phase)))]
pub(super) async fn startupz(extract::State(state): Shared) -> (StatusCode, Json<Phase>) {
    let status = state.engine.status();
    let status = status.borrow();
    let code = if status.was_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let detail = &status.detail;
    let phase = if status.is_draining { format!("draining; {detail}") } else { detail.clone() };
    (code, Json(Phase { phase, generation: status.generation, epoch: status.epoch }))
}

/// The answer of `/startupz`.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Phase {
    phase: String,
    generation: u64,
    epoch: u64,
}

/// TGI's `/info`.
#[derive(Debug, Serialize, ToSchema)]
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
    sha: Option<&'static str>,
    docker_label: Option<String>,
}

/// The model and its limits
#[utoipa::path(get, path = "/info", tag = super::docs::TAG, responses((status = 200, body = Info), (status = 503, body = ErrorBody)))]
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
        max_best_of: config.max_best_of,
        max_stop_sequences: config.max_stop_sequences,
        max_input_tokens: model.max_input_tokens,
        max_total_tokens: model.max_total_tokens,
        validation_workers: config.validation_workers,
        max_client_batch_size: config.max_client_batch_size,
        router: "text-generation-router",
        version: env!("CARGO_PKG_VERSION"),
        sha: config.commit,
        docker_label: None,
    }))
}

/// Metrics in the text format of Prometheus
#[utoipa::path(get, path = "/metrics", tag = super::docs::TAG, responses((status = 200, body = String)))]
pub(super) async fn metrics(extract::State(state): Shared) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.config.metrics.text()).into_response()
}
