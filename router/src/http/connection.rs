//! Connections: accepted, bounded in time and size, and closed in order.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::future::BoxFuture;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::Deadlines;
use super::error::ApiError;
use super::wire::{Head, MAX_HEAD_BYTES, Wire, has_content_length};

const MAX_HEADERS: usize = 100;
/// What to do when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until `shutdown`; then no more are accepted, and those that are answering finish.
pub(super) async fn accept(
    listener: TcpListener,
    app: Router,
    deadlines: Deadlines,
    mut shutdown: BoxFuture<'static, ()>,
) -> io::Result<()> {
    let (closing, is_closing) = watch::channel(false);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::spawn(serve(stream, app.clone(), deadlines, is_closing.clone()))),
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    drop(is_closing);
    closing.send_replace(true);
    closing.closed().await;
    Ok(())
}

async fn serve(stream: TcpStream, app: Router, deadlines: Deadlines, mut is_closing: watch::Receiver<bool>) {
    // A token that waits for the next one is a token too late.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "no TCP_NODELAY");
    }
    let head = Head::new(&deadlines);
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
        _ = is_closing.wait_for(|is_closing| *is_closing) => connection.as_mut().graceful_shutdown(),
    }
    log(connection.await);
}

async fn answer(app: Router, head: &Head, deadlines: &Deadlines, request: Request<Incoming>) -> Response {
    let bytes = head.begin();
    let is_chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
    let response = if is_chunked && has_content_length(&bytes) {
        ApiError::unreadable(StatusCode::BAD_REQUEST).into_response()
    } else {
        app.oneshot(request.map(Body::new)).await.unwrap_or_else(|never| match never {})
    };
    head.end(response.status(), deadlines);
    response
}

fn log(served: hyper::Result<()>) {
    if let Err(error) = served {
        debug!(%error, "connection ended");
    }
}
