//! The description of all routes, generated from their types, and Swagger UI to look at it.

use std::sync::{Arc, LazyLock};

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use serde_json::{Map, Value, json};
use utoipa::OpenApi;
use utoipa_swagger_ui::Config;

use super::app::PROBES;
use super::error::ApiError;
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
    let mut document = serde_json::to_value(Document::openapi()).expect("a description of types can always be written");
    describe_errors(&mut document);
    describe_responses(&mut document);
    document.to_string()
});

/// How whatever reads a body may refuse it, or fail.
const OF_BODIES: [&str; 10] = ["400", "401", "408", "413", "415", "422", "424", "429", "500", "503"];

/// Errors are the same on all routes of a family, and the last event of a stream may be one.
fn describe_errors(document: &mut Value) {
    let schema = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    for (path, operations) in document["paths"].as_object_mut().into_iter().flatten() {
        let error = match path.as_str() {
            // What the body is decides.
            "/invocations" => json!({"anyOf": [schema("ErrorBody"), schema("OpenAiErrorBody")]}),
            path if path.starts_with("/v1/") => schema("OpenAiErrorBody"),
            _ => schema("ErrorBody"),
        };
        for (method, operation) in operations.as_object_mut().into_iter().flatten() {
            let Some(responses) = operation["responses"].as_object_mut() else { continue };
            let statuses = match method.as_str() {
                "post" => &OF_BODIES[..],
                _ if PROBES.contains(&path.as_str()) => &[],
                _ => &["401"],
            };
            for status in statuses {
                responses.entry(*status).or_insert_with(|| json!({"content": {"application/json": {}}}));
            }
            for (status, response) in responses.iter_mut() {
                let Some(content) = response.get_mut("content").and_then(Value::as_object_mut) else { continue };
                match content.get_mut("text/event-stream") {
                    Some(event) => event["schema"] = json!({"anyOf": [event["schema"].take(), error]}),
                    // A probe may fail with words of its own.
                    None if status.starts_with(['4', '5']) && !PROBES.contains(&path.as_str()) => {
                        content.insert("application/json".into(), json!({"schema": error}));
                    }
                    None => {}
                }
            }
        }
    }
}

/// OpenAPI wants every response described; those of which there is no more to say are described by their status.
fn describe_responses(document: &mut Value) {
    let paths = document["paths"].as_object_mut().into_iter().flat_map(Map::values_mut);
    let operations = paths.filter_map(Value::as_object_mut).flat_map(Map::values_mut);
    let responses = operations.filter_map(|operation| operation.get_mut("responses")?.as_object_mut());
    for (status, response) in responses.flat_map(Map::iter_mut) {
        let Some(response) = response.as_object_mut().filter(|response| !response.contains_key("$ref")) else {
            continue;
        };
        let reason = StatusCode::from_bytes(status.as_bytes()).ok().and_then(|status| status.canonical_reason());
        response.entry("description").or_insert_with(|| reason.unwrap_or("An answer").into());
    }
}

/// GET `/api-doc/openapi.json`.
pub(super) async fn json() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], JSON.as_str()).into_response()
}

/// The description's place is told from the page's, so that a proxy may have both under any path. No other host is asked
/// whether the description is valid.
static SWAGGER: LazyLock<Arc<Config<'static>>> =
    LazyLock::new(|| Arc::new(Config::from("../api-doc/openapi.json").validator_url("none")));

/// It loads its own files, talks to this server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// GET `/docs`: the page's files lie beside it, as seen from `/docs/`.
pub(super) async fn redirect() -> Redirect {
    Redirect::to("docs/")
}

/// GET `/docs/`.
pub(super) async fn page() -> Result<Response, ApiError> {
    file(Path("index.html".into())).await
}

/// GET `/docs/{file}`: Swagger UI, which this program holds.
pub(super) async fn file(Path(name): Path<String>) -> Result<Response, ApiError> {
    let file = utoipa_swagger_ui::serve(&name, Arc::clone(&SWAGGER)).ok().flatten();
    let file = file.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such file"))?;
    let headers = [
        (header::CONTENT_TYPE, file.content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY.into()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".into()),
    ];
    Ok((headers, file.bytes.into_owned()).into_response())
}
