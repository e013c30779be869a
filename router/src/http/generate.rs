//! `/generate`, `/generate_stream` and the compatibility route `/`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use metrics::{counter, histogram};
use serde::Serialize;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::State;
use super::app::json_body;
use super::error::{ApiError, ErrorBody};
use super::sse;
use crate::engine::{FinishReason, Finished, ModelFacts, Output, Status, Token, TokenStream, TopToken};
use crate::request::{self, Limits, WireRequest};

type Shared = extract::State<State>;

/// A token as TGI writes it.
#[derive(Debug, Serialize)]
pub(super) struct TokenJson {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
}

impl From<&Token> for TokenJson {
    fn from(token: &Token) -> Self {
        Self { id: token.id, text: token.text.clone(), logprob: token.logprob, special: token.special }
    }
}

impl From<&TopToken> for TokenJson {
    fn from(token: &TopToken) -> Self {
        Self { id: token.id, text: token.text.clone(), logprob: token.logprob, special: token.special }
    }
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EosToken => "eos_token",
        FinishReason::StopSequence => "stop_sequence",
    }
}

/// `details` of the last event of a stream.
#[derive(Debug, Serialize)]
pub(super) struct StreamDetails {
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    input_length: usize,
}

/// `details` of an answer in one piece.
#[derive(Debug, Serialize)]
struct Details {
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<TokenJson>,
    tokens: Vec<TokenJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<TokenJson>>,
}

/// An answer in one piece.
#[derive(Debug, Serialize)]
struct Generated {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

/// The longest name of a client's that is logged, in bytes.
const MAX_ID: usize = 128;

/// How the log tells a request from others.
#[derive(Debug)]
struct Ticket {
    /// What the client calls it (`x-request-id`), else a number that this process gives.
    id: String,
    /// From the W3C header `traceparent`.
    trace: Option<String>,
    arrived: Instant,
    /// Its end is counted.
    is_settled: bool,
}

impl Ticket {
    /// Takes note of a request that arrives, and counts it.
    fn new(headers: &HeaderMap) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        counter!("tgi_request_count").increment(1);
        let text = |name| headers.get(name)?.to_str().ok();
        let is_short = |id: &&str| (1..=MAX_ID).contains(&id.len());
        let number = || NUMBER.fetch_add(1, Ordering::Relaxed).to_string();
        let id = text("x-request-id").filter(is_short).map_or_else(number, str::to_owned);
        let trace = text("traceparent").and_then(|parent| parent.split('-').nth(1));
        let is_trace = |trace: &&str| trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit());
        let trace = trace.filter(is_trace).map(str::to_owned);
        Self { id, trace, arrived: Instant::now(), is_settled: false }
    }

    /// Counts and logs a request that ends with an error. What clients do wrong is no error of the server.
    fn failed(&mut self, error: &ApiError) {
        self.is_settled = true;
        counter!("tgi_request_failure", "err" => error.reason()).increment(1);
        let Self { id, trace, arrived, .. } = self;
        let (status, ErrorBody { error: text, error_type }) = (error.status(), error.body());
        macro_rules! log {
            ($level:ident) => {
                $level!(id, trace, status = status.as_u16(), error_type, total_time = ?arrived.elapsed(), "{text}")
            };
        }
        match status {
            StatusCode::FAILED_DEPENDENCY => log!(error),
            StatusCode::TOO_MANY_REQUESTS => log!(warn),
            _ if status.is_server_error() => log!(error),
            _ => log!(info),
        }
    }
}

/// A client that went away is neither a success nor a failure of the server; TGI counts it as dropped.
impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.is_settled {
            counter!("tgi_request_failure", "err" => "dropped").increment(1);
        }
    }
}

/// A request under way: what its answer, its log line and its metrics need.
#[derive(Debug)]
pub(super) struct Request {
    pub wire: WireRequest,
    repeats_prompt: bool,
    input_length: usize,
    max_new_tokens: usize,
    num_characters: usize,
    compute_type: HeaderValue,
    ticket: Ticket,
    validated: Instant,
    /// When its first step was planned, once that is known.
    started: Option<Instant>,
}

impl Request {
    fn seed(&self) -> Option<u64> {
        self.wire.do_sample().then_some(self.wire.seed())
    }

    /// The answer, after the prompt where that was asked for.
    pub fn full_text(&self, text: &str) -> String {
        if self.repeats_prompt { self.wire.inputs.clone() + text } else { text.to_owned() }
    }

    pub fn stream_details(&self, finished: &Finished) -> StreamDetails {
        StreamDetails {
            finish_reason: reason_name(finished.reason),
            generated_tokens: finished.num_tokens,
            seed: self.seed(),
            input_length: self.input_length,
        }
    }

    /// Takes note of when the first step was planned.
    pub fn saw(&mut self, output: &Output) {
        self.started = self.started.or(output.started);
    }

    /// Total, validation, queue, inference, and that per token.
    fn times(&self, num_tokens: u32) -> [Duration; 5] {
        let now = Instant::now();
        let started = self.started.unwrap_or(self.validated).max(self.validated);
        let inference = now - started;
        let per_token = inference / num_tokens.max(1);
        [
            now - self.ticket.arrived,
            self.validated - self.ticket.arrived,
            started - self.validated,
            inference,
            per_token,
        ]
    }

    /// Counts and logs an answer that came to its end.
    pub fn succeeded(&mut self, finished: &Finished) {
        self.ticket.is_settled = true;
        let [total, validation, queue, inference, per_token] = self.times(finished.num_tokens);
        counter!("tgi_request_success").increment(1);
        histogram!("tgi_request_duration").record(total);
        histogram!("tgi_request_validation_duration").record(validation);
        histogram!("tgi_request_queue_duration").record(queue);
        histogram!("tgi_request_inference_duration").record(inference);
        histogram!("tgi_request_mean_time_per_token_duration").record(per_token);
        histogram!("tgi_request_generated_tokens").record(finished.num_tokens);
        info!(
            id = self.ticket.id,
            trace = self.ticket.trace,
            input_tokens = self.input_length,
            generated_tokens = finished.num_tokens,
            finish_reason = reason_name(finished.reason),
            parameters = %self.wire.sampling(),
            max_new_tokens = self.max_new_tokens,
            seed = self.seed(),
            total_time = ?total,
            validation_time = ?validation,
            queue_time = ?queue,
            inference_time = ?inference,
            time_per_token = ?per_token,
            "success"
        );
    }

    /// Counts and logs a request that ends with an error.
    pub fn failed(&mut self, error: &ApiError) {
        self.ticket.failed(error);
    }

    fn headers(&self, num_tokens: Option<u32>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static("x-compute-type"), self.compute_type.clone());
        headers.insert(HeaderName::from_static("x-compute-characters"), self.num_characters.into());
        let Some(num_tokens) = num_tokens else { return headers };
        let times = self.times(num_tokens);
        let names = ["x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token"];
        for (name, time) in names.into_iter().zip(times) {
            headers.insert(HeaderName::from_static(name), u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into());
        }
        if let Ok(seconds) = HeaderValue::from_str(&times[0].as_secs_f64().to_string()) {
            headers.insert(HeaderName::from_static("x-compute-time"), seconds);
        }
        headers.insert(HeaderName::from_static("x-prompt-tokens"), self.input_length.into());
        headers.insert(HeaderName::from_static("x-generated-tokens"), num_tokens.into());
        headers
    }
}

/// POST `/generate`.
pub(super) async fn generate(
    extract::State(state): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (request, tokens) = submit(&state, &headers, body, Route::Generate).await?;
    let (headers, generated) = collect(request, tokens).await?;
    Ok((headers, Json(generated)).into_response())
}

/// POST `/generate_stream`.
pub(super) async fn generate_stream(
    extract::State(state): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (request, tokens) = submit(&state, &headers, body, Route::GenerateStream).await?;
    stream(&state, request, tokens).await
}

/// POST `/`: a list of one answer, or a stream, as the body says.
pub(super) async fn compat_generate(
    extract::State(state): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (request, tokens) = submit(&state, &headers, body, Route::Compat).await?;
    if request.wire.stream {
        return stream(&state, request, tokens).await;
    }
    let (headers, generated) = collect(request, tokens).await?;
    Ok((headers, Json([generated])).into_response())
}

/// A stream answers 200 with its first token, so that a request which is refused in the queue gets its true status. When
/// nothing comes for long, or the shards are lost, the client is better told that it is waited for.
async fn stream(state: &State, mut request: Request, mut tokens: TokenStream) -> Result<Response, ApiError> {
    let mut status = state.engine.status();
    let first = match first_output(&mut tokens, &mut status).await {
        First::Output(output) => Some(output),
        First::Pending => None,
        First::Error(error) => {
            request.failed(&error);
            return Err(error);
        }
    };
    let headers = request.headers(None);
    let mut response = sse::response(tokens, request, status, first);
    response.headers_mut().extend(headers);
    Ok(response)
}

enum First {
    Output(Output),
    Error(ApiError),
    Pending,
}

async fn first_output(tokens: &mut TokenStream, status: &mut watch::Receiver<Status>) -> First {
    let until = tokio::time::Instant::now() + sse::KEEP_ALIVE;
    loop {
        let is_ready = status.borrow_and_update().is_ready;
        tokio::select! {
            biased;
            output = tokens.next() => return match output {
                Some(Ok(output)) => First::Output(output),
                Some(Err(error)) => First::Error(error.into()),
                None => First::Error(ApiError::incomplete_stream()),
            },
            () = tokio::time::sleep_until(until) => return First::Pending,
            () = std::future::ready(()), if !is_ready => return First::Pending,
            changed = status.changed() => if changed.is_err() { return First::Pending },
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Route {
    Generate,
    GenerateStream,
    Compat,
}

/// Takes a request in. Whatever becomes of it is counted and logged.
async fn submit(
    state: &State,
    headers: &HeaderMap,
    body: Body,
    route: Route,
) -> Result<(Request, TokenStream), ApiError> {
    let mut ticket = Ticket::new(headers);
    match queue(state, headers, body).await {
        Ok(queued) => Ok(under_way(state, queued, ticket, route)),
        Err(error) => {
            ticket.failed(&error);
            Err(error)
        }
    }
}

/// A request in the queue.
struct Queued {
    model: Arc<ModelFacts>,
    wire: WireRequest,
    input_length: usize,
    max_new_tokens: usize,
    validated: Instant,
    tokens: TokenStream,
}

/// Reads and judges a request, and queues it. The permit is taken before its prompt is tokenized, but not while a client
/// takes its time to send the body.
async fn queue(state: &State, headers: &HeaderMap, body: Body) -> Result<Queued, ApiError> {
    let model = admit(state)?;
    let body = json_body(state, headers, body).await?;
    let limits = limits(state, &model);
    let wire = request::parse(&body, &limits)?;
    let permit = state.engine.permit()?;
    let ids = state.pool.encode(wire.inputs.clone()).await?;
    let valid = wire.complete(ids, &limits)?;
    let (input_length, max_new_tokens, validated) = (valid.prompt_ids.len(), valid.max_new_tokens, Instant::now());
    histogram!("tgi_request_input_length").record(input_length as f64);
    histogram!("tgi_request_max_new_tokens").record(max_new_tokens as f64);
    let tokens = state.engine.generate(valid, permit).await?;
    Ok(Queued { model, wire, input_length, max_new_tokens, validated, tokens })
}

fn admit(state: &State) -> Result<Arc<ModelFacts>, ApiError> {
    if state.engine.status().borrow().is_draining {
        return Err(ApiError::draining());
    }
    state.model().ok_or_else(ApiError::not_ready)
}

fn limits(state: &State, model: &ModelFacts) -> Limits {
    Limits {
        max_stop_sequences: state.config.max_stop_sequences,
        max_top_n_tokens: state.config.max_top_n_tokens,
        max_input_tokens: model.max_input_tokens,
        max_total_tokens: model.max_total_tokens,
        vocab_size: model.vocab_size,
        max_token_bytes: state.tokenizer.max_token_bytes(),
        model_id: state.config.model_id.clone(),
    }
}

fn under_way(state: &State, queued: Queued, ticket: Ticket, route: Route) -> (Request, TokenStream) {
    let Queued { model, wire, input_length, max_new_tokens, validated, tokens } = queued;
    let request = Request {
        repeats_prompt: wire.return_full_text.unwrap_or(route == Route::Compat),
        input_length,
        max_new_tokens,
        num_characters: wire.inputs.chars().count(),
        compute_type: compute_type(state, &model),
        wire,
        ticket,
        validated,
        started: None,
    };
    (request, tokens)
}

fn compute_type(state: &State, model: &ModelFacts) -> HeaderValue {
    let by_device = || HeaderValue::from_str(&format!("{}+optimized", model.device)).ok();
    let said = state.config.compute_type.clone().or_else(by_device);
    said.unwrap_or(HeaderValue::from_static("unknown"))
}

/// Waits for the last token.
async fn collect(mut request: Request, mut tokens: TokenStream) -> Result<(HeaderMap, Generated), ApiError> {
    let (mut seen, mut top) = (vec![], vec![]);
    loop {
        let error = match tokens.next().await {
            Some(Ok(output)) => {
                request.saw(&output);
                if request.wire.details {
                    seen.push(TokenJson::from(&output.token));
                    if request.wire.has_top() {
                        top.push(output.token.top.iter().map(TokenJson::from).collect());
                    }
                }
                let Some(finished) = output.finished else { continue };
                request.succeeded(&finished);
                let details = request.wire.details.then(|| Details {
                    finish_reason: reason_name(finished.reason),
                    generated_tokens: finished.num_tokens,
                    seed: request.seed(),
                    prefill: vec![],
                    tokens: seen,
                    top_tokens: top,
                });
                let generated = Generated { generated_text: request.full_text(&finished.text), details };
                return Ok((request.headers(Some(finished.num_tokens)), generated));
            }
            Some(Err(error)) => ApiError::from(error),
            None => ApiError::incomplete(),
        };
        request.failed(&error);
        return Err(error);
    }
}
