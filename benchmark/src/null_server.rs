//! Servers that do nothing, as fast as the libraries allow: what the load generator, and the router, are held against.
//!
//! Streams are hyper with a body of events made in advance; `/generate` is an axum handler that reads and writes JSON.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body as AxumBody;
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, Either};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tower::ServiceExt;

use crate::lifeline::Lifeline;

/// Events made in advance; a longer answer is refused.
const MAX_EVENTS: usize = 8192;
const WORD: &str = " word";

/// Answers at once with events made in advance: the ceiling of the load generator.
#[derive(Clone, Debug, clap::Args)]
pub struct NullServerArgs {
    /// Where to listen; port 0 takes a free one. Printed once it listens.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub address: String,
    /// Sends each event by itself, as a server does that makes one after the other, instead of as many as fit a write.
    #[arg(long)]
    pub flush_each: bool,
    /// Threads that serve.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// How it ends.
    #[command(flatten)]
    pub lifeline: Lifeline,
}

/// Serves until its lifeline ends.
pub fn run(args: &NullServerArgs) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(args.threads as usize).enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(&args.address)
            .await
            .map_err(|error| anyhow::anyhow!("--address {}: {error}; name a free port, or port 0", args.address))?;
        let server = NullServer::new(args.flush_each);
        println!("listening on {}", listener.local_addr()?);
        let server = tokio::spawn(serve(listener, server));
        args.lifeline.ended().await;
        server.abort();
        Ok(())
    })
}

async fn serve(listener: tokio::net::TcpListener, server: NullServer) {
    let server = Arc::new(server);
    loop {
        let Ok((socket, _)) = listener.accept().await else { continue };
        let _ = socket.set_nodelay(true);
        let server = Arc::clone(&server);
        let answer = hyper::service::service_fn(move |request| Arc::clone(&server).answer(request));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(socket), answer);
        tokio::spawn(connection);
    }
}

struct NullServer {
    events: Arc<[Bytes]>,
    flush_each: bool,
    json: Router,
}

#[derive(Deserialize)]
struct StreamRequest {
    parameters: Option<Parameters>,
    max_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct GenerateRequest {
    inputs: String,
    parameters: Parameters,
}

#[derive(Deserialize)]
struct Parameters {
    max_new_tokens: usize,
}

#[derive(Serialize)]
struct GenerateAnswer {
    generated_text: String,
    details: Details,
}

#[derive(Serialize)]
struct Details {
    finish_reason: &'static str,
    generated_tokens: usize,
    seed: Option<u64>,
    input_length: usize,
}

async fn generate(Json(request): Json<GenerateRequest>) -> Json<GenerateAnswer> {
    let generated_tokens = request.parameters.max_new_tokens.min(MAX_EVENTS);
    let input_length = request.inputs.len();
    let details = Details { finish_reason: "length", generated_tokens, seed: None, input_length };
    Json(GenerateAnswer { generated_text: WORD.repeat(generated_tokens), details })
}

impl NullServer {
    fn new(flush_each: bool) -> Self {
        let json = Router::new().route("/generate", post(generate)).route("/health", get(async || ()));
        Self { events: (1..=MAX_EVENTS).map(event).collect(), flush_each, json }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Either<EventBody, AxumBody>>, Infallible> {
        if !matches!(request.uri().path(), "/generate_stream" | "/v1/completions") {
            return Ok(self.json.clone().oneshot(request).await?.map(Either::Right));
        }
        let body = match request.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return Ok(refusal(&error.to_string())),
        };
        let Ok(StreamRequest { parameters, max_tokens }) = serde_json::from_slice(&body) else {
            return Ok(refusal("expected a JSON object with the number of tokens"));
        };
        let (num_events, last) = match (parameters, max_tokens) {
            (Some(Parameters { max_new_tokens }), _) => (max_new_tokens, last_event(max_new_tokens)),
            (None, Some(max_tokens)) => (max_tokens.saturating_add(1), last_chunk(max_tokens)),
            (None, None) => return Ok(refusal("found neither `parameters.max_new_tokens` nor `max_tokens`")),
        };
        if !(1..=MAX_EVENTS).contains(&num_events) {
            return Ok(refusal(&format!("found {num_events} events, expected 1 to {MAX_EVENTS}")));
        }
        let events = EventBody {
            events: Arc::clone(&self.events),
            next: 0,
            end: num_events - 1,
            last: Some(last),
            flush_each: self.flush_each,
            was_flushed: false,
        };
        let mut response = Response::new(Either::Left(events));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        Ok(response)
    }
}

fn refusal(error: &str) -> Response<Either<EventBody, AxumBody>> {
    let body = json!({"error": error, "error_type": "validation"}).to_string();
    let mut response = Response::new(Either::Right(AxumBody::from(body)));
    *response.status_mut() = StatusCode::UNPROCESSABLE_ENTITY;
    response
}

fn event(index: usize) -> Bytes {
    let event = json!({
        "index": index,
        "token": {"id": 1000 + index, "text": WORD, "logprob": -1.25, "special": false},
        "generated_text": null,
        "details": null,
    });
    Bytes::from(format!("data: {event}\n\n"))
}

fn last_event(num_tokens: usize) -> Bytes {
    let event = json!({
        "index": num_tokens,
        "token": {"id": 1000, "text": WORD, "logprob": -1.25, "special": false},
        "generated_text": WORD.repeat(num_tokens.min(MAX_EVENTS)),
        "details": {"finish_reason": "length", "generated_tokens": num_tokens, "seed": null, "input_length": 1},
    });
    Bytes::from(format!("data: {event}\n\n"))
}

fn last_chunk(num_tokens: usize) -> Bytes {
    let chunk = json!({
        "object": "text_completion",
        "choices": [{"index": 0, "text": "", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": num_tokens + 1},
    });
    Bytes::from(format!("data: {chunk}\n\ndata: [DONE]\n\n"))
}

/// `end` events made in advance, then the last.
struct EventBody {
    events: Arc<[Bytes]>,
    next: usize,
    end: usize,
    last: Option<Bytes>,
    flush_each: bool,
    was_flushed: bool,
}

impl Body for EventBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // hyper writes what it has when a body has nothing more for now.
        if self.flush_each && self.next > 0 && !std::mem::replace(&mut self.was_flushed, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.was_flushed = false;
        let event = if self.next < self.end { Some(self.events[self.next].clone()) } else { self.last.take() };
        self.next += 1;
        Poll::Ready(event.map(|event| Ok(Frame::data(event))))
    }
}
