//! The description of all routes, generated from their types, and a page that shows it.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use super::openai::{chat, completions, models};
use super::{generate, health, page, platforms, tokenize};

/// Under which all routes stand, as in TGI's description.
pub(super) const TAG: &str = "Text Generation Inference";

#[derive(OpenApi)]
#[openapi(
    paths(
        page::root,
        generate::compat_generate,
        generate::generate,
        generate::generate_stream,
        tokenize::tokenize,
        tokenize::chat_tokenize,
        chat::completions,
        completions::completions,
        models::list,
        models::one,
        platforms::invocations,
        platforms::vertex,
        platforms::server_metadata,
        platforms::live,
        platforms::ready,
        platforms::model_metadata,
        platforms::infer,
        health::health,
        health::livez,
        health::startupz,
        health::info,
        health::metrics,
        health::ping,
        health::readyz,
        platforms::model_ready
    ),
    components(schemas(super::error::OpenAiErrorBody)),
    tags((name = TAG, description = "Generation of text")),
    info(title = "Text Generation Inference", license(name = "Apache 2.0", identifier = "Apache-2.0"),
        description = "The routes of this server. With `--api-key` all but the probes need `Authorization: Bearer KEY`.")
)]
struct Document;

static JSON: LazyLock<String> = LazyLock::new(|| {
    let document = Document::openapi().to_json();
    document.expect("a description of types can always be written")
});

/// GET `/api-doc/openapi.json`.
pub(super) async fn json() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], JSON.as_str()).into_response()
}

/// GET `/docs`.
pub(super) async fn page() -> Response {
    page::html(include_str!("docs.html"))
}
