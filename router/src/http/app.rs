//! The routes, and what holds for all of them: limits of a body, panics, rejections as JSON, CORS.

use std::io::{self, ErrorKind};
use std::panic::AssertUnwindSafe;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::FutureExt;
use http_body_util::BodyExt;
use hyper::body::Body as _;
use tracing::error;

use super::error::ApiError;
use super::{State, generate, health};

/// Characters of a content encoding that are repeated to the client.
const MAX_ENCODING: usize = 40;

/// All routes.
pub(super) fn router(state: State) -> Router {
    let (cors, draining) = (state.clone(), state.clone());
    Router::new()
        .route("/", get(health::health).post(generate::compat_generate))
        .route("/generate", post(generate::generate))
        .route("/generate_stream", post(generate::generate_stream))
        .route("/health", get(health::health))
        .route("/ping", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::health))
        .route("/startupz", get(health::startupz))
        .route("/info", get(health::info))
        .route("/metrics", get(health::metrics))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn(move |request, next| allow_origins(cors.clone(), request, next)))
        .layer(middleware::from_fn(catch_panics))
        .layer(middleware::from_fn(move |request, next| say_goodbye(draining.clone(), request, next)))
        .with_state(state)
}

async fn no_such_route() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such route")
}

async fn no_such_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this route has no such method")
}

/// A handler that panics fails its own request.
async fn catch_panics(request: Request, next: Next) -> Response {
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            error!("a handler panicked");
            ApiError::internal("internal error").into_response()
        }
    }
}

/// While the server ends, a client is not to send its next request here.
async fn say_goodbye(state: State, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if state.engine.status().borrow().is_draining {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What a browser asks before it calls, and is told after. Methods GET and POST, header `content-type`, as in TGI.
async fn allow_origins(state: State, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let is_preflight = request.method() == Method::OPTIONS
        && origin.is_some()
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if is_preflight { StatusCode::OK.into_response() } else { next.run(request).await };
    let Some(origin) = origin else { return response };
    let allowed = &state.config.cors_allow_origin;
    let answer = if allowed.is_empty() {
        Some(HeaderValue::from_static("*"))
    } else {
        allowed.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()).then_some(origin)
    };
    let headers = response.headers_mut();
    if let Some(answer) = answer {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, answer);
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        if is_preflight {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET,POST"));
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("content-type"));
        }
    }
    response
}

/// The whole body of a JSON request, within the limits of size and time.
pub(super) async fn json_body(state: &State, headers: &HeaderMap, body: Body) -> Result<Vec<u8>, ApiError> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    if !is_json(content_type) {
        return Err(ApiError::unsupported("expected `Content-Type: application/json`, in UTF-8"));
    }
    if let Some(encoding) = content_encoding(headers) {
        let text = format!("`Content-Encoding: {encoding}` is not supported; send the body as it is");
        return Err(ApiError::unsupported(text).closing());
    }
    let (limit, deadline) = (state.config.payload_limit, state.config.deadlines.body);
    let too_large = || {
        let text = format!("the body is longer than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", text).closing()
    };
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(deadline, collect(body, limit)).await {
        Ok(Ok(collected)) => collected.ok_or_else(too_large),
        Ok(Err(error)) => {
            let refused = ApiError::new(StatusCode::BAD_REQUEST, "bad_request", "the body cannot be read").closing();
            Err(if is_gone(&error) { refused.counted("dropped") } else { refused })
        }
        Err(_) => Err(ApiError::late("body", deadline)),
    }
}

/// `None`: it is longer than the limit. The chunks are copied together, as each keeps a whole buffer alive.
async fn collect(mut body: Body, limit: usize) -> Result<Option<Vec<u8>>, axum::Error> {
    let mut collected = vec![];
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if collected.len() + data.len() > limit {
            return Ok(None);
        }
        collected.extend_from_slice(&data);
    }
    Ok(Some(collected))
}

/// Whether a body ended before its end because the client closed the connection.
fn is_gone(error: &axum::Error) -> bool {
    let first: &dyn std::error::Error = error;
    let mut causes = std::iter::successors(Some(first), |cause| cause.source());
    causes.any(|cause| {
        let is_cut = cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_incomplete_message);
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        is_cut || matches!(kind, Some(ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe))
    })
}

/// How the body is encoded, if it is.
fn content_encoding(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(header::CONTENT_ENCODING).iter().map(|value| value.to_str().unwrap_or("unreadable"));
    let mut encodings = values.flat_map(|value| value.split(',')).map(str::trim);
    let found = encodings.find(|encoding| !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity"))?;
    Some(found.chars().take(MAX_ENCODING).collect())
}

fn is_json(content_type: &str) -> bool {
    let content_type = content_type.to_ascii_lowercase();
    let mut parts = content_type.split(';').map(str::trim);
    let essence = parts.next().unwrap_or("");
    let is_json = essence == "application/json" || essence.starts_with("application/") && essence.ends_with("+json");
    let is_utf8 = |part: &str| match part.split_once('=') {
        Some(("charset", charset)) => matches!(charset.trim_matches('"'), "utf-8" | "utf8" | "us-ascii"),
        _ => true,
    };
    is_json && parts.all(is_utf8)
}
