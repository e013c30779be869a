//! What HTTP costs: requests and events a second of this server, with keys, metrics and traces on, in front of an engine that
//! answers at once; beside a bare axum handler, and a bare stream of the same events, on the same machine.
//!
//! `cargo run --release --example http_cost`

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::routing::post;
use futures::stream;
use mimalloc::MiMalloc;
use text_generation_router::engine::{Engine, FinishReason, Finished, ModelFacts, Output, Status, Submission, Token};
use text_generation_router::http::auth::ApiKeys;
use text_generation_router::http::{self, Config};
use text_generation_router::telemetry::metrics::Exporter;
use text_generation_router::telemetry::traces::Traces;
use text_generation_router::text::tokenizer::Tokenizer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

/// The router's own, for all of them.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Events of one stream.
const NUM_EVENTS: usize = 200;
/// How long each figure is measured.
const MEASURED: Duration = Duration::from_secs(4);
const CLIENTS: usize = 64;

fn output(n: usize, last: usize) -> Output {
    let token = Token { id: 300, text: " word".into(), logprob: -0.5, special: false, top: vec![] };
    let finished = Finished { reason: FinishReason::Length, text: " word".repeat(n + 1), num_tokens: n as u32 + 1 };
    Output { token, finished: (n == last).then_some(finished), started: Some(Instant::now()), prompt: None }
}

async fn answer(submission: Submission) {
    let last = submission.request.max_new_tokens - 1;
    for n in 0..=last {
        if submission.outputs.send(Ok(output(n, last))).await.is_err() {
            return;
        }
    }
}

async fn server() -> SocketAddr {
    let model =
        ModelFacts { vocab_size: 4096, max_input_tokens: 1023, max_total_tokens: 1024, ..ModelFacts::default() };
    let status = Status { is_ready: true, was_ready: true, model: Some(model.into()), ..Status::default() };
    let (sender, mut submissions) = mpsc::channel::<Submission>(1024);
    let (keep, seen) = watch::channel(status);
    std::mem::forget(keep);
    tokio::spawn(async move {
        while let Some(submission) = submissions.recv().await {
            // As the engine does: what there is room for is delivered by its own loop.
            match submission.request.max_new_tokens {
                1 => drop(submission.outputs.try_send(Ok(output(0, 0)))),
                _ => drop(tokio::spawn(answer(submission))),
            }
        }
    });
    let metrics = Exporter::default();
    metrics.install();
    tokio::spawn(metrics.clone().upkeep());
    let config = Config {
        max_concurrent_requests: 1024,
        metrics,
        // Nobody listens there: spans are made and batched, and dropped.
        traces: Traces::to("http://127.0.0.1:9", "cost").unwrap(),
        api_keys: ApiKeys::new(["secret".into()]),
        ..Config::of("m")
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
    let tokenizer = Arc::new(Tokenizer::from_file(&file).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(http::serve(listener, config, Engine::new(sender, 1024, seen), tokenizer, std::future::pending()));
    address
}

/// The least that axum does for such requests: it reads the body and answers as many bytes.
async fn bare(event: &'static str) -> SocketAddr {
    let whole = |_: Bytes| async { ([(header::CONTENT_TYPE, "application/json")], r#"{"generated_text":" word"}"#) };
    let streamed = move |_: Bytes| async move {
        let events =
            stream::iter((0..NUM_EVENTS).map(move |_| Ok::<_, Infallible>(Bytes::from_static(event.as_bytes()))));
        ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events))
    };
    let app = Router::new().route("/generate", post(whole)).route("/generate_stream", post(streamed));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            let service = hyper_util::service::TowerToHyperService::new(app.clone());
            let io = hyper_util::rt::TokioIo::new(connection);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    });
    address
}

/// Asks again and again over one connection; how often the marks came.
async fn client(address: SocketAddr, request: Arc<Vec<u8>>, (mark, end): (&'static [u8], &'static [u8])) -> usize {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let (began, mut count, mut buffer) = (Instant::now(), 0, Vec::with_capacity(64 << 10));
    while began.elapsed() < MEASURED {
        connection.write_all(&request).await.unwrap();
        buffer.clear();
        // Nothing comes after an answer, and a search would cost more where there are more headers.
        while !buffer.ends_with(end) {
            // What may hold the beginning of a mark is kept.
            if buffer.len() > 32 << 10 {
                let seen = buffer.windows(mark.len()).filter(|window| *window == mark).count();
                if seen > 0 {
                    count += seen;
                    buffer.clear();
                }
            }
            assert_ne!(connection.read_buf(&mut buffer).await.unwrap(), 0);
        }
        count += if mark == end { 1 } else { buffer.windows(mark.len()).filter(|window| *window == mark).count() };
    }
    count
}

async fn rate(address: SocketAddr, path: &str, new_tokens: usize, marks: (&'static [u8], &'static [u8])) -> f64 {
    let body = format!(r#"{{"inputs":"The function returns","parameters":{{"max_new_tokens":{new_tokens}}}}}"#);
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n\
         traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let request = Arc::new(request.into_bytes());
    let began = Instant::now();
    let clients = (0..CLIENTS).map(|_| tokio::spawn(client(address, Arc::clone(&request), marks)));
    let counts = futures::future::join_all(clients).await;
    counts.into_iter().map(Result::unwrap).sum::<usize>() as f64 / began.elapsed().as_secs_f64()
}

#[tokio::main]
async fn main() {
    let event = "data: {\"index\":1,\"token\":{\"id\":300,\"text\":\" word\",\"logprob\":-0.5,\"special\":false},\
                 \"generated_text\":null,\"details\":null}\n\n";
    let (ours, bare) = (server().await, bare(event).await);
    for (what, path, new_tokens, marks) in [
        ("requests", "/generate", 1, (&b"generated_text\":\" word\"}"[..], &b"generated_text\":\" word\"}"[..])),
        ("events", "/generate_stream", NUM_EVENTS, (&b"data: "[..], &b"0\r\n\r\n"[..])),
    ] {
        let (mine, theirs) = (rate(ours, path, new_tokens, marks).await, rate(bare, path, new_tokens, marks).await);
        println!("{what}/s: {mine:.0} here, {theirs:.0} bare: {:.2}", mine / theirs);
    }
}
