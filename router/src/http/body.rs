//! The body of a request: within limits of size and time, and JSON.

use std::io::{self, ErrorKind};

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Body as _;

use super::State;
use super::error::ApiError;

/// Characters of a content encoding that are repeated to the client.
const MAX_ENCODING: usize = 40;

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
    if content_type == "application/json" {
        return true;
    }
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
