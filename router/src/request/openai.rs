//! What the two `OpenAI` routes have in common.

use std::collections::BTreeMap;

use serde_json::Value;

use super::limits::{MAX_BIAS, MAX_BIASES};
use super::options::{at_least_one, check_stops, penalty, positive, share, top_k};
use super::{Limits, Options, Refused, Sampling, invalid};

/// Fields that both routes have, as they came.
#[derive(Debug, Default)]
pub(super) struct Shared<'a> {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub frequency_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub logit_bias: Option<&'a BTreeMap<String, f64>>,
    pub max_tokens: (&'static str, Option<u64>),
    pub min_tokens: Option<u64>,
    pub stop: Option<&'a Value>,
    pub seed: Option<u64>,
    pub n: Option<u64>,
    pub best_of: Option<u64>,
    pub ignore_eos: Option<bool>,
    pub top_n: u64,
    pub prompt_name: &'static str,
}

/// Those of them that both bodies spell alike.
macro_rules! shared {
    ($request:expr) => {
        $crate::request::openai::Shared {
            temperature: $request.temperature,
            top_p: $request.top_p,
            top_k: $request.top_k,
            frequency_penalty: $request.frequency_penalty,
            presence_penalty: $request.presence_penalty,
            repetition_penalty: $request.repetition_penalty,
            min_tokens: $request.min_tokens,
            seed: $request.seed,
            n: $request.n,
            ignore_eos: $request.ignore_eos,
            logit_bias: $request.logit_bias.as_ref(),
            stop: $request.stop.as_ref(),
            ..Default::default()
        }
    };
}
pub(super) use shared;

/// As in TGI, these routes sample unless the temperature is 0.
pub(super) fn options(shared: &Shared<'_>, limits: &Limits) -> Result<Options, Refused> {
    let is_greedy = shared.temperature == Some(0.0);
    let temperature = if is_greedy { 1.0 } else { positive("temperature", shared.temperature, 1.0)? };
    if shared.top_p.is_some_and(|value| !(value > 0.0 && value <= 1.0)) {
        return Err(invalid("`top_p` must be > 0.0 and <= 1.0"));
    }
    let frequency_penalty = penalty("frequency_penalty", shared.frequency_penalty)?;
    let presence_penalty = penalty("presence_penalty", shared.presence_penalty)?;
    let repetition_penalty = positive("repetition_penalty", shared.repetition_penalty, 1.0)?;
    let max_new_tokens = at_least_one(shared.max_tokens.0, shared.max_tokens.1)?;
    let stop = stops(shared.stop)?;
    check_stops(&stop, limits)?;
    let num_choices = choices("n", shared.n, limits)?;
    let num_candidates = choices("best_of", shared.best_of, limits)?;
    if shared.best_of.is_some() && num_candidates < num_choices {
        return Err(invalid("`best_of` must be at least `n`"));
    }
    let sampling = Sampling {
        do_sample: !is_greedy,
        temperature,
        top_k: top_k(shared.top_k)?,
        top_p: share(shared.top_p),
        repetition_penalty,
        count_penalty: frequency_penalty,
        presence_penalty,
        logit_bias: biases(shared.logit_bias, limits)?,
        seed: shared.seed.unwrap_or_else(Sampling::any_seed),
        top_n: shared.top_n as u32,
        min_new_tokens: u32::try_from(shared.min_tokens.unwrap_or(0)).unwrap_or(u32::MAX),
        ..Sampling::default()
    };
    Ok(Options {
        sampling,
        num_candidates: num_candidates.max(num_choices),
        num_choices,
        max_new_tokens,
        truncate: None,
        stop,
        cuts_stop: true,
        ignore_eos: shared.ignore_eos.unwrap_or(false),
        wants_prompt_logprobs: false,
        prompt_name: shared.prompt_name,
    })
}

fn choices(name: &str, value: Option<u64>, limits: &Limits) -> Result<usize, Refused> {
    let most = limits.max_choices;
    match value.map_or(1, |n| usize::try_from(n).unwrap_or(usize::MAX)) {
        n if (1..=most).contains(&n) => Ok(n),
        given => Err(invalid(format!("`{name}` must be >= 1 and <= {most}. Given: {given}"))),
    }
}

/// A text, or a list of texts.
fn stops(value: Option<&Value>) -> Result<Vec<String>, Refused> {
    let wrong = || invalid("`stop`: expected a text or a list of texts");
    match value {
        None | Some(Value::Null) => Ok(vec![]),
        Some(Value::String(stop)) => Ok(vec![stop.clone()]),
        Some(Value::Array(stops)) => {
            stops.iter().map(|stop| stop.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

fn biases(biases: Option<&BTreeMap<String, f64>>, limits: &Limits) -> Result<Vec<(u32, f32)>, Refused> {
    let Some(biases) = biases else { return Ok(vec![]) };
    if biases.len() > MAX_BIASES {
        return Err(invalid(format!("`logit_bias` has {} ids, expected at most {MAX_BIASES}", biases.len())));
    }
    let one = |(id, bias): (&String, &f64)| {
        let below = limits.vocab_size;
        let id = id.parse().ok().filter(|id| *id < below);
        let id = id.ok_or_else(|| invalid(format!("`logit_bias`: expected ids from 0 to {}", below - 1)))?;
        if !(-MAX_BIAS..=MAX_BIAS).contains(bias) {
            return Err(invalid(format!("`logit_bias`: expected values from -{MAX_BIAS} to {MAX_BIAS}")));
        }
        Ok((id, *bias as f32))
    };
    biases.iter().map(one).collect()
}

/// Whether the model that is asked for is the one that is served.
pub(super) fn check_model(model: Option<&str>, limits: &Limits) -> Result<(), Refused> {
    match model {
        Some(model) if !limits.names_the_model(model) => Err(Refused::UnknownModel(model.chars().take(100).collect())),
        _ => Ok(()),
    }
}

/// `stream_options`, which make no sense without a stream.
pub(super) fn include_usage(options: Option<&StreamOptions>, stream: bool) -> Result<bool, Refused> {
    match options {
        Some(_) if !stream => Err(invalid("`stream_options` is only allowed when `stream` is true")),
        Some(options) => Ok(options.include_usage.unwrap_or(false)),
        None => Ok(false),
    }
}

/// What a stream ends with.
#[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize, utoipa::ToSchema)]
#[serde(default)]
pub struct StreamOptions {
    /// Whether a last chunk tells how many tokens there were.
    pub include_usage: Option<bool>,
}
