//! Tokens with their log-probabilities, as `OpenAI` writes them.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::{PromptToken, Token, TopToken};
use crate::text::tokenizer::Encode;

/// A token of a chat's answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatCompletionTopLogprob>,
}

/// A token that might have stood in another's place.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionTopLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// The tokens of a chat's answer, or of a chunk of it.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatCompletionLogprobs {
    pub content: Vec<ChatCompletionLogprob>,
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(super) fn chat_logprob(tokenizer: &dyn Encode, token: &Token) -> ChatCompletionLogprob {
    let bytes = tokenizer.spell(token.id);
    let top = |top: &TopToken| {
        let bytes = tokenizer.spell(top.id);
        ChatCompletionTopLogprob { token: text_of(&bytes), logprob: finite(top.logprob), bytes }
    };
    ChatCompletionLogprob {
        token: text_of(&bytes),
        logprob: finite(token.logprob),
        bytes,
        top_logprobs: token.top.iter().map(top).collect(),
    }
}

/// JSON has no infinity; what is impossible is told as very improbable, as `OpenAI` does.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// The tokens of a completion, column by column.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    text_offset: Vec<usize>,
    /// Characters so far.
    #[serde(skip)]
    length: usize,
}

impl CompletionLogprobs {
    /// Begins behind so many characters.
    pub fn at(length: usize) -> Self {
        Self { length, ..Self::default() }
    }

    /// Characters so far.
    pub fn length(&self) -> usize {
        self.length
    }

    pub fn push(&mut self, tokenizer: &dyn Encode, token: &Token) {
        self.add(tokenizer, token.id, Some(token.logprob), &token.top);
    }

    /// `rest`: what is left of the prompt's text. A token that was added to it takes no place in it.
    pub fn push_prompt<'a>(&mut self, tokenizer: &dyn Encode, token: &PromptToken, rest: &'a str) -> &'a str {
        let before = self.length;
        self.add(tokenizer, token.id, token.logprob, &token.top);
        match self.tokens.last().and_then(|text| rest.strip_prefix(text.as_str())) {
            Some(rest) => rest,
            None => {
                self.length = before;
                rest
            }
        }
    }

    fn add(&mut self, tokenizer: &dyn Encode, id: u32, logprob: Option<f32>, top: &[TopToken]) {
        let text = text_of(&tokenizer.spell(id));
        let alternatives = top.iter().map(|top| (text_of(&tokenizer.spell(top.id)), finite(top.logprob)));
        self.top_logprobs.push(logprob.map(|_| alternatives.collect()));
        self.token_logprobs.push(logprob.map(finite));
        self.text_offset.push(self.length);
        self.length += text.chars().count();
        self.tokens.push(text);
    }
}
