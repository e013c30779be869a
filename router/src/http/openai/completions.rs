//! `/v1/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use futures::FutureExt;
use serde::Serialize;
use utoipa::ToSchema;

use super::tokens::CompletionLogprobs;
use super::{Heading, Usage, reason_name};
use crate::engine::{Output, Token};
use crate::http::entry::{Admitted, Entry, Prompt};
use crate::http::error::{ApiError, ErrorBody};
use crate::http::sse::{self, Events, Frames};
use crate::http::streams::{Whole, best_first, collect};
use crate::http::ticket::Flight;
use crate::request::completions::{self, CompletionRequest, Completions, Source};
use crate::text::tokenizer::Encode;

/// An answer, or a chunk of one.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Completion)]
pub(in crate::http) struct CompletionBody {
    id: String,
    /// `text_completion`.
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
    choices: Vec<CompletionChoice>,
    usage: Option<Usage>,
}

/// One of the answers, or a chunk of it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CompletionComplete)]
pub(in crate::http) struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; none before the last chunk.
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

impl CompletionBody {
    fn new(heading: &Heading, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Self {
        let Heading { id, created, model, system_fingerprint } = heading.clone();
        Self { id, object: "text_completion", created, model, system_fingerprint, choices, usage }
    }
}

/// Complete prompts
#[utoipa::path(post, path = "/v1/completions", tag = crate::http::docs::TAG, request_body = CompletionRequest,
    responses((status = 200, description = "Completions", content(
            (CompletionBody = "application/json"), (CompletionBody = "text/event-stream"))),
        (status = 404, body = ErrorBody), (status = 422, body = ErrorBody), (status = 424, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub(in crate::http) async fn completions(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| answer(entry, admitted).boxed()).await
}

/// Answers a body that was read.
pub(in crate::http) async fn answer(entry: &mut Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    let request = entry.read(admitted, completions::parse).await?;
    let num_sequences = request.prompts.len() * request.options.num_candidates;
    let permits = entry.permits(num_sequences)?;
    let tokenizer = Arc::clone(&entry.state.tokenizer);
    let mut prompts = vec![];
    let mut texts = vec![];
    for prompt in &request.prompts {
        let (text, ids) = match prompt {
            Source::Text(text) => (text.clone(), entry.state.pool.encode(text.clone(), true).await?),
            Source::Ids(ids) if ids.iter().any(|id| *id >= admitted.limits.vocab_size) => (String::new(), ids.clone()),
            Source::Ids(ids) => (tokenizer.decode(ids), ids.clone()),
        };
        prompts.push(Prompt::new(&text, ids.clone()));
        texts.push((text, ids));
    }
    let (mut flight, streams) = entry.launch(admitted, &request.options, prompts, permits).await?;
    let heading = Heading::new("cmpl-", &entry.state.config.model_id);
    let writer = Writer { heading, request, texts, tokenizer };
    if writer.request.stream {
        let num_choices = writer.texts.len() * writer.request.options.num_choices;
        let choices = (0..num_choices).map(|_| Choice::default()).collect();
        return sse::respond(&entry.state, flight, streams, Chunks { writer, choices }).await;
    }
    let wholes = collect(&mut flight, streams).await?;
    let num_tokens = wholes.iter().map(|whole| whole.finished.num_tokens as usize).sum();
    let usage = Usage::new(flight.num_prompt_tokens, writer.told(num_tokens));
    let body = CompletionBody::new(&writer.heading, writer.choices(wholes), Some(usage));
    let mut response = flight.respond(num_tokens, &body);
    // As in TGI, this route does not tell it.
    response.headers_mut().remove("x-compute-time");
    Ok(response)
}

/// What chunks and whole answers are written with.
struct Writer {
    heading: Heading,
    request: Completions,
    /// The prompts, with their ids.
    texts: Vec<(String, Vec<u32>)>,
    tokenizer: Arc<dyn Encode>,
}

impl Writer {
    /// Tokens that were asked for: with `max_tokens` 0 one was generated and none was.
    fn told(&self, num_tokens: usize) -> usize {
        if self.request.drops_answer { 0 } else { num_tokens }
    }

    fn choices(&self, wholes: Vec<Whole>) -> Vec<CompletionChoice> {
        let (num_candidates, num_choices) = (self.request.options.num_candidates, self.request.options.num_choices);
        let mut wholes = wholes.into_iter();
        let mut choices = vec![];
        for (text, ids) in &self.texts {
            let mut candidates: Vec<_> = wholes.by_ref().take(num_candidates).collect();
            if num_candidates > num_choices {
                candidates = best_first(candidates);
            }
            for whole in candidates.into_iter().take(num_choices) {
                choices.push(self.choice(choices.len(), text, ids, whole));
            }
        }
        choices
    }

    fn choice(&self, index: usize, prompt: &str, ids: &[u32], mut whole: Whole) -> CompletionChoice {
        if self.request.drops_answer {
            whole.tokens.clear();
            whole.finished.text.clear();
        }
        let mut logprobs = self.request.logprobs.then(CompletionLogprobs::default);
        if let Some(logprobs) = &mut logprobs {
            whole.prompt.iter().fold(prompt, |rest, token| logprobs.push_prompt(&*self.tokenizer, token, rest));
            whole.tokens.iter().for_each(|token| logprobs.push(&*self.tokenizer, token));
        }
        let prefix = if self.request.echo { prompt } else { "" };
        let has_ids = self.request.return_token_ids;
        CompletionChoice {
            index,
            text: prefix.to_owned() + &whole.finished.text,
            logprobs,
            finish_reason: Some(reason_name(whole.finished.reason)),
            prompt_token_ids: has_ids.then(|| ids.to_vec()),
            token_ids: has_ids.then(|| whole.tokens.iter().map(|token| token.id).collect()),
        }
    }
}

/// What is known of one streamed answer.
#[derive(Default)]
struct Choice {
    has_begun: bool,
    num_tokens: usize,
    /// Characters of its log-probabilities so far.
    length: usize,
}

/// The chunks of a stream.
struct Chunks {
    writer: Writer,
    choices: Vec<Choice>,
}

impl Chunks {
    fn num_tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.num_tokens).sum()
    }

    fn tokens(&mut self, index: usize, output: &Output) -> Option<CompletionLogprobs> {
        if !self.writer.request.logprobs {
            return None;
        }
        let tokenizer = &*self.writer.tokenizer;
        let mut logprobs = CompletionLogprobs::at(self.choices[index].length);
        let prompt = self.writer.texts[index / self.writer.request.options.num_choices].0.as_str();
        output.prompt.iter().flatten().fold(prompt, |rest, token| logprobs.push_prompt(tokenizer, token, rest));
        if !self.writer.request.drops_answer {
            logprobs.push(tokenizer, &output.token);
        }
        self.choices[index].length = logprobs.length();
        Some(logprobs)
    }
}

/// A special token is no text of the answer.
fn text_of(token: Token) -> String {
    if token.special { String::new() } else { token.text }
}

impl Frames for Chunks {
    fn output(&mut self, index: usize, output: Output, _: &Flight, out: &mut Events) {
        let logprobs = self.tokens(index, &output);
        let begins = !std::mem::replace(&mut self.choices[index].has_begun, true);
        self.choices[index].num_tokens += 1;
        let request = &self.writer.request;
        let (prompt, ids) = &self.writer.texts[index / request.options.num_choices];
        let id = output.token.id;
        let prefix = if request.echo && begins { prompt.clone() } else { String::new() };
        let text = if request.drops_answer { prefix } else { prefix + &text_of(output.token) };
        let choice = CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: output.finished.map(|finished| reason_name(finished.reason)),
            prompt_token_ids: (request.return_token_ids && begins).then(|| ids.clone()),
            token_ids: request.return_token_ids.then(|| if request.drops_answer { vec![] } else { vec![id] }),
        };
        out.data(&CompletionBody::new(&self.writer.heading, vec![choice], None));
    }

    fn end(&mut self, flight: &Flight, out: &mut Events) {
        if self.writer.request.include_usage {
            let usage = Usage::new(flight.num_prompt_tokens, self.writer.told(self.num_tokens()));
            out.data(&CompletionBody::new(&self.writer.heading, vec![], Some(usage)));
        }
        out.done();
    }

    fn error(&self, error: &ApiError, out: &mut Events) {
        out.data(&error.openai_body());
    }
}
