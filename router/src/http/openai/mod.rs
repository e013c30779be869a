//! The routes of `OpenAI`'s API.

use std::time::{SystemTime, UNIX_EPOCH};

use rand::Rng;
use serde::Serialize;
use utoipa::ToSchema;

pub(super) mod chat;
pub(super) mod completions;
pub(super) mod models;
mod tokens;

use crate::engine::FinishReason;

/// How many tokens there were.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct Usage {
    /// Of the prompts.
    prompt_tokens: usize,
    /// Of all answers.
    completion_tokens: usize,
    /// Both.
    total_tokens: usize,
}

impl Usage {
    fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// What all chunks of an answer begin with.
#[derive(Clone, Debug)]
struct Heading {
    id: String,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Heading {
    fn new(prefix: &str, model: &str) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let system_fingerprint = concat!(env!("CARGO_PKG_VERSION"), "-native");
        Self { id: random_id(prefix, 32), created, model: model.into(), system_fingerprint }
    }
}

/// A name that nothing else has.
fn random_id(prefix: &str, length: usize) -> String {
    let mut rng = rand::rng();
    let letters = (0..length).map(|_| char::from(b"0123456789abcdefghijklmnopqrstuvwxyz"[rng.random_range(0..36)]));
    prefix.chars().chain(letters).collect()
}

/// What `OpenAI` calls the end of a generation.
fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EosToken | FinishReason::StopSequence => "stop",
    }
}
