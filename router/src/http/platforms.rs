//! Routes that other people's platforms call: SageMaker, Vertex AI, KServe.

use axum::Json;
use axum::body::Body;
use axum::extract::{self, Path};
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::State;
use super::entry::{Admitted, Entry, Prompt};
use super::error::{ApiError, ErrorBody};
use super::streams::{best_first, collect};
use super::{generate, openai};
use crate::request::native::{CompatGenerateRequest, Delivery};
use crate::request::small::{
    InferenceRequest, Instance, Invocation, VertexRequest, kind_of_invocation, parse_inference, parse_vertex,
};

/// Answer whatever the body is: as `/`, `/v1/chat/completions` or `/v1/completions`
#[utoipa::path(post, path = "/invocations", tag = super::docs::TAG, request_body = CompatGenerateRequest,
    responses((status = 200, description = "As for the route that it is", content(
            (Value = "application/json"), (Value = "text/event-stream"))),
        (status = 404, body = ErrorBody), (status = 422, body = ErrorBody), (status = 424, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub(super) async fn invocations(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| invoke(entry, admitted).boxed()).await
}

async fn invoke(entry: &mut Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    match entry.read(admitted, |body, _| kind_of_invocation(body)).await? {
        Invocation::Generate => generate::answer(entry, admitted, Delivery::AsAsked).await,
        Invocation::Chat => openai::chat::answer(entry, admitted).await.map_err(ApiError::for_openai),
        Invocation::Completion => openai::completions::answer(entry, admitted).await.map_err(ApiError::for_openai),
    }
}

/// Vertex AI's answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VertexResponse {
    predictions: Vec<String>,
}

/// Answer some prompts and chats
#[utoipa::path(post, path = "/vertex", tag = super::docs::TAG, request_body = VertexRequest,
    responses((status = 200, description = "Generated texts", body = VertexResponse), (status = 404, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 424, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn vertex(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| predict(entry, admitted).boxed()).await
}

async fn predict(entry: &mut Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    let mut predictions = vec![];
    for instance in entry.read(admitted, parse_vertex).await? {
        predictions.push(text_of(entry, admitted, instance).await?);
    }
    Ok(Json(VertexResponse { predictions }).into_response())
}

/// The text that answers one instance.
async fn text_of(entry: &mut Entry, admitted: &Admitted, instance: Instance) -> Result<String, ApiError> {
    let (options, prompt, permits) = match instance {
        Instance::Generate(wire) => {
            let permits = entry.permits(wire.options.num_candidates)?;
            let ids = entry.state.pool.encode(wire.inputs.clone(), true).await?;
            (wire.options, Prompt::new(&wire.inputs, ids), permits)
        }
        Instance::Chat(chat) => {
            let permits = entry.permits(chat.options.num_candidates)?;
            let (text, ids) = entry.render(chat.prompting, &chat.options, admitted).await?;
            (chat.options, Prompt::new(&text, ids), permits)
        }
    };
    let (mut flight, streams) = entry.launch(admitted, &options, vec![prompt], permits).await?;
    flight.is_part = true;
    let wholes = best_first(collect(&mut flight, streams).await?);
    entry.go_on(flight);
    Ok(wholes.into_iter().next().map(|whole| whole.finished.text).unwrap_or_default())
}

/// KServe's answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct InferenceResponse {
    id: Option<String>,
    outputs: Vec<OutputTensor>,
}

/// One text, as bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OutputTensor {
    name: String,
    shape: [usize; 2],
    /// `BYTES`.
    datatype: &'static str,
    data: Vec<u8>,
}

/// Answer some prompts
#[utoipa::path(post, path = "/v2/models/{model_name}/versions/{model_version}/infer", tag = super::docs::TAG,
    params(("model_name" = String, Path), ("model_version" = String, Path)), request_body = InferenceRequest,
    responses((status = 200, description = "Generated texts", body = InferenceResponse), (status = 422, body = ErrorBody),
        (status = 424, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn infer(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| infer_all(entry, admitted).boxed()).await
}

async fn infer_all(entry: &mut Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    let inference = entry.read(admitted, parse_inference).await?;
    let mut outputs = vec![];
    for (name, wire) in inference.requests {
        let data = text_of(entry, admitted, Instance::Generate(Box::new(wire))).await?.into_bytes();
        outputs.push(OutputTensor { name, shape: [1, data.len()], datatype: "BYTES", data });
    }
    Ok(Json(InferenceResponse { id: inference.id, outputs }).into_response())
}

/// Whether it lives.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Live {
    live: bool,
}

/// Whether this process answers
#[utoipa::path(get, path = "/v2/health/live", tag = super::docs::TAG, responses((status = 200, body = Live)))]
pub(super) async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// Whether requests are computed
#[utoipa::path(get, path = "/v2/health/ready", tag = super::docs::TAG,
    responses((status = 200, body = Live), (status = 503, body = ErrorBody)))]
pub(super) async fn ready(state: extract::State<State>) -> Result<Json<Live>, ApiError> {
    super::health::health(state).await.map(|()| Json(Live { live: true }))
}

/// Whether requests are computed
#[utoipa::path(get, path = "/v2/models/{model_name}/versions/{model_version}/ready", tag = super::docs::TAG,
    params(("model_name" = String, Path), ("model_version" = String, Path)),
    responses((status = 200, body = Live), (status = 503, body = ErrorBody)))]
pub(super) async fn model_ready(state: extract::State<State>) -> Result<Json<Live>, ApiError> {
    ready(state).await
}

/// What this server is
#[utoipa::path(get, path = "/v2", tag = super::docs::TAG, responses((status = 200, body = Value)))]
pub(super) async fn server_metadata() -> Json<Value> {
    Json(json!({"name": "text-generation-inference", "version": env!("CARGO_PKG_VERSION"), "extensions": []}))
}

/// What the model takes and gives
#[utoipa::path(get, path = "/v2/models/{model_name}/versions/{model_version}", tag = super::docs::TAG,
    params(("model_name" = String, Path), ("model_version" = String, Path)), responses((status = 200, body = Value)))]
pub(super) async fn model_metadata(Path((name, version)): Path<(String, String)>) -> Json<Value> {
    let tensor = |name: &str| json!([{"name": name, "datatype": "BYTES", "shape": [1]}]);
    Json(json!({
        "name": name, "versions": [version], "platform": "text-generation-inference",
        "inputs": tensor("input"), "outputs": tensor("output"),
    }))
}
