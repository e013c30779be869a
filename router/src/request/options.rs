//! What all routes share: how the answer to a prompt is generated, and the checks of single values.

use super::limits::{MAX_PENALTY, MAX_STOP_CHARS};
use super::{Limits, Refused, Sampling, ValidRequest, invalid};

/// How answers to a prompt are generated; the prompt may still be text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// How ids are drawn, by the first candidate.
    pub sampling: Sampling,
    /// Candidates that are generated, one at least.
    pub num_candidates: usize,
    /// How many of them are answered: the best ones.
    pub num_choices: usize,
    pub(super) max_new_tokens: Option<usize>,
    pub(super) truncate: Option<usize>,
    pub(super) stop: Vec<String>,
    pub(super) cuts_stop: bool,
    pub(super) ignore_eos: bool,
    /// Whether the log-probabilities of the prompt's ids are wanted.
    pub wants_prompt_logprobs: bool,
    /// What the prompt is called in errors.
    pub(super) prompt_name: &'static str,
}

impl Options {
    /// The seed, if ids are drawn.
    pub fn seed(&self) -> Option<u64> {
        self.sampling.do_sample.then_some(self.sampling.seed)
    }

    /// Refuses a text that cannot fit whatever its tokens are, without tokenizing it.
    pub fn check_bytes(&self, num_bytes: usize, limits: &Limits) -> Result<(), Refused> {
        let Some(max_token_bytes) = limits.max_token_bytes else { return Ok(()) };
        let least = num_bytes.div_ceil(max_token_bytes);
        if self.truncate.is_none() && least > limits.max_input_tokens {
            let (name, most) = (self.prompt_name, limits.max_input_tokens);
            return Err(invalid(format!("`{name}` must have less than {most} tokens. Given: at least {least}")));
        }
        Ok(())
    }

    /// Judges the prompt's length. `ids`: the prompt, special tokens included. The first candidate; the others differ from
    /// it in their branch alone.
    pub fn complete(&self, mut ids: Vec<u32>, limits: &Limits) -> Result<ValidRequest, Refused> {
        let name = self.prompt_name;
        if let Some(most) = self.truncate {
            ids.drain(..ids.len().saturating_sub(most));
        }
        if ids.is_empty() {
            return Err(invalid(format!("`{name}` has no tokens")));
        }
        if let Some(id) = ids.iter().find(|id| **id >= limits.vocab_size) {
            let most = limits.vocab_size - 1;
            return Err(invalid(format!("`{name}` has a token with id {id}; the model knows ids up to {most}")));
        }
        let (num_prompt, total) = (ids.len(), limits.max_total_tokens);
        let max_new_tokens = self.max_new_tokens.unwrap_or_else(|| total.saturating_sub(num_prompt).max(1));
        if num_prompt.saturating_add(max_new_tokens) > total {
            return Err(invalid(format!(
                "`{name}` tokens + `max_new_tokens` must be <= {total}. Given: {num_prompt} `{name}` tokens and \
                 {max_new_tokens} `max_new_tokens`"
            )));
        }
        if num_prompt > limits.max_input_tokens {
            let most = limits.max_input_tokens;
            return Err(invalid(format!("`{name}` must have less than {most} tokens. Given: {num_prompt}")));
        }
        if self.sampling.min_new_tokens as usize > max_new_tokens {
            let least = self.sampling.min_new_tokens;
            return Err(invalid(format!("`min_tokens` must be <= {max_new_tokens}. Given: {least}")));
        }
        Ok(ValidRequest {
            prompt_ids: ids,
            max_new_tokens,
            stop: self.stop.clone(),
            cuts_stop: self.cuts_stop,
            sampling: self.sampling.clone(),
            ignore_eos: self.ignore_eos,
            wants_prompt_logprobs: self.wants_prompt_logprobs,
            namespace: 0,
        })
    }
}

/// A number of JSON as it is computed with.
pub(super) fn narrow(value: Option<f64>, neutral: f32) -> f32 {
    value.map_or(neutral, |value| value as f32)
}

/// A number above zero and within the range of `f32`.
pub(super) fn positive(name: &str, value: Option<f64>, neutral: f32) -> Result<f32, Refused> {
    match narrow(value, neutral) {
        // As in TGI, also for what is so small that it is zero in `f32`.
        number if number <= 0.0 => Err(invalid(format!("`{name}` must be strictly positive"))),
        number if number.is_finite() => Ok(number),
        _ => Err(invalid(format!("`{name}` must be <= {:e}. Given: {:e}", f32::MAX, value.unwrap_or_default()))),
    }
}

/// A number from -2 to 2.
pub(super) fn penalty(name: &str, value: Option<f64>) -> Result<f32, Refused> {
    let value = value.unwrap_or(0.0);
    if (-MAX_PENALTY..=MAX_PENALTY).contains(&value) {
        Ok(value as f32)
    } else {
        Err(invalid(format!("`{name}` must be >= -{MAX_PENALTY:.1} and <= {MAX_PENALTY:.1}")))
    }
}

/// The smallest value that is one: rounding to `f32` must not switch the option off or empty the support.
pub(super) fn share(value: Option<f64>) -> f32 {
    narrow(value, 1.0).clamp(f32::MIN_POSITIVE, 1.0)
}

pub(super) fn top_k(value: Option<i64>) -> Result<u32, Refused> {
    match value {
        None => Ok(0),
        Some(k) if k <= 0 => Err(invalid("`top_k` must be strictly positive")),
        Some(k) => u32::try_from(k)
            .ok()
            .filter(|k| *k <= i32::MAX as u32)
            .ok_or_else(|| invalid(format!("`top_k` must be <= {}. Given: {k}", i32::MAX))),
    }
}

/// A count of tokens to generate.
pub(super) fn at_least_one(name: &str, value: Option<u64>) -> Result<Option<usize>, Refused> {
    match value.map(|n| usize::try_from(n).unwrap_or(usize::MAX)) {
        Some(0) => Err(invalid(format!("`{name}` must be strictly positive"))),
        count => Ok(count),
    }
}

pub(super) fn check_stops(stop: &[String], limits: &Limits) -> Result<(), Refused> {
    if stop.len() > limits.max_stop_sequences {
        let (most, given) = (limits.max_stop_sequences, stop.len());
        return Err(invalid(format!("`stop` supports up to {most} stop sequences. Given: {given}")));
    }
    if stop.iter().any(String::is_empty) {
        return Err(invalid("`stop` sequences cannot be empty"));
    }
    if stop.iter().any(|stop| stop.chars().count() > MAX_STOP_CHARS) {
        return Err(invalid(format!("`stop` sequences must have at most {MAX_STOP_CHARS} characters")));
    }
    Ok(())
}
