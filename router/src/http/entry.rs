//! The way of every request for tokens to the engine: counted, admitted, read, judged, tokenized, queued.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use futures::future::BoxFuture;

use super::State;
use super::app;
use super::auth::Namespace;
use super::body::json_body;
use super::error::ApiError;
use super::streams::Streams;
use super::ticket::{Flight, RequestId, Ticket};
use crate::chat::prompt::{self, Wanted};
use crate::chat::template::{Chat, ChatTemplate, RenderError};
use crate::engine::{GenerateError, ModelFacts, Permit};
use crate::grammar::GrammarError;
use crate::request::chat::Prompting;
use crate::request::form::Grammar;
use crate::request::limits::MAX_CHOICES;
use crate::request::{Limits, Options, Refused, ValidRequest};
use crate::text::tokenizer::{Encode, SHORT};

/// A request that came in, for a handler to answer.
#[derive(Debug)]
pub(super) struct Entry {
    pub state: State,
    pub headers: HeaderMap,
    namespace: u64,
    /// Until the request is on its way.
    ticket: Option<Ticket>,
}

/// What is known once a request is admitted and its body was read.
#[derive(Debug)]
pub(super) struct Admitted {
    pub model: Arc<ModelFacts>,
    pub limits: Limits,
    pub body: Arc<Vec<u8>>,
}

impl FromRequestParts<State> for Entry {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Self::Rejection> {
        let id = parts.extensions.get::<RequestId>().cloned().unwrap_or_else(|| RequestId::new(&parts.headers));
        // Names of routes are few and known; a path is whatever a client sends.
        let route = app::route_name(parts.uri.path());
        let ticket = Some(Ticket::new(id, route, &parts.headers, state.clone()));
        let namespace = parts.extensions.get::<Namespace>().map_or(0, |namespace| namespace.0);
        Ok(Self { state: state.clone(), headers: std::mem::take(&mut parts.headers), namespace, ticket })
    }
}

impl Entry {
    /// The whole of a request that wants tokens: admitted, answered, settled.
    pub async fn run<T>(
        mut self,
        body: Body,
        answer: impl for<'a> FnOnce(&'a mut Self, &'a Admitted) -> BoxFuture<'a, Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let result = match self.admit(body).await {
            Ok(admitted) => answer(&mut self, &admitted).await,
            Err(error) => Err(error),
        };
        self.settle(result)
    }

    /// The request is judged before its body is read: a server that is not ready needs none.
    async fn admit(&self, body: Body) -> Result<Admitted, ApiError> {
        let model = admit(&self.state)?;
        let body = Arc::new(json_body(&self.state, &self.headers, body).await?);
        Ok(Admitted { limits: limits(&self.state, &model), model, body })
    }

    /// Settles the account of a request that is not on its way.
    fn settle<T>(mut self, result: Result<T, ApiError>) -> Result<T, ApiError> {
        match (&result, self.ticket.take()) {
            (_, None) => {}
            (Ok(_), Some(ticket)) => ticket.done(),
            (Err(error), Some(mut ticket)) => ticket.failed(error),
        }
        result
    }

    /// The right to generate so many sequences at once, or none of them. Taken before a prompt is tokenized, but not while a
    /// client takes its time to send the body.
    pub fn permits(&self, count: usize) -> Result<Vec<Permit>, ApiError> {
        let permits: Result<_, _> = (0..count).map(|_| self.state.engine.permit()).collect();
        Ok(permits?)
    }

    /// What a body asks for. A long one is read where no stream waits for it.
    pub async fn read<T: Send + 'static>(
        &self,
        admitted: &Admitted,
        read: impl FnOnce(&[u8], &Limits) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, ApiError> {
        if admitted.body.len() <= SHORT {
            return Ok(read(&admitted.body, &admitted.limits)?);
        }
        // So that not more of them wait, each with its body, than requests may run.
        let _permit = self.permits(1)?;
        let (body, limits) = (Arc::clone(&admitted.body), admitted.limits.clone());
        Ok(self.state.pool.run(body.len(), move |_| read(&body, &limits)).await??)
    }

    /// The prompt of a chat, as text and as ids. What takes long to render, or to tokenize, goes on where long texts are.
    pub async fn render(
        &self,
        prompting: Prompting,
        options: &Options,
        admitted: &Admitted,
    ) -> Result<(String, Vec<u32>), ApiError> {
        let template = self.state.template.clone();
        let Prompting { messages, tools, tool_prompt, continue_final_message, add_generation_prompt, variables } =
            prompting;
        let wanted = Wanted { messages, tools, tool_prompt, continue_final_message, add_generation_prompt, variables };
        let mut size = admitted.body.len();
        let mut stage = Stage::Fitting(wanted);
        loop {
            let (template, options, limits) = (template.clone(), options.clone(), admitted.limits.clone());
            let work = move |encoder: &dyn Encode| stage.go_on(size, &template, encoder, &options, &limits);
            match self.state.pool.run(size, work).await?? {
                Stage::Done(text, ids) => return Ok((text, ids)),
                next => (stage, size) = (next, SHORT + 1),
            }
        }
    }

    /// Takes the request back from a part of it that has come to its end, for what follows.
    pub fn go_on(&mut self, flight: Flight) {
        self.ticket = Some(flight.ticket);
    }

    /// Whether there is a text of the form; and lets the shards get ready for it.
    async fn check_form(&self, grammar: &Grammar) -> Result<(), ApiError> {
        if !self.state.config.has_grammars {
            return Err(grammar.refused("grammar is not supported").into());
        }
        let judge = &self.state.judge;
        judge.check(grammar).await.map_err(|error| ApiError::of_grammar(grammar, &error))?;
        match self.state.engine.prepare(grammar).await {
            Err(GenerateError::Row { message, .. }) => {
                judge.disprove(grammar, &message);
                Err(ApiError::of_grammar(grammar, &GrammarError::Refused(message.into())))
            }
            prepared => Ok(prepared?),
        }
    }

    /// Queues all candidates of all prompts.
    pub async fn launch(
        &mut self,
        admitted: &Admitted,
        options: &Options,
        prompts: Vec<Prompt>,
        permits: Vec<Permit>,
    ) -> Result<(Flight, Streams), ApiError> {
        let num_characters = prompts.iter().map(|prompt| prompt.num_characters).sum();
        let valid = prompts.into_iter().map(|prompt| options.complete(prompt.ids, &admitted.limits));
        let valid: Vec<ValidRequest> = valid.collect::<Result<_, _>>()?;
        if let Some(grammar) = &options.sampling.grammar {
            self.check_form(grammar).await?;
        }
        let validated = Instant::now();
        let lengths = self.state.metrics.lengths();
        for request in &valid {
            lengths.input.record(request.prompt_ids.len() as f64);
            lengths.max_new.record(request.max_new_tokens as f64);
        }
        let num_prompt_tokens = valid.iter().map(|request| request.prompt_ids.len()).sum();
        let max_new_tokens = valid.first().map_or(0, |request| request.max_new_tokens);
        let namespace = self.namespace;
        let candidates = valid.into_iter().flat_map(|request| candidates(request, options.num_candidates, namespace));
        let mut streams = vec![];
        for (request, permit) in candidates.zip(permits) {
            streams.push(self.state.engine.generate(request, permit).await?);
        }
        let flight = Flight {
            ticket: self.ticket.take().expect("a request is launched once"),
            compute_type: compute_type(&self.state, &admitted.model),
            num_characters,
            num_prompt_tokens,
            options: options.clone(),
            max_new_tokens,
            validated,
            started: None,
            last_token: None,
            is_part: false,
        };
        Ok((flight, Streams::new(streams)))
    }
}

/// How far a chat has come on its way to ids.
#[derive(Debug)]
enum Stage {
    Fitting(Wanted),
    Rendering(Chat),
    Encoding(String),
    Done(String, Vec<u32>),
}

impl Stage {
    /// Goes on to the end; or, where only short texts are (`size`), up to what takes long.
    fn go_on(
        mut self,
        size: usize,
        template: &ChatTemplate,
        encoder: &dyn Encode,
        options: &Options,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        let is_among_short = size <= SHORT;
        loop {
            self = match self {
                Self::Fitting(wanted) => Self::Rendering(prompt::fit(template, wanted)?),
                Self::Rendering(chat) if is_among_short => match template.render_briefly(&chat) {
                    Err(RenderError::TooMuch) => return Ok(Self::Rendering(chat)),
                    rendered => Self::Encoding(rendered?),
                },
                Self::Rendering(chat) => Self::Encoding(template.render(&chat)?),
                Self::Encoding(text) => {
                    options.check_bytes(text.len(), limits)?;
                    if is_among_short && text.len() > SHORT {
                        return Ok(Self::Encoding(text));
                    }
                    // The template writes the special tokens itself.
                    let ids = encoder.encode(&text, false)?;
                    return Ok(Self::Done(text, ids));
                }
                Self::Done(..) => return Ok(self),
            }
        }
    }
}

/// One prompt.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub ids: Vec<u32>,
    pub num_characters: usize,
}

impl Prompt {
    pub fn new(text: &str, ids: Vec<u32>) -> Self {
        Self { ids, num_characters: text.chars().count() }
    }
}

/// They differ in the numbers they are drawn with, and in nothing else.
fn candidates(request: ValidRequest, count: usize, namespace: u64) -> impl Iterator<Item = ValidRequest> {
    // Most requests want one, which needs no copy.
    std::iter::repeat_n(request, count).enumerate().map(move |(branch, mut request)| {
        request.sampling.branch = branch as u32;
        request.namespace = namespace;
        request
    })
}

/// The model, if a request may come now.
pub(super) fn admit(state: &State) -> Result<Arc<ModelFacts>, ApiError> {
    if state.engine.is_draining() {
        return Err(ApiError::draining());
    }
    state.model().ok_or_else(ApiError::not_ready)
}

pub(super) fn limits(state: &State, model: &ModelFacts) -> Limits {
    let config = &state.config;
    Limits {
        max_best_of: config.max_best_of,
        max_client_batch_size: config.max_client_batch_size,
        max_choices: config.max_concurrent_requests.min(MAX_CHOICES),
        max_stop_sequences: config.max_stop_sequences,
        max_top_n_tokens: config.max_top_n_tokens,
        max_input_tokens: model.max_input_tokens,
        max_total_tokens: model.max_total_tokens,
        vocab_size: model.vocab_size,
        max_token_bytes: state.tokenizer.max_token_bytes(),
        model_id: config.model_id.clone(),
    }
}

fn compute_type(state: &State, model: &ModelFacts) -> HeaderValue {
    let by_device = || match model.device.as_str() {
        "cpu" => Some(HeaderValue::from_static("cpu+optimized")),
        device => HeaderValue::from_str(&format!("{device}+optimized")).ok(),
    };
    let said = state.config.compute_type.clone().or_else(by_device);
    said.unwrap_or(HeaderValue::from_static("unknown"))
}

/// The request's name, from now on known to all who handle it.
pub(super) fn name(request: &mut Request) -> RequestId {
    let id = RequestId::new(request.headers());
    request.extensions_mut().insert(id.clone());
    id
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Map, json};

    use super::*;
    use crate::chat::template::{DEFAULT, Source};
    use crate::text::tokenizer::Tokenizer;

    const TEMPLATE: &str = "{% if messages[0].content == 'loop' %}{% for i in range(100000) %}x{% endfor %}{% endif %}\
                            {{ messages[0].content * messages[0].times }}";

    fn limits() -> Limits {
        Limits {
            max_best_of: 2,
            max_client_batch_size: 4,
            max_choices: 4,
            max_stop_sequences: 4,
            max_top_n_tokens: 5,
            max_input_tokens: 1 << 20,
            max_total_tokens: 1 << 20,
            vocab_size: 4096,
            max_token_bytes: None,
            model_id: "model".into(),
        }
    }

    #[test]
    fn what_takes_long_is_done_where_long_texts_are_and_comes_to_the_same() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
        let tokenizer = Tokenizer::from_file(&file).unwrap();
        let source = Source { name: DEFAULT.into(), text: TEMPLATE.into(), file: String::new() };
        let template = ChatTemplate::new(vec![source], Map::new()).unwrap();
        let options = Options::default();
        let go_on = |stage: Stage, size: usize| stage.go_on(size, &template, &tokenizer, &options, &limits()).unwrap();
        let begin = |content: &str, times: usize| {
            let messages = vec![json!({"role": "user", "content": content, "times": times})];
            Stage::Fitting(Wanted { messages, ..Wanted::default() })
        };
        let ids = |stage: Stage| match stage {
            Stage::Done(text, ids) => (text, ids),
            other => panic!("{other:?}"),
        };
        let (text, of_short) = ids(go_on(begin("a b", 1), 100));
        assert_eq!((text.as_str(), of_short), ("a b", tokenizer.encode("a b", false).unwrap()));
        // A template that loops, and one that makes a long text of a short one.
        for (content, times) in [("loop", 1), ("a b ", 10_000)] {
            let left = go_on(begin(content, times), 100);
            assert!(matches!(left, Stage::Rendering(_) | Stage::Encoding(_)), "{left:?}");
            assert_eq!(ids(go_on(left, SHORT + 1)), ids(go_on(begin(content, times), SHORT + 1)));
        }
    }
}
