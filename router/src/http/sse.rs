//! Server-sent events: a stream of tokens as the body of an answer.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::ApiError;
use super::generate::{Request, StreamDetails, TokenJson};
use crate::engine::{Output, Status, TokenStream};

/// An idle stream is told at this interval that it is alive.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// The same while the shards are being replaced.
const KEEP_ALIVE_WHILE_LOST: Duration = Duration::from_secs(1);

/// One event of `/generate_stream`.
#[derive(Debug, Serialize)]
struct Event<'a> {
    index: u32,
    token: TokenJson,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<TokenJson>,
    generated_text: Option<&'a str>,
    details: Option<StreamDetails>,
}

/// `data: `, JSON, and an empty line.
fn data(value: &impl Serialize) -> Bytes {
    let mut line = b"data: ".to_vec();
    serde_json::to_writer(&mut line, value).expect("strings, numbers and lists can always be written");
    line.extend_from_slice(b"\n\n");
    line.into()
}

struct Open {
    tokens: TokenStream,
    request: Request,
    status: watch::Receiver<Status>,
    /// Came before the answer was begun.
    first: Option<Output>,
    index: u32,
    /// When something was last sent.
    sent: Instant,
    is_over: bool,
}

/// The answer that streams these tokens. Dropping its body aborts the sequence.
pub(super) fn response(
    tokens: TokenStream,
    request: Request,
    status: watch::Receiver<Status>,
    first: Option<Output>,
) -> Response {
    let open = Open { tokens, request, status, first, index: 0, sent: Instant::now(), is_over: false };
    let body = Body::from_stream(stream::unfold(open, |mut open| async move {
        let bytes = open.next().await?;
        Some((Ok::<_, Infallible>(bytes), open))
    }));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}

impl Open {
    async fn next(&mut self) -> Option<Bytes> {
        if self.is_over {
            return None;
        }
        if let Some(output) = self.first.take() {
            return Some(self.event(output));
        }
        let bytes = loop {
            let is_ready = self.status.borrow_and_update().is_ready;
            let interval = if is_ready { KEEP_ALIVE } else { KEEP_ALIVE_WHILE_LOST };
            tokio::select! {
                biased;
                output = self.tokens.next() => break self.bytes(output),
                () = tokio::time::sleep_until(self.sent + interval) => break Bytes::from_static(b":\n\n"),
                // The interval may have become another; a driver that is gone closes the stream too.
                changed = self.status.changed() => if changed.is_err() {
                    let output = self.tokens.next().await;
                    break self.bytes(output);
                },
            }
        };
        self.sent = Instant::now();
        Some(bytes)
    }

    fn bytes(&mut self, output: Option<Result<Output, crate::engine::GenerateError>>) -> Bytes {
        let error = match output {
            Some(Ok(output)) => return self.event(output),
            Some(Err(error)) => ApiError::from(error),
            None => ApiError::incomplete_stream(),
        };
        self.is_over = true;
        self.request.failed(&error);
        data(error.body())
    }

    fn event(&mut self, output: Output) -> Bytes {
        self.index += 1;
        self.request.saw(&output);
        let finished = output.finished.as_ref();
        let text = finished.map(|finished| self.request.full_text(&finished.text));
        let event = Event {
            index: self.index,
            top_tokens: output.token.top.iter().map(TokenJson::from).collect(),
            token: TokenJson::from(&output.token),
            generated_text: text.as_deref(),
            details: finished
                .filter(|_| self.request.wire.details)
                .map(|finished| self.request.stream_details(finished)),
        };
        let bytes = data(&event);
        if let Some(finished) = finished {
            self.is_over = true;
            self.request.succeeded(finished);
        }
        bytes
    }
}
