//! From wire JSON to requests that can be generated: every limit and default, no I/O.
//!
//! Two steps, with templates and tokenizing between them: a `parse` for each family of routes judges the body,
//! [`Options::complete`] the length of its prompt.

use std::fmt;

use rand::Rng;

pub mod chat;
mod chat_checks;
pub mod completions;
pub mod form;
pub mod json;
pub mod limits;
pub mod native;
mod openai;
mod options;
pub mod small;

pub use limits::Limits;
pub use options::Options;

/// How ids are drawn. Values are those of `proto/shard.proto`'s `Sampling`: an option that is off has its neutral value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Without it the most probable id is taken.
    pub do_sample: bool,
    /// 1 leaves the distribution as it is.
    pub temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1: off.
    pub top_p: f32,
    /// 1: off.
    pub typical_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
    /// 0: off. TGI's: over prompt and generated ids, relative to their number.
    pub frequency_penalty: f32,
    /// 0: off. Over generated ids.
    pub presence_penalty: f32,
    /// 0: off. `OpenAI`'s: over generated ids, for each time that one has occurred.
    pub count_penalty: f32,
    /// What is added to the logits of some ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Of the counter-based draws.
    pub seed: u64,
    /// Tells the candidates of one request apart.
    pub branch: u32,
    /// Most probable ids to report beside the chosen one.
    pub top_n: u32,
    /// As long as fewer ids are generated, none that ends the sequence is.
    pub min_new_tokens: u32,
    /// Whether the text is marked as generated.
    pub watermark: bool,
    /// What the text must be.
    pub grammar: Option<form::Grammar>,
}

impl Default for Sampling {
    /// The most probable ids, and nothing changed about them.
    fn default() -> Self {
        Self {
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            count_penalty: 0.0,
            logit_bias: vec![],
            seed: 0,
            branch: 0,
            top_n: 0,
            min_new_tokens: 0,
            watermark: false,
            grammar: None,
        }
    }
}

/// For the log: what is not neutral, as the client writes it. The seed is told apart.
impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = [
            ("temperature", self.temperature, 1.0),
            ("top_k", self.top_k as f32, 0.0),
            ("top_p", self.top_p, 1.0),
            ("typical_p", self.typical_p, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1.0),
            ("frequency_penalty", self.frequency_penalty + self.count_penalty, 0.0),
            ("presence_penalty", self.presence_penalty, 0.0),
            ("logit_biases", self.logit_bias.len() as f32, 0.0),
            ("top_n_tokens", self.top_n as f32, 0.0),
            ("min_tokens", self.min_new_tokens as f32, 0.0),
            ("watermark", f32::from(u8::from(self.watermark)), 0.0),
            ("grammar_bytes", self.grammar.as_ref().map_or(0, |grammar| grammar.source.len()) as f32, 0.0),
        ];
        f.write_str(if self.do_sample { "sampled" } else { "greedy" })?;
        let mut given = numbers.iter().filter(|(_, value, neutral)| value != neutral);
        given.try_for_each(|(name, value, _)| write!(f, " {name}={value}"))
    }
}

impl Sampling {
    /// A seed that nobody has chosen.
    pub(crate) fn any_seed() -> u64 {
        rand::rng().random()
    }
}

/// A request within every limit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValidRequest {
    /// The prompt, special tokens included, truncated where asked.
    pub prompt_ids: Vec<u32>,
    /// At least 1; prompt and these fit in `max_total_tokens`.
    pub max_new_tokens: usize,
    /// Strings that end the generation.
    pub stop: Vec<String>,
    /// The text of a stop string is not part of the answer. In TGI's own routes it is.
    pub cuts_stop: bool,
    /// How ids are drawn.
    pub sampling: Sampling,
    /// An end-of-sequence id is an id like any other.
    pub ignore_eos: bool,
    /// The log-probabilities of the prompt's ids are wanted.
    pub wants_prompt_logprobs: bool,
    /// Whose prompts may be known from each other's answering times: those of one namespace.
    pub namespace: u64,
}

/// Why a body is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    /// It is not JSON.
    #[error("{0}")]
    Malformed(String),
    /// It is JSON that asks for something that is not given.
    #[error("Input validation error: {0}")]
    Invalid(String),
    /// Something about its tools.
    #[error("Tool error: {0}")]
    Tool(String),
    /// It names a model that is not served.
    #[error("the model {0:?} is not served here")]
    UnknownModel(String),
    /// A completion within a text.
    #[error("Suffix is not supported and can be achieved by preprocessing the prompt.")]
    Suffix,
    /// Too many prompts.
    #[error("Number of prompts exceeds the maximum allowed batch size of {0}")]
    BatchSize(usize),
    /// Something that TGI gives a kind of its own.
    #[error("{text}")]
    Other {
        /// The kind.
        error_type: &'static str,
        /// In words.
        text: String,
    },
}

pub(crate) fn invalid(cause: impl Into<String>) -> Refused {
    Refused::Invalid(cause.into())
}

#[cfg(test)]
pub(crate) fn test_limits() -> Limits {
    Limits {
        max_best_of: 2,
        max_client_batch_size: 4,
        max_choices: 8,
        max_stop_sequences: 4,
        max_top_n_tokens: 5,
        max_input_tokens: 15,
        max_total_tokens: 20,
        vocab_size: 100,
        max_token_bytes: Some(8),
        model_id: "m".into(),
    }
}
