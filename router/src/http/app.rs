//! The routes, and what holds for all of them: limits of a body, panics, rejections as JSON, CORS.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::FutureExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tracing::error;

use super::error::ApiError;
use super::{State, generate, health};

/// A client has so long to send the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// All routes.
pub(super) fn router(state: State) -> Router {
    let cors = state.clone();
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
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "internal error").into_response()
        }
    }
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
pub(super) async fn json_body(state: &State, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if !(essence == "application/json" || essence.starts_with("application/") && essence.ends_with("+json")) {
        let text = "expected `Content-Type: application/json`";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", text));
    }
    let limit = state.config.payload_limit;
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await;
    match collected {
        Err(_) => {
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body did not arrive in 30 seconds"))
        }
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => {
            let text = format!("the body is longer than {limit} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", text))
        }
        Ok(Err(_)) => Err(ApiError::new(StatusCode::BAD_REQUEST, "bad_request", "the body is incomplete")),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
    }
}
