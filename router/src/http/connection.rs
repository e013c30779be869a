//! Connections: accepted, bounded in time and size, and closed in order.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::Body;
use axum::http::{StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use futures::future::BoxFuture;
use hyper::Request;
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::Deadlines;
use super::app::App;
use super::error::ApiError;
use super::wire::{Head, MAX_HEAD_BYTES, Wire, has_content_length};

const MAX_HEADERS: usize = 100;
/// Until the next try, when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Failures to accept with less than this between them are one episode, and one pair of lines in the log.
const EPISODE: Duration = Duration::from_secs(10);

/// Failures to accept.
#[derive(Default)]
struct Episode {
    /// Of the present one; zero: there is none.
    failures: u64,
    last: Option<Instant>,
}

impl Episode {
    fn failed(&mut self, error: &io::Error) {
        if self.failures == 0 {
            warn!(%error, "connections cannot be accepted; connections that wait for a request are closed");
        }
        self.failures += 1;
        self.last = Some(Instant::now());
    }

    /// Resolves when a present episode is over.
    async fn over(&self) {
        match self.last.filter(|_| self.failures > 0) {
            Some(last) => tokio::time::sleep_until(last + EPISODE).await,
            None => std::future::pending().await,
        }
    }

    fn end(&mut self) {
        warn!(failures = self.failures, "connections are accepted again");
        *self = Self::default();
    }
}

/// The open connections, to close one of when there is no room for another.
#[derive(Clone, Debug, Default)]
struct Connections(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    last: u64,
    connections: HashMap<u64, (Head, Arc<Notify>)>,
}

impl Connections {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().expect("nothing panics while it holds the lock")
    }

    /// Takes a connection in until its guard is dropped. The second of the pair asks it to close.
    fn insert(&self, head: Head) -> (Guard, Arc<Notify>) {
        let close = Arc::new(Notify::new());
        let mut open = self.open();
        open.last += 1;
        let number = open.last;
        open.connections.insert(number, (head, Arc::clone(&close)));
        (Guard { connections: self.clone(), number }, close)
    }

    /// Asks the connection that has waited longest for its next request to close. None is asked twice.
    fn close_oldest_idle(&self) {
        let mut open = self.open();
        let idle = open.connections.iter().filter_map(|(number, (head, _))| Some((head.idle_since()?, *number)));
        if let Some((_, number)) = idle.min()
            && let Some((_, close)) = open.connections.remove(&number)
        {
            close.notify_one();
        }
    }
}

struct Guard {
    connections: Connections,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.connections.open().connections.remove(&self.number);
    }
}

/// Serves connections until `shutdown`; then no more are accepted, and those that are answering finish.
pub(super) async fn accept(
    listener: TcpListener,
    app: App,
    deadlines: Deadlines,
    mut shutdown: BoxFuture<'static, ()>,
) -> io::Result<()> {
    let (closing, is_closing) = watch::channel(false);
    let (connections, mut episode) = (Connections::default(), Episode::default());
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let served = serve(stream, app.clone(), deadlines, connections.clone(), is_closing.clone());
                    drop(tokio::spawn(served));
                }
                Err(error) => {
                    episode.failed(&error);
                    connections.close_oldest_idle();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            () = episode.over() => episode.end(),
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    drop(is_closing);
    closing.send_replace(true);
    closing.closed().await;
    Ok(())
}

async fn serve(
    stream: TcpStream,
    app: App,
    deadlines: Deadlines,
    connections: Connections,
    mut is_closing: watch::Receiver<bool>,
) {
    // A token that waits for the next one is a token too late.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "no TCP_NODELAY");
    }
    let head = Head::new(&deadlines);
    let (_guard, close) = connections.insert(head.clone());
    let wire = Wire::new(stream, head.clone(), deadlines);
    let service = service_fn(|request: Request<Incoming>| {
        let (app, head) = (app.clone(), head.clone());
        async move { Ok::<_, Infallible>(answer(app, &head, &deadlines, request).await) }
    });
    let connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(wire), service);
    let mut connection = pin!(connection);
    tokio::select! {
        served = &mut connection => return log(served),
        _ = is_closing.wait_for(|is_closing| *is_closing) => {}
        () = close.notified() => {}
    }
    connection.as_mut().graceful_shutdown();
    log(connection.await);
}

async fn answer(app: App, head: &Head, deadlines: &Deadlines, request: Request<Incoming>) -> Response {
    let bytes = head.begin();
    let is_chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
    let is_old = request.version() == Version::HTTP_10;
    let mut response = if is_chunked && has_content_length(&bytes) {
        ApiError::unreadable(StatusCode::BAD_REQUEST).into_response()
    } else {
        app.answer(request.map(Body::new)).await
    };
    // HTTP/1.0 has no chunks: a stream ends with its connection. hyper promises to keep that to who wants it, unless the
    // answer too is of that version.
    if is_old && response.body().size_hint().exact().is_none() {
        *response.version_mut() = Version::HTTP_10;
    }
    head.end(response.status(), deadlines);
    response
}

fn log(served: hyper::Result<()>) {
    if let Err(error) = served {
        debug!(%error, "connection ended");
    }
}
