//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use futures::FutureExt;
use serde::Serialize;
use utoipa::ToSchema;

use super::tokens::{ChatCompletionLogprob, ChatCompletionLogprobs, chat_logprob};
use super::{Heading, Usage, random_id, reason_name};
use crate::chat::answer::{Piece, Reader};
use crate::chat::tools::Format;
use crate::engine::{FinishReason, Output, Token};
use crate::http::entry::{Admitted, Entry, Prompt};
use crate::http::error::{ApiError, ErrorBody};
use crate::http::sse::{self, Events, Frames};
use crate::http::streams::{Whole, collect};
use crate::http::ticket::Flight;
use crate::request::chat::{self, Chat, ChatRequest};
use crate::text::tokenizer::Encode;

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletion {
    id: String,
    /// `chat.completion`.
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
    choices: Vec<ChatCompletionComplete>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// One of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionComplete {
    index: usize,
    message: OutputMessage,
    logprobs: Option<ChatCompletionLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// What the assistant says.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct OutputMessage {
    /// `assistant`.
    role: &'static str,
    /// Null if all it does is to call tools.
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A call of a tool.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ToolCall {
    id: String,
    /// `function`.
    r#type: &'static str,
    function: FunctionCall,
}

/// What is called, and with what.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct FunctionCall {
    name: String,
    /// JSON, as text.
    arguments: String,
}

/// A chunk of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionChunk {
    id: String,
    /// `chat.completion.chunk`.
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
    choices: Vec<ChatCompletionChoice>,
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// More of one of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionChoice {
    index: usize,
    delta: ChatCompletionDelta,
    logprobs: Option<ChatCompletionLogprobs>,
    /// On the last chunk: `stop`, `length` or `tool_calls`.
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// What is new.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionDelta {
    /// On the first chunk: `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<DeltaToolCall>,
}

/// A call that begins, or goes on.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct DeltaToolCall {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: DeltaFunction,
}

/// What is called, and more of with what.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct DeltaFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// Answer a chat
#[utoipa::path(post, path = "/v1/chat/completions", tag = crate::http::docs::TAG, request_body = ChatRequest,
    responses((status = 200, description = "Answer", content(
            (ChatCompletion = "application/json"), (ChatCompletionChunk = "text/event-stream"))),
        (status = 404, body = ErrorBody), (status = 422, body = ErrorBody), (status = 424, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub(in crate::http) async fn completions(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| answer(entry, admitted).boxed()).await
}

/// Answers a body that was read.
pub(in crate::http) async fn answer(entry: &mut Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    let mut request = entry.read(admitted, chat::parse).await?;
    let permits = entry.permits(request.options.num_choices)?;
    let (text, ids) = entry.render(std::mem::take(&mut request.prompting), &request.options, admitted).await?;
    let prompt = Prompt::new(&text, ids.clone());
    let (mut flight, streams) = entry.launch(admitted, &request.options, vec![prompt], permits).await?;
    let state = &entry.state;
    let writer = Writer {
        heading: Heading::new("chatcmpl-", &state.config.model_id),
        dialect_format: state.dialect.format,
        prompt_ids: request.return_token_ids.then_some(ids),
        tokenizer: Arc::clone(&state.tokenizer),
        request,
    };
    let has_form = writer.request.options.sampling.grammar.is_some();
    let reader = || match &writer.request {
        Chat { tool_names, .. } if has_form => Reader::of_form(tool_names),
        Chat { tool_names, parallel_tool_calls, .. } => {
            Reader::new(state.dialect, &text, tool_names, !parallel_tool_calls)
        }
    };
    if writer.request.stream {
        let choices = (0..writer.request.options.num_choices).map(|_| Choice::new(reader())).collect();
        return sse::respond(state, flight, streams, Chunks { writer, choices }).await;
    }
    let wholes = collect(&mut flight, streams).await?;
    let num_tokens = wholes.iter().map(|whole| whole.finished.num_tokens as usize).sum();
    let choices = wholes.into_iter().enumerate().map(|(index, whole)| writer.choice(index, reader(), whole)).collect();
    let Heading { id, created, model, system_fingerprint } = writer.heading;
    let body = ChatCompletion {
        id,
        object: "chat.completion",
        created,
        model,
        system_fingerprint,
        choices,
        usage: Usage::new(flight.num_prompt_tokens, num_tokens),
        prompt_token_ids: writer.prompt_ids,
    };
    Ok(flight.respond(num_tokens, &body))
}

/// What chunks and whole answers are written with.
struct Writer {
    heading: Heading,
    dialect_format: Format,
    request: Chat,
    /// Where they are told.
    prompt_ids: Option<Vec<u32>>,
    tokenizer: Arc<dyn Encode>,
}

impl Writer {
    /// A name for a call that its result will refer to. The templates of Mistral's models want nine letters.
    fn call_id(&self) -> String {
        match self.dialect_format {
            Format::Mistral => random_id("", 9),
            Format::Hermes | Format::Json => random_id("call_", 24),
        }
    }

    fn logprob(&self, token: &Token) -> Option<ChatCompletionLogprob> {
        // The token that ends an answer is no part of it.
        (self.request.logprobs && !token.special).then(|| chat_logprob(&*self.tokenizer, token))
    }

    fn choice(&self, index: usize, mut reader: Reader, whole: Whole) -> ChatCompletionComplete {
        let mut message = OutputMessage { role: "assistant", ..OutputMessage::default() };
        let pieces = whole.tokens.iter().flat_map(|token| reader.push(&token.text, token.special)).collect::<Vec<_>>();
        for piece in pieces.into_iter().chain(reader.finish()) {
            match piece {
                Piece::Content(text) => message.content.get_or_insert_default().push_str(&text),
                Piece::Reasoning(text) => message.reasoning_content.get_or_insert_default().push_str(&text),
                Piece::Call { name, .. } => message.tool_calls.push(ToolCall {
                    id: self.call_id(),
                    r#type: "function",
                    function: FunctionCall { name, arguments: String::new() },
                }),
                Piece::Arguments { index, text } => message.tool_calls[index].function.arguments.push_str(&text),
            }
        }
        if message.tool_calls.is_empty() {
            message.content.get_or_insert_default();
        }
        let content = || whole.tokens.iter().filter_map(|token| self.logprob(token)).collect();
        ChatCompletionComplete {
            index,
            message,
            logprobs: self.request.logprobs.then(|| ChatCompletionLogprobs { content: content() }),
            finish_reason: finish_reason(&reader, whole.finished.reason),
            token_ids: self.request.return_token_ids.then(|| whole.tokens.iter().map(|token| token.id).collect()),
        }
    }

    fn chunk(&self, choices: Vec<ChatCompletionChoice>, usage: Option<Usage>) -> ChatCompletionChunk {
        let Heading { id, created, model, system_fingerprint } = self.heading.clone();
        let object = "chat.completion.chunk";
        ChatCompletionChunk { id, object, created, model, system_fingerprint, choices, usage, prompt_token_ids: None }
    }
}

fn finish_reason(reader: &Reader, reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::EosToken | FinishReason::StopSequence if reader.has_calls() => "tool_calls",
        reason => reason_name(reason),
    }
}

/// What is known of one streamed answer.
struct Choice {
    reader: Reader,
    has_begun: bool,
    num_tokens: usize,
    /// Not told yet.
    logprobs: Vec<ChatCompletionLogprob>,
    token_ids: Vec<u32>,
}

impl Choice {
    fn new(reader: Reader) -> Self {
        Self { reader, has_begun: false, num_tokens: 0, logprobs: vec![], token_ids: vec![] }
    }
}

/// The chunks of a stream.
struct Chunks {
    writer: Writer,
    choices: Vec<Choice>,
}

impl Chunks {
    fn delta(&mut self, index: usize, pieces: Vec<Piece>) -> ChatCompletionDelta {
        let begins = !std::mem::replace(&mut self.choices[index].has_begun, true);
        let mut delta = ChatCompletionDelta { role: begins.then_some("assistant"), ..ChatCompletionDelta::default() };
        for piece in pieces {
            match piece {
                Piece::Content(text) => delta.content.get_or_insert_default().push_str(&text),
                Piece::Reasoning(text) => delta.reasoning_content.get_or_insert_default().push_str(&text),
                Piece::Call { index, name } => delta.tool_calls.push(DeltaToolCall {
                    index,
                    id: Some(self.writer.call_id()),
                    r#type: Some("function"),
                    function: DeltaFunction { name: Some(name), arguments: String::new() },
                }),
                Piece::Arguments { index, text } => {
                    match delta.tool_calls.last_mut().filter(|call| call.index == index) {
                        Some(call) => call.function.arguments.push_str(&text),
                        None => delta.tool_calls.push(DeltaToolCall {
                            index,
                            id: None,
                            r#type: None,
                            function: DeltaFunction { name: None, arguments: text },
                        }),
                    }
                }
            }
        }
        if begins && delta.tool_calls.is_empty() && delta.reasoning_content.is_none() {
            delta.content.get_or_insert_default();
        }
        delta
    }
}

impl Frames for Chunks {
    fn output(&mut self, index: usize, output: Output, _: &Flight, out: &mut Events) {
        let Output { token, finished, .. } = output;
        let logprob = self.writer.logprob(&token);
        let choice = &mut self.choices[index];
        choice.num_tokens += 1;
        choice.token_ids.push(token.id);
        choice.logprobs.extend(logprob);
        let mut pieces = choice.reader.push(&token.text, token.special);
        if finished.is_some() {
            pieces.extend(choice.reader.finish());
        }
        if pieces.is_empty() && finished.is_none() {
            return;
        }
        let finish_reason = finished.map(|finished| finish_reason(&choice.reader, finished.reason));
        let content = std::mem::take(&mut choice.logprobs);
        let token_ids = std::mem::take(&mut choice.token_ids);
        let choice = ChatCompletionChoice {
            index,
            logprobs: self.writer.request.logprobs.then_some(ChatCompletionLogprobs { content }),
            finish_reason,
            token_ids: self.writer.request.return_token_ids.then_some(token_ids),
            delta: self.delta(index, pieces),
        };
        let mut chunk = self.writer.chunk(vec![choice], None);
        chunk.prompt_token_ids = self.writer.prompt_ids.take();
        out.data(&chunk);
    }

    fn end(&mut self, flight: &Flight, out: &mut Events) {
        if self.writer.request.include_usage {
            let num_tokens = self.choices.iter().map(|choice| choice.num_tokens).sum();
            out.data(&self.writer.chunk(vec![], Some(Usage::new(flight.num_prompt_tokens, num_tokens))));
        }
        out.done();
    }

    fn error(&self, error: &ApiError, out: &mut Events) {
        out.data(&error.openai_body());
    }
}
