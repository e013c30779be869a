//! The bytes of one connection: the deadlines that hyper does not have, and its own rejections as JSON.
//!
//! hyper answers a head that it cannot read with a bare status line. `Wire` sees such an answer pass and puts the JSON
//! body of every other rejection in. A head that does not come to its end in time is ended by `Wire` in a way that no
//! head may end: hyper rejects it when its turn has come, and the rejection is made a 408. `Wire` also keeps the head of the request that is being read, because hyper forgets one
//! of two contradicting lengths.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::StatusCode;
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::Deadlines;
use super::error::{ApiError, ErrorBody};

/// The most of a head.
pub(super) const MAX_HEAD_BYTES: usize = 64 << 10;
/// What a client that was refused may still be sending is read for so long, and so far: closing at once would reset the
/// connection and take the answer away.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 8 << 20;
/// The end of a head that nobody accepts: no method, path, name or value holds a NUL (RFC 9110, 5.5; RFC 9112).
const BAD_END: &[u8] = b"\0\r\n\r\n";

/// What the connection's two ends, bytes and handlers, know of each other.
#[derive(Clone, Debug)]
pub(super) struct Head(Arc<Mutex<HeadState>>);

#[derive(Debug)]
struct HeadState {
    /// A handler is at work: what is read is a body, and may take as long as the handler allows.
    is_serving: bool,
    /// The head so far, and what came with it.
    bytes: Vec<u8>,
    /// When its first byte must have come, or, once it has, its last.
    deadline: Instant,
    /// The client may still be sending what nobody will read.
    lingers: bool,
    /// When a handler last had its answer, or bytes of one were taken.
    answered: Option<Instant>,
}

impl Head {
    pub fn new(deadlines: &Deadlines) -> Self {
        let deadline = Instant::now() + deadlines.head;
        let state = HeadState { is_serving: false, bytes: vec![], deadline, lingers: false, answered: None };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, HeadState> {
        self.0.lock().expect("nothing panics while it holds the lock")
    }

    /// A handler begins. The head that led to it, with what came after it.
    pub fn begin(&self) -> Vec<u8> {
        let mut state = self.state();
        state.is_serving = true;
        std::mem::take(&mut state.bytes)
    }

    /// Since when the connection waits for another request, as far as can be told: an answer may still be on its way.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        state.answered.filter(|_| !state.is_serving && state.bytes.is_empty())
    }

    /// A handler has its answer.
    pub fn end(&self, status: StatusCode, deadlines: &Deadlines) {
        let mut state = self.state();
        state.is_serving = false;
        state.lingers |= status.is_client_error() || status.is_server_error();
        let now = Instant::now();
        (state.deadline, state.answered) = (now + deadlines.idle, Some(now));
    }
}

/// Whether a head names a length beside chunks: whoever forwarded it may have understood another body.
pub(super) fn has_content_length(head: &[u8]) -> bool {
    let lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end).take_while(|line| !line.is_empty());
    lines.into_iter().any(|line| {
        let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"content-length")
    })
}

/// A stream with deadlines.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    head: Head,
    deadlines: Deadlines,
    head_timer: Pin<Box<Sleep>>,
    /// Runs while the client does not take what is written.
    write_timer: Option<Pin<Box<Sleep>>>,
    /// What is left to write in place of a bare rejection.
    rejection: Option<Bytes>,
    /// The head came too late, and hyper was made to reject it.
    is_late: bool,
    lingering: Option<(Pin<Box<Sleep>>, usize)>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub fn new(stream: S, head: Head, deadlines: Deadlines) -> Self {
        let head_timer = Box::pin(sleep(deadlines.head));
        Self {
            stream,
            head,
            deadlines,
            head_timer,
            write_timer: None,
            rejection: None,
            is_late: false,
            lingering: None,
        }
    }

    fn write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, bytes) {
            Poll::Ready(written) => {
                self.write_timer = None;
                let mut head = self.head.state();
                if !head.is_serving && head.bytes.is_empty() {
                    let now = Instant::now();
                    (head.deadline, head.answered) = (now + self.deadlines.idle, Some(now));
                }
                Poll::Ready(written)
            }
            Poll::Pending => {
                let deadline = self.deadlines.write;
                let timer = self.write_timer.get_or_insert_with(|| Box::pin(sleep(deadline)));
                timer.as_mut().poll(cx).map(|()| Err(late("the client does not read its answer")))
            }
        }
    }

    /// Reads what the client still sends, so that it gets to read its answer.
    fn linger(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (timer, left) = self.lingering.get_or_insert_with(|| (Box::pin(sleep(LINGER)), LINGER_BYTES));
        let mut scratch = [0; 8 << 10];
        loop {
            if *left == 0 || timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut buffer = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => *left = left.saturating_sub(buffer.filled().len()),
                // The client has closed its side, or is gone.
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

fn late(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut wire.stream).poll_read(cx, buf);
        let mut head = wire.head.state();
        if head.is_serving {
            return read;
        }
        if read.is_pending() {
            // Every request moves the deadline, most of the time to a later one. The timer is moved when it has rung: all
            // connections share a lock for that.
            if head.deadline < wire.head_timer.deadline() {
                wire.head_timer.as_mut().reset(head.deadline);
            }
            loop {
                ready!(wire.head_timer.as_mut().poll(cx));
                if head.deadline <= wire.head_timer.deadline() {
                    break;
                }
                wire.head_timer.as_mut().reset(head.deadline);
            }
            if head.bytes.is_empty() || wire.is_late {
                return Poll::Ready(Err(late("the client does not finish its request")));
            }
            wire.is_late = true;
            buf.put_slice(&BAD_END[..BAD_END.len().min(buf.remaining())]);
            return Poll::Ready(Ok(()));
        }
        let new = &buf.filled()[before..];
        if head.bytes.is_empty() && !new.is_empty() {
            head.deadline = Instant::now() + wire.deadlines.head;
        }
        let room = MAX_HEAD_BYTES.saturating_sub(head.bytes.len());
        head.bytes.extend_from_slice(&new[..new.len().min(room)]);
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        if wire.rejection.is_none() {
            let Some(status) = bare_rejection(buf) else { return wire.write(cx, buf) };
            wire.head.state().lingers = true;
            let error = if wire.is_late {
                ApiError::late("head of the request", wire.deadlines.head)
            } else {
                ApiError::unreadable(status)
            };
            wire.rejection = Some(rejection(&error));
        }
        while let Some(mut left) = wire.rejection.take().filter(|left| !left.is_empty()) {
            let written = wire.write(cx, &left);
            if let Poll::Ready(Ok(written)) = &written {
                left.advance(*written);
            }
            wire.rejection = Some(left);
            ready!(written)?;
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        if wire.lingering.is_none() {
            ready!(Pin::new(&mut wire.stream).poll_shutdown(cx))?;
        }
        if wire.head.state().lingers { wire.linger(cx) } else { Poll::Ready(Ok(())) }
    }
}

/// The status of an answer that hyper has made up itself: ours all have a content type.
fn bare_rejection(bytes: &[u8]) -> Option<StatusCode> {
    let rest = bytes.strip_prefix(b"HTTP/1.1 ").or_else(|| bytes.strip_prefix(b"HTTP/1.0 "))?;
    let status = StatusCode::from_bytes(rest.get(..3)?).ok().filter(StatusCode::is_client_error)?;
    let has_type = bytes.windows(13).any(|window| window == b"content-type:");
    (!has_type).then_some(status)
}

fn rejection(error: &ApiError) -> Bytes {
    let status = error.status();
    let ErrorBody { error, error_type } = error.body();
    let body = serde_json::json!({"error": error, "error_type": error_type}).to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
    .into()
}
