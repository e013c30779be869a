//! A request for tokens from its arrival to its end: what is counted, logged and told in headers about it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use metrics::counter;
use opentelemetry::KeyValue;
use serde::Serialize;
use tracing::{error, info, warn};

use super::State;
use super::error::{ApiError, ErrorBody};
use crate::engine::{FinishReason, Output};
use crate::request::Options;
use crate::telemetry::traces::RequestTrace;

/// The longest name of a client's that is logged, in bytes.
const MAX_ID: usize = 128;

/// What the log calls a request: what the client calls it (`x-request-id`), else a number that this process gives.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub String);

impl RequestId {
    pub fn new(headers: &HeaderMap) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let given = headers.get("x-request-id").and_then(|value| value.to_str().ok());
        let is_fit = |id: &&str| (1..=MAX_ID).contains(&id.len());
        let number = || NUMBER.fetch_add(1, Ordering::Relaxed).to_string();
        Self(given.filter(is_fit).map_or_else(number, str::to_owned))
    }
}

/// How the log tells a request from others.
#[derive(Debug)]
pub(super) struct Ticket {
    id: String,
    route: &'static str,
    /// The W3C header `traceparent`.
    parent: Option<String>,
    arrived: Instant,
    /// Its end is counted.
    is_settled: bool,
    state: State,
}

/// The longest `traceparent` that is looked at; those of the present version have 55 bytes.
const MAX_PARENT: usize = 512;

impl Ticket {
    /// Takes note of a request that arrives, and counts it.
    pub fn new(id: RequestId, route: &'static str, headers: &HeaderMap, state: State) -> Self {
        state.metrics.count.increment(1);
        let parent = headers.get("traceparent").and_then(|value| value.to_str().ok());
        let parent = parent.filter(|parent| parent.len() <= MAX_PARENT).map(str::to_owned);
        Self { id: id.0, route, parent, arrived: Instant::now(), is_settled: false, state }
    }

    /// The trace that the client says the request belongs to.
    fn trace(&self) -> Option<&str> {
        let trace = self.parent.as_deref()?.split('-').nth(1)?;
        (trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(trace)
    }

    /// Sends a trace, where traces are sent.
    fn tell(&self, phases: &[(&'static str, Instant)], attributes: Vec<KeyValue>, error: Option<String>) {
        let traces = &self.state.config.traces;
        if traces.is_on() {
            let (route, parent, arrived) = (self.route, self.parent.as_deref(), self.arrived);
            let mut attributes = attributes;
            attributes.push(KeyValue::new("request.id", self.id.clone()));
            traces.tell(RequestTrace { route, parent, arrived, phases, attributes, error });
        }
    }

    /// A request that has come to its end without tokens.
    pub fn done(mut self) {
        self.is_settled = true;
        let metrics = &self.state.metrics;
        metrics.success.increment(1);
        metrics.duration.record(self.arrived.elapsed());
    }

    /// Counts and logs a request that ends with an error. What clients do wrong is no error of the server.
    pub fn failed(&mut self, error: &ApiError) {
        if std::mem::replace(&mut self.is_settled, true) {
            return;
        }
        counter!("tgi_request_failure", "err" => error.reason()).increment(1);
        let (id, trace, arrived) = (&self.id, self.trace(), self.arrived);
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
        let status = KeyValue::new("http.response.status_code", i64::from(status.as_u16()));
        self.tell(&[], vec![status], Some((*error_type).into()));
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

/// What TGI calls the end of a generation.
pub(super) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EosToken => "eos_token",
        FinishReason::StopSequence => "stop_sequence",
    }
}

/// A request whose sequences are queued.
#[derive(Debug)]
pub(super) struct Flight {
    pub ticket: Ticket,
    pub compute_type: HeaderValue,
    /// Characters of the prompts.
    pub num_characters: usize,
    /// Tokens of the prompts.
    pub num_prompt_tokens: usize,
    pub options: Options,
    /// Of the first prompt.
    pub max_new_tokens: usize,
    pub validated: Instant,
    /// When its first step was planned, once that is known.
    pub started: Option<Instant>,
    /// When a token last came.
    pub last_token: Option<Instant>,
    /// Others like it belong to the same request, which is not over with this one.
    pub is_part: bool,
}

impl Flight {
    /// Takes note of a token.
    pub fn saw(&mut self, output: &Output) {
        self.started = self.started.or(output.started);
        let now = Instant::now();
        let metrics = &self.ticket.state.metrics;
        match self.last_token.replace(now) {
            None => metrics.first_token.record(now - self.ticket.arrived),
            Some(before) => metrics.inter_token.record(now - before),
        }
    }

    /// Total, validation, queue, inference, and that per token.
    fn times(&self, num_tokens: usize) -> [Duration; 5] {
        let now = Instant::now();
        let started = self.started.unwrap_or(self.validated).max(self.validated);
        let inference = now - started;
        let per_token = inference / u32::try_from(num_tokens.max(1)).unwrap_or(u32::MAX);
        let arrived = self.ticket.arrived;
        [now - arrived, self.validated - arrived, started - self.validated, inference, per_token]
    }

    /// Counts and logs an answer that came to its end.
    pub fn succeeded(&mut self, num_tokens: usize, reason: FinishReason) {
        let [total, validation, queue, inference, per_token] = self.times(num_tokens);
        let metrics = &self.ticket.state.metrics;
        if !self.is_part {
            self.ticket.is_settled = true;
            metrics.success.increment(1);
            metrics.duration.record(total);
        }
        metrics.validation.record(validation);
        metrics.queue.record(queue);
        metrics.inference.record(inference);
        metrics.per_token.record(per_token);
        metrics.lengths().generated.record(num_tokens as f64);
        info!(
            id = self.ticket.id,
            trace = self.ticket.trace(),
            input_tokens = self.num_prompt_tokens,
            generated_tokens = num_tokens,
            finish_reason = reason_name(reason),
            parameters = %self.options.sampling,
            max_new_tokens = self.max_new_tokens,
            seed = self.options.seed(),
            total_time = ?total,
            validation_time = ?validation,
            queue_time = ?queue,
            inference_time = ?inference,
            time_per_token = ?per_token,
            "success"
        );
        let started = self.started.unwrap_or(self.validated).max(self.validated);
        let phases = [("validation", self.ticket.arrived), ("queue", self.validated), ("inference", started)];
        let attributes = vec![
            KeyValue::new("gen_ai.usage.input_tokens", self.num_prompt_tokens as i64),
            KeyValue::new("gen_ai.usage.output_tokens", num_tokens as i64),
            KeyValue::new("gen_ai.response.finish_reason", reason_name(reason)),
        ];
        self.ticket.tell(&phases, attributes, None);
    }

    /// Counts and logs a request that ends with an error.
    pub fn failed(&mut self, error: &ApiError) {
        self.ticket.failed(error);
    }

    /// An answer that is whole, with TGI's headers. They are written into one map, once: each of them is hashed.
    pub fn respond(&self, num_tokens: usize, answer: &impl Serialize) -> Response {
        let mut headers = self.headers(Some(num_tokens));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut response = Response::new(Body::from(serde_json::to_vec(answer).expect("an answer is plain data")));
        *response.headers_mut() = headers;
        response
    }

    /// TGI's headers. `num_tokens`: generated, of an answer that is whole.
    pub fn headers(&self, num_tokens: Option<usize>) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(if num_tokens.is_some() { 16 } else { 4 });
        headers.insert(HeaderName::from_static("x-compute-type"), self.compute_type.clone());
        headers.insert(HeaderName::from_static("x-compute-characters"), self.num_characters.into());
        let Some(num_tokens) = num_tokens else { return headers };
        let times = self.times(num_tokens);
        let names = ["x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token"];
        for (name, time) in names.into_iter().zip(times) {
            headers.insert(HeaderName::from_static(name), u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into());
        }
        if let Ok(seconds) = HeaderValue::try_from(times[0].as_secs_f64().to_string()) {
            headers.insert(HeaderName::from_static("x-compute-time"), seconds);
        }
        headers.insert(HeaderName::from_static("x-prompt-tokens"), self.num_prompt_tokens.into());
        headers.insert(HeaderName::from_static("x-generated-tokens"), num_tokens.into());
        headers
    }
}
