//! The routes, and what holds for all of them: keys, names of requests, panics, rejections as JSON, CORS.

use std::panic::AssertUnwindSafe;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::FutureExt;
use tower::ServiceExt;
use tracing::error;

use super::error::ApiError;
use super::openai::{chat, completions, models};
use super::{State, docs, entry, generate, health, page, platforms, tokenize};

/// The routes that need no key: probes ask them.
pub(super) const PROBES: [&str; 5] = ["/health", "/ping", "/livez", "/readyz", "/startupz"];

/// The routes that generate, tokenize or render.
const WORKING: [&str; 9] = [
    "/",
    "/generate",
    "/generate_stream",
    "/v1/chat/completions",
    "/v1/completions",
    "/invocations",
    "/vertex",
    "/tokenize",
    "/chat_tokenize",
];

/// What traces call the route of a path.
pub(super) fn route_name(path: &str) -> &'static str {
    WORKING.into_iter().find(|route| *route == path).unwrap_or("infer")
}

/// All routes, and what is around each. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct App {
    state: State,
    routes: Router,
}

impl App {
    pub fn new(state: State) -> Self {
        Self { routes: routes(state.clone()), state }
    }
}

fn routes(state: State) -> Router {
    let version = "/v2/models/{model_name}/versions/{model_version}";
    Router::new()
        .route("/", get(page::root).post(generate::compat_generate))
        .route("/generate", post(generate::generate))
        .route("/generate_stream", post(generate::generate_stream))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/chat_tokenize", post(tokenize::chat_tokenize))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::one))
        .route("/invocations", post(platforms::invocations))
        .route("/vertex", post(platforms::vertex))
        .route("/v2", get(platforms::server_metadata))
        .route("/v2/health/live", get(platforms::live))
        .route("/v2/health/ready", get(platforms::ready))
        .route(version, get(platforms::model_metadata))
        .route(&format!("{version}/ready"), get(platforms::model_ready))
        .route(&format!("{version}/infer"), post(platforms::infer))
        .route("/health", get(health::health))
        .route("/ping", get(health::ping))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/info", get(health::info))
        .route("/metrics", get(health::metrics))
        .route("/docs", get(docs::redirect))
        .route("/docs/", get(docs::page))
        .route("/docs/{file}", get(docs::file))
        .route("/api-doc/openapi.json", get(docs::json))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(state)
}

async fn no_such_route() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such route")
}

async fn no_such_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this route has no such method")
}

impl App {
    /// Answers a request, and does what is done around every handler. No layer of the router's own: each of these would
    /// take two allocations and a virtual call for every request.
    pub async fn answer(self, mut request: Request) -> Response {
        let Self { state, routes } = self;
        let id = entry::name(&mut request);
        let origin = request.headers().get(header::ORIGIN).cloned();
        let is_preflight = request.method() == Method::OPTIONS
            && origin.is_some()
            && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        let speaks_openai = request.uri().path().starts_with("/v1/");
        let mut response =
            if is_preflight { StatusCode::OK.into_response() } else { run(&state, routes, request).await };
        if speaks_openai && let Some(error) = response.extensions_mut().remove::<ApiError>() {
            let allow = response.headers_mut().remove(header::ALLOW);
            response = error.for_openai().into_response();
            response.headers_mut().extend(allow.map(|allow| (header::ALLOW, allow)));
        }
        let headers = response.headers_mut();
        // While the server ends, a client is not to send its next request here.
        if state.engine.is_draining() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Ok(id) = HeaderValue::try_from(id.0) {
            headers.insert(HeaderName::from_static("x-request-id"), id);
        }
        if let Some(origin) = origin {
            allow(&state, origin, is_preflight, &mut response);
        }
        response
    }
}

/// Asks for the key, and calls the handler. One that panics fails its own request.
async fn run(state: &State, routes: Router, mut request: Request) -> Response {
    let path = request.uri().path();
    // The page holds no secret, and asks for the key itself.
    let is_open = PROBES.contains(&path) || page::is_asked_for(&request);
    match state.config.api_keys.check(request.headers()) {
        Ok(namespace) => drop(request.extensions_mut().insert(namespace)),
        Err(_) if is_open => {}
        Err(error) => return error.into_response(),
    }
    match AssertUnwindSafe(routes.oneshot(request)).catch_unwind().await {
        Ok(response) => response.unwrap_or_else(|never| match never {}),
        Err(_) => {
            error!("a handler panicked");
            ApiError::internal("internal error").into_response()
        }
    }
}

/// What a browser asks before it calls, and is told after. Methods GET and POST, as in TGI.
fn allow(state: &State, origin: HeaderValue, is_preflight: bool, response: &mut Response) {
    let allowed = &state.config.cors_allow_origin;
    let answer = if allowed.is_empty() {
        HeaderValue::from_static("*")
    } else if allowed.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()) {
        origin
    } else {
        return;
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, answer);
    headers.insert(header::VARY, HeaderValue::from_static("origin"));
    if is_preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET,POST"));
        let allowed = HeaderValue::from_static("content-type,authorization,x-request-id");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    }
}
