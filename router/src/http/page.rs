//! The page for people at `/`. Clients that want no HTML get the answer of `/health`, as in TGI.

use axum::extract::{self, Request};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};

use super::State;
use super::error::{ApiError, ErrorBody};
use super::health;

/// All of it: no other file is asked for.
const PAGE: &str = include_str!("page.html");

/// It may run its own scripts and talk to this server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Whether a client says that it takes HTML.
fn takes_html(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|range| range.split(';').next().map(str::trim) == Some("text/html"))
}

/// Whether a request asks for the page.
pub(super) fn is_asked_for(request: &Request) -> bool {
    request.method() == Method::GET && request.uri().path() == "/" && takes_html(request.headers())
}

/// A page to chat with the model, for browsers; for other clients the same as `/health`
#[utoipa::path(get, path = "/", tag = super::docs::TAG,
    responses((status = 200, description = "Everything is working fine"), (status = 503, body = ErrorBody)))]
pub(super) async fn root(state: extract::State<State>, headers: HeaderMap) -> Result<Response, ApiError> {
    if !takes_html(&headers) {
        return health::health(state).await.map(IntoResponse::into_response);
    }
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::VARY, HeaderValue::from_static("accept")),
    ];
    Ok((headers, PAGE).into_response())
}
