//! `/v1/models`.

use axum::Json;
use axum::extract::{self, Path};
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::State;
use crate::http::error::{ApiError, ErrorBody};
use crate::request::{Refused, limits};

/// A model that is served.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelInfo {
    id: String,
    /// `model`.
    object: &'static str,
    created: u64,
    owned_by: String,
}

/// All models that are served.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelsInfo {
    /// `list`.
    object: &'static str,
    data: Vec<ModelInfo>,
}

fn served(state: &State) -> ModelInfo {
    let id = state.config.model_id.clone();
    ModelInfo { owned_by: id.clone(), id, object: "model", created: 0 }
}

/// The model that is served
#[utoipa::path(get, path = "/v1/models", tag = crate::http::docs::TAG, responses((status = 200, body = ModelsInfo)))]
pub(in crate::http) async fn list(extract::State(state): extract::State<State>) -> Json<ModelsInfo> {
    Json(ModelsInfo { object: "list", data: vec![served(&state)] })
}

/// One model, by any name that requests may give it; ids may have slashes
#[utoipa::path(get, path = "/v1/models/{model}", tag = crate::http::docs::TAG, params(("model" = String, Path)),
    responses((status = 200, body = ModelInfo), (status = 404, body = ErrorBody)))]
pub(in crate::http) async fn one(
    extract::State(state): extract::State<State>,
    Path(id): Path<String>,
) -> Result<Json<ModelInfo>, ApiError> {
    if limits::names(&id, &state.config.model_id) {
        return Ok(Json(served(&state)));
    }
    Err(Refused::UnknownModel(id.chars().take(100).collect()).into())
}
