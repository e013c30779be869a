//! `/generate`, `/generate_stream` and the compatibility route `/`.

use axum::body::Body;
use axum::response::Response;
use futures::FutureExt;
use serde::Serialize;
use utoipa::ToSchema;

use super::entry::{Admitted, Entry, Prompt};
use super::error::{ApiError, ErrorBody};
use super::sse::{self, Events, Frames};
use super::streams::{Streams, Whole, best_first, collect};
use super::ticket::{Flight, reason_name};
use crate::engine::{Output, PromptToken, TopToken};
use crate::request::Limits;
use crate::request::native::{self, CompatGenerateRequest, Delivery, GenerateRequest, WireRequest};

/// A token as TGI writes it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Token)]
pub(super) struct TokenJson {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
}

impl From<&crate::engine::Token> for TokenJson {
    fn from(token: &crate::engine::Token) -> Self {
        Self { id: token.id, text: token.text.clone(), logprob: token.logprob, special: token.special }
    }
}

impl From<&TopToken> for TokenJson {
    fn from(token: &TopToken) -> Self {
        Self { id: token.id, text: token.text.clone(), logprob: token.logprob, special: token.special }
    }
}

/// A token of the prompt as TGI writes it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = PrefillToken)]
pub(super) struct PrefillJson {
    id: u32,
    text: String,
    logprob: Option<f32>,
}

impl From<&PromptToken> for PrefillJson {
    fn from(token: &PromptToken) -> Self {
        Self { id: token.id, text: token.text.clone(), logprob: token.logprob }
    }
}

/// `details` of the last event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StreamDetails {
    /// `length`, `eos_token` or `stop_sequence`.
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    input_length: usize,
}

/// `details` of an answer in one piece.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Details {
    /// `length`, `eos_token` or `stop_sequence`.
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PrefillJson>,
    tokens: Vec<TokenJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<TokenJson>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    best_of_sequences: Vec<BestOfSequence>,
}

/// A candidate that was not the best.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BestOfSequence {
    generated_text: String,
    /// `length`, `eos_token` or `stop_sequence`.
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PrefillJson>,
    tokens: Vec<TokenJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<TokenJson>>,
}

/// An answer in one piece.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GenerateResponse {
    pub generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

/// One event of `/generate_stream`.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StreamResponse {
    index: u32,
    token: TokenJson,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<TokenJson>,
    generated_text: Option<String>,
    details: Option<StreamDetails>,
}

/// Generate tokens
#[utoipa::path(post, path = "/generate", tag = super::docs::TAG, request_body = GenerateRequest,
    responses((status = 200, description = "Generated text", body = GenerateResponse),
        (status = 422, body = ErrorBody), (status = 424, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn generate(entry: Entry, body: Body) -> Result<Response, ApiError> {
    respond(entry, body, Delivery::Whole).await
}

/// Generate a stream of tokens
#[utoipa::path(post, path = "/generate_stream", tag = super::docs::TAG, request_body = GenerateRequest,
    responses((status = 200, description = "Generated text", body = StreamResponse, content_type = "text/event-stream"),
        (status = 422, body = ErrorBody), (status = 424, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn generate_stream(entry: Entry, body: Body) -> Result<Response, ApiError> {
    respond(entry, body, Delivery::Stream).await
}

/// Generate tokens: a list of one answer, or a stream if `stream` is true
#[utoipa::path(post, path = "/", tag = super::docs::TAG, request_body = CompatGenerateRequest,
    responses((status = 200, description = "Generated text", content(
            (Vec<GenerateResponse> = "application/json"), (StreamResponse = "text/event-stream"))),
        (status = 422, body = ErrorBody), (status = 424, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn compat_generate(entry: Entry, body: Body) -> Result<Response, ApiError> {
    respond(entry, body, Delivery::AsAsked).await
}

async fn respond(entry: Entry, body: Body, delivery: Delivery) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| answer(entry, admitted, delivery).boxed()).await
}

/// Answers a body that was read.
pub(super) async fn answer(entry: &mut Entry, admitted: &Admitted, delivery: Delivery) -> Result<Response, ApiError> {
    let parse = move |body: &[u8], limits: &Limits| native::parse(body, delivery, limits);
    let mut wire = entry.read(admitted, parse).await?;
    let (mut flight, streams) = launch(entry, admitted, &wire).await?;
    let is_compat = delivery == Delivery::AsAsked;
    if !wire.return_full_text.unwrap_or(is_compat) {
        wire.inputs.clear();
    }
    if wire.stream {
        let frames = Native { index: 0, prefix: wire.inputs, has_details: wire.details };
        return sse::respond(&entry.state, flight, streams, frames).await;
    }
    let wholes = best_first(collect(&mut flight, streams).await?);
    let num_tokens = wholes.iter().map(|whole| whole.finished.num_tokens as usize).sum();
    let response = response(&wire, &flight, wholes);
    Ok(if is_compat { flight.respond(num_tokens, &[response]) } else { flight.respond(num_tokens, &response) })
}

/// Queues the candidates of a prompt.
pub(super) async fn launch(
    entry: &mut Entry,
    admitted: &Admitted,
    wire: &WireRequest,
) -> Result<(Flight, Streams), ApiError> {
    let permits = entry.permits(wire.options.num_candidates)?;
    let ids = entry.state.pool.encode(wire.inputs.clone(), true).await?;
    let prompts = vec![Prompt::new(&wire.inputs, ids)];
    entry.launch(admitted, &wire.options, prompts, permits).await
}

fn response(wire: &WireRequest, flight: &Flight, wholes: Vec<Whole>) -> GenerateResponse {
    let seed = flight.options.seed();
    let has_top = wire.options.sampling.top_n > 0;
    let mut sequences = wholes.into_iter().map(|whole| {
        let Whole { tokens, prompt, finished } = whole;
        let top = |token: &crate::engine::Token| token.top.iter().map(TokenJson::from).collect();
        BestOfSequence {
            generated_text: wire.inputs.clone() + &finished.text,
            finish_reason: reason_name(finished.reason),
            generated_tokens: finished.num_tokens,
            seed,
            prefill: prompt.iter().map(PrefillJson::from).collect(),
            top_tokens: if has_top { tokens.iter().map(top).collect() } else { vec![] },
            tokens: tokens.iter().map(TokenJson::from).collect(),
        }
    });
    let best = sequences.next().expect("there is a candidate");
    let others = sequences.collect();
    let BestOfSequence { generated_text, finish_reason, generated_tokens, seed, prefill, tokens, top_tokens } = best;
    let details = wire.details.then_some(Details {
        finish_reason,
        generated_tokens,
        seed,
        prefill,
        tokens,
        top_tokens,
        best_of_sequences: others,
    });
    GenerateResponse { generated_text, details }
}

/// The events of TGI's own streams.
struct Native {
    index: u32,
    /// Before the answer's text.
    prefix: String,
    has_details: bool,
}

impl Frames for Native {
    fn output(&mut self, _: usize, output: Output, flight: &Flight, out: &mut Events) {
        self.index += 1;
        let Output { token, finished, .. } = output;
        let details = finished.as_ref().filter(|_| self.has_details).map(|finished| StreamDetails {
            finish_reason: reason_name(finished.reason),
            generated_tokens: finished.num_tokens,
            seed: flight.options.seed(),
            input_length: flight.num_prompt_tokens,
        });
        out.data(&StreamResponse {
            index: self.index,
            top_tokens: token.top.iter().map(TokenJson::from).collect(),
            token: TokenJson::from(&token),
            generated_text: finished.map(|finished| self.prefix.clone() + &finished.text),
            details,
        });
    }

    fn end(&mut self, _: &Flight, _: &mut Events) {}

    fn error(&self, error: &ApiError, out: &mut Events) {
        out.data(error.body());
    }
}
