//! Server-sent events: streams of tokens as the body of an answer.

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

use super::State;
use super::error::ApiError;
use super::streams::{Next, Streams};
use super::ticket::Flight;
use crate::engine::{FinishReason, Output, Status};

/// An idle stream is told at this interval that it is alive while the shards are being replaced.
const COMMENT_WHILE_LOST: Duration = Duration::from_secs(1);

/// Writes the events of one family of routes.
pub(super) trait Frames: Send + 'static {
    /// A token of one of the sequences; it may be told later.
    fn output(&mut self, index: usize, output: Output, flight: &Flight, out: &mut Events);
    /// All sequences have ended well.
    fn end(&mut self, flight: &Flight, out: &mut Events);
    /// The stream ends with an error.
    fn error(&self, error: &ApiError, out: &mut Events);
}

/// Events to be sent.
#[derive(Debug, Default)]
pub(super) struct Events(Vec<u8>);

impl Events {
    /// `data: `, JSON, and an empty line.
    pub fn data(&mut self, value: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, value).expect("strings, numbers and lists can always be written");
        self.0.extend_from_slice(b"\n\n");
    }

    /// What `OpenAI`'s streams end with.
    pub fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }
}

struct Open<F> {
    streams: Streams,
    flight: Flight,
    status: watch::Receiver<Status>,
    frames: F,
    /// Came before the answer was begun.
    first: Option<(usize, Output)>,
    num_tokens: usize,
    /// Of the sequence that ended last.
    reason: FinishReason,
    /// When something was last sent, or the request came.
    sent: Instant,
    /// After so long without anything to send a comment is.
    comment: Duration,
    is_over: bool,
}

/// A stream answers 200 with its first token, so that a request which is refused in the queue gets its true status. When
/// nothing comes for long, or the shards are lost, the client is better told that it is waited for: by the head of the
/// answer and a comment, since many clients count the time between bytes of the body. Dropping the body aborts the sequences.
pub(super) async fn respond<F: Frames>(
    state: &State,
    mut flight: Flight,
    mut streams: Streams,
    frames: F,
) -> Result<Response, ApiError> {
    let mut status = state.engine.status();
    let (begun, comment) = (Instant::now(), state.config.deadlines.comment);
    let first = match first_output(&mut streams, &mut status, begun + comment).await {
        Ok(first) => first,
        Err(error) => {
            flight.failed(&error);
            return Err(error);
        }
    };
    let headers = flight.headers(None);
    let reason = FinishReason::Length;
    let open =
        Open { streams, flight, status, frames, first, num_tokens: 0, reason, sent: begun, comment, is_over: false };
    let body = Body::from_stream(stream::unfold(open, |mut open| async move {
        let bytes = open.next().await?;
        Some((Ok::<_, Infallible>(bytes), open))
    }));
    let own = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((own, headers, body).into_response())
}

/// `None`: nothing has come yet.
async fn first_output(
    streams: &mut Streams,
    status: &mut watch::Receiver<Status>,
    until: Instant,
) -> Result<Option<(usize, Output)>, ApiError> {
    loop {
        let is_ready = status.borrow_and_update().is_ready;
        tokio::select! {
            biased;
            next = streams.next() => return match next {
                Next::Output(n, output) => Ok(Some((n, output))),
                Next::Failed(error) => Err(error.into()),
                Next::Incomplete | Next::Over => Err(ApiError::incomplete_stream()),
            },
            () = tokio::time::sleep_until(until) => return Ok(None),
            () = std::future::ready(()), if !is_ready => return Ok(None),
            changed = status.changed() => if changed.is_err() { return Ok(None) },
        }
    }
}

impl<F: Frames> Open<F> {
    async fn next(&mut self) -> Option<Bytes> {
        if self.is_over {
            return None;
        }
        let mut events = Events::default();
        if let Some((n, output)) = self.first.take() {
            self.output(n, output, &mut events);
        }
        // A token may be held back, to be told with a later one.
        while events.0.is_empty() && !self.is_over {
            let is_ready = self.status.borrow_and_update().is_ready;
            let interval = if is_ready { self.comment } else { COMMENT_WHILE_LOST };
            tokio::select! {
                biased;
                next = self.streams.next() => self.take(next, &mut events),
                () = tokio::time::sleep_until(self.sent + interval) => events.0.extend_from_slice(b":\n\n"),
                // The interval may have become another; a driver that is gone closes the stream too.
                changed = self.status.changed() => if changed.is_err() {
                    let next = self.streams.next().await;
                    self.take(next, &mut events);
                },
            }
        }
        self.sent = Instant::now();
        Some(events.0.into())
    }

    fn take(&mut self, next: Next, events: &mut Events) {
        let error = match next {
            Next::Output(n, output) => return self.output(n, output, events),
            Next::Over => {
                self.is_over = true;
                self.frames.end(&self.flight, events);
                return self.flight.succeeded(self.num_tokens, self.reason);
            }
            Next::Failed(error) => ApiError::from(error),
            Next::Incomplete => ApiError::incomplete_stream(),
        };
        self.is_over = true;
        self.flight.failed(&error);
        self.frames.error(&error, events);
    }

    fn output(&mut self, n: usize, output: Output, events: &mut Events) {
        self.flight.saw(&output);
        self.num_tokens += 1;
        if let Some(finished) = &output.finished {
            self.reason = finished.reason;
        }
        self.frames.output(n, output, &self.flight, events);
        // The last token says that it is the last, and nothing is waited for after it.
        if self.streams.is_over() {
            self.take(Next::Over, events);
        }
    }
}
