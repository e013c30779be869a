//! TGI's own routes: `/generate`, `/generate_stream`, `/`, and what they say to whom they refuse.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::options::{at_least_one, check_stops, penalty, positive, share, top_k};
use super::{Limits, Options, Refused, Sampling, form, invalid, json};

/// `parameters` of the native routes. `null` means absent, everywhere.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
#[schema(title = "GenerateParameters")]
pub struct GenerateParameters {
    /// Generate so many answers and return the one whose tokens are most probable on average.
    #[schema(minimum = 1, default = 1)]
    pub best_of: Option<u64>,
    /// Divides the logits before sampling.
    #[schema(exclusive_minimum = 0.0)]
    pub temperature: Option<f64>,
    /// Divides the logits of ids that have occurred, 1 for none.
    #[schema(exclusive_minimum = 0.0)]
    pub repetition_penalty: Option<f64>,
    /// Lowers the logits of ids by how often they have occurred, relative to the length.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub frequency_penalty: Option<f64>,
    /// Sample from so many most probable ids.
    #[schema(exclusive_minimum = 0)]
    pub top_k: Option<i64>,
    /// Sample from the most probable ids that have this share of the probability.
    #[schema(exclusive_minimum = 0.0, exclusive_maximum = 1.0)]
    pub top_p: Option<f64>,
    /// Sample from the ids whose surprise is closest to the expected one, up to this share of the probability.
    #[schema(exclusive_minimum = 0.0, exclusive_maximum = 1.0)]
    pub typical_p: Option<f64>,
    /// Sample; any of temperature, `top_k`, `top_p` and `typical_p` does so too.
    #[schema(default = false)]
    pub do_sample: Option<bool>,
    /// Tokens to generate at most; as many as fit, if not given.
    #[schema(minimum = 1)]
    pub max_new_tokens: Option<u64>,
    /// Repeat the prompt before the answer.
    pub return_full_text: Option<bool>,
    /// Texts that end the answer, which they are part of.
    pub stop: Option<Vec<String>>,
    /// Keep so many tokens from the end of the prompt.
    #[schema(minimum = 1)]
    pub truncate: Option<u64>,
    /// Mark the text as generated (Kirchenbauer et al. 2023, arXiv:2301.10226).
    #[schema(default = false)]
    pub watermark: Option<bool>,
    /// Return every token with its log-probability, and why the answer ended.
    #[schema(default = false)]
    pub details: Option<bool>,
    /// Return the prompt's tokens with their log-probabilities as well.
    #[schema(default = false)]
    pub decoder_input_details: Option<bool>,
    /// Of the sampling; another one each time, if not given.
    pub seed: Option<u64>,
    /// Return so many most probable tokens beside each generated one.
    pub top_n_tokens: Option<u64>,
    /// The form of the answer.
    #[schema(value_type = Option<Object>)]
    pub grammar: Option<Value>,
    /// The adapter to use; the served model's own name is one.
    pub adapter_id: Option<String>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos_token: Option<bool>,
}

/// Body of `/generate` and `/generate_stream`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct GenerateRequest {
    /// The prompt.
    #[schema(value_type = String, example = "My name is Olivier and I")]
    pub inputs: Option<String>,
    /// How the answer is generated.
    #[serde(default, deserialize_with = "json::object")]
    #[schema(required = false)]
    pub parameters: GenerateParameters,
}

/// Body of `/`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompatGenerateRequest {
    /// The prompt.
    #[schema(value_type = String)]
    pub inputs: Option<String>,
    /// How the answer is generated.
    #[serde(default, deserialize_with = "json::object")]
    #[schema(required = false)]
    pub parameters: GenerateParameters,
    /// Whether tokens are sent as they come.
    #[schema(default = false)]
    pub stream: Option<bool>,
}

/// How an answer is wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Delivery {
    /// At once.
    Whole,
    /// Token by token.
    Stream,
    /// As the body's field `stream` says.
    AsAsked,
}

/// A body whose parameters are within their limits; its prompt is still text.
#[derive(Clone, Debug, PartialEq)]
pub struct WireRequest {
    /// The prompt.
    pub inputs: String,
    /// Whether tokens are sent as they come.
    pub stream: bool,
    /// Whether tokens and the reason of the end are wanted.
    pub details: bool,
    /// Whether the prompt is repeated before the answer; each route has its own default.
    pub return_full_text: Option<bool>,
    /// How it is generated.
    pub options: Options,
}

/// Judges a body, all but the length of its prompt.
pub fn parse(body: &[u8], delivery: Delivery, limits: &Limits) -> Result<WireRequest, Refused> {
    check(json::read(body)?, delivery, limits)
}

/// Judges a request, all but the length of its prompt, in the order of TGI.
pub fn check(
    CompatGenerateRequest { inputs, parameters, stream }: CompatGenerateRequest,
    delivery: Delivery,
    limits: &Limits,
) -> Result<WireRequest, Refused> {
    let inputs = inputs.ok_or_else(|| invalid("missing field `inputs`"))?;
    let stream = match delivery {
        Delivery::Whole => false,
        Delivery::Stream => true,
        Delivery::AsAsked => stream.unwrap_or(false),
    };
    let num_candidates = best_of(&parameters, stream, limits)?;
    let sampling = sampling(&parameters, num_candidates, limits)?;
    if inputs.is_empty() {
        return Err(invalid("`inputs` cannot be empty"));
    }
    let truncate = parameters.truncate.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if truncate.is_some_and(|n| !(1..=limits.max_input_tokens).contains(&n)) {
        let (most, given) = (limits.max_input_tokens, truncate.unwrap_or_default());
        return Err(invalid(format!("`truncate` must be strictly positive and less than {most}. Given: {given}")));
    }
    let form = form::read(parameters.grammar.as_ref(), "grammar", false)?;
    let grammar = form.map(|form| form::bind(form, "grammar", &[])).transpose()?;
    check_adapter(parameters.adapter_id.as_deref(), limits)?;
    let wants_prompt_logprobs = parameters.decoder_input_details.unwrap_or(false);
    let options = Options {
        ignore_eos: parameters.ignore_eos_token.unwrap_or(false) && grammar.is_none(),
        sampling: Sampling { grammar, ..sampling },
        num_candidates,
        num_choices: 1,
        max_new_tokens: parameters.max_new_tokens.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        truncate,
        stop: parameters.stop.unwrap_or_default(),
        cuts_stop: false,
        wants_prompt_logprobs,
        prompt_name: "inputs",
    };
    options.check_bytes(inputs.len(), limits)?;
    Ok(WireRequest {
        inputs,
        stream,
        details: parameters.details.unwrap_or(false) || wants_prompt_logprobs,
        return_full_text: parameters.return_full_text,
        options,
    })
}

/// Candidates to generate. What TGI judges before all else.
fn best_of(parameters: &GenerateParameters, stream: bool, limits: &Limits) -> Result<usize, Refused> {
    let best_of = parameters.best_of.map_or(1, |n| usize::try_from(n).unwrap_or(usize::MAX));
    if stream && best_of != 1 {
        return Err(invalid("`best_of` != 1 is not supported when streaming tokens"));
    }
    if stream && parameters.decoder_input_details == Some(true) {
        return Err(invalid("`decoder_input_details` == true is not supported when streaming tokens"));
    }
    match (best_of, limits.max_best_of) {
        (0, _) => return Err(invalid("`best_of` must be strictly positive")),
        (1, _) => return Ok(1),
        (_, 1) => return Err(invalid("`best_of` != 1 is not allowed for this endpoint")),
        (given, most) if given > most => {
            return Err(invalid(format!("`best_of` must be > 0 and <= {most}. Given: {given}")));
        }
        _ => {}
    }
    let GenerateParameters { temperature, top_k, top_p, typical_p, .. } = parameters;
    let is_warped = temperature.is_some() || top_k.is_some() || top_p.is_some() || typical_p.is_some();
    if parameters.do_sample != Some(true) && !is_warped {
        return Err(invalid("you must use sampling when `best_of` is > 1"));
    }
    Ok(best_of)
}

fn sampling(parameters: &GenerateParameters, num_candidates: usize, limits: &Limits) -> Result<Sampling, Refused> {
    let temperature = positive("temperature", parameters.temperature, 1.0)?;
    let repetition_penalty = positive("repetition_penalty", parameters.repetition_penalty, 1.0)?;
    let frequency_penalty = penalty("frequency_penalty", parameters.frequency_penalty)?;
    for (name, value) in [("top_p", parameters.top_p), ("typical_p", parameters.typical_p)] {
        if value.is_some_and(|value| !(value > 0.0 && value < 1.0)) {
            return Err(invalid(format!("`{name}` must be > 0.0 and < 1.0")));
        }
    }
    let top_k = top_k(parameters.top_k)?;
    at_least_one("max_new_tokens", parameters.max_new_tokens)?;
    check_stops(parameters.stop.as_deref().unwrap_or_default(), limits)?;
    if num_candidates > 1 && parameters.seed.is_some() {
        return Err(invalid("`seed` must not be set when `best_of` > 1"));
    }
    let top_n = parameters.top_n_tokens.unwrap_or(0);
    if top_n > u64::from(limits.max_top_n_tokens) {
        let most = limits.max_top_n_tokens;
        return Err(invalid(format!("`top_n_tokens` must be >= 0 and <= {most}. Given: {top_n}")));
    }
    let is_warped = temperature != 1.0 || top_k != 0 || parameters.top_p.is_some() || parameters.typical_p.is_some();
    Ok(Sampling {
        // As in TGI, an option that is given but changes nothing (temperature 1) does not make it draw. Candidates that do
        // not differ would be no choice.
        do_sample: parameters.do_sample == Some(true) || is_warped || num_candidates > 1,
        temperature,
        top_k,
        top_p: share(parameters.top_p),
        typical_p: share(parameters.typical_p),
        repetition_penalty,
        frequency_penalty,
        seed: parameters.seed.unwrap_or_else(Sampling::any_seed),
        top_n: top_n as u32,
        watermark: parameters.watermark.unwrap_or(false),
        ..Sampling::default()
    })
}

fn check_adapter(id: Option<&str>, limits: &Limits) -> Result<(), Refused> {
    match id {
        Some(id) if !limits.names_the_model(id) => Err(invalid("`adapter_id` names no adapter that is served")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_limits;
    use super::*;

    fn limits() -> Limits {
        test_limits()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<WireRequest, Refused> {
        super::parse(body, Delivery::AsAsked, limits)
    }

    fn with(parameters: &str) -> Result<WireRequest, Refused> {
        parse(format!(r#"{{"inputs":"a","parameters":{parameters}}}"#).as_bytes(), &limits())
    }

    #[test]
    fn omitted_parameters_mean_the_same_as_empty_ones() {
        let mut omitted = parse(br#"{"inputs":"a"}"#, &limits()).unwrap();
        let empty = with("{}").unwrap();
        assert!(!omitted.options.sampling.do_sample);
        omitted.options.sampling.seed = empty.options.sampling.seed;
        assert_eq!(omitted, empty);
    }

    #[test]
    fn any_warper_turns_sampling_on() {
        for parameters in [r#"{"do_sample":true}"#, r#"{"temperature":0.9}"#, r#"{"top_k":3}"#, r#"{"top_p":0.5}"#] {
            assert!(with(parameters).unwrap().options.sampling.do_sample, "{parameters}");
        }
        for parameters in [r#"{"repetition_penalty":1.2,"seed":4}"#, r#"{"temperature":1.0}"#, r#"{"do_sample":null}"#]
        {
            assert!(!with(parameters).unwrap().options.sampling.do_sample, "{parameters}");
        }
    }

    #[test]
    fn the_log_names_what_is_not_neutral() {
        let described = |parameters| with(parameters).unwrap().options.sampling.to_string();
        assert_eq!(described(r#"{"seed":7,"stop":["x"]}"#), "greedy");
        assert_eq!(
            described(r#"{"temperature":0.7,"top_k":40,"repetition_penalty":1.25,"top_n_tokens":2}"#),
            "sampled temperature=0.7 top_k=40 repetition_penalty=1.25 top_n_tokens=2"
        );
    }

    #[test]
    fn a_tiny_top_p_stays_one() {
        assert!(with(r#"{"top_p":1e-60}"#).unwrap().options.sampling.top_p > 0.0);
        assert_eq!(with(r#"{"top_p":0.9999999999}"#).unwrap().options.sampling.top_p, 1.0);
    }

    #[test]
    fn lengths_are_judged_exactly() {
        let ids = |n: u32| (0..n).collect::<Vec<u32>>();
        let five = with(r#"{"max_new_tokens":5}"#).unwrap();
        assert!(five.options.complete(ids(15), &limits()).is_ok());
        let message = five.options.complete(ids(16), &limits()).unwrap_err().to_string();
        assert_eq!(
            message,
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 20. Given: 16 `inputs` tokens and 5 \
             `max_new_tokens`"
        );
        let open = with("{}").unwrap();
        assert_eq!(open.options.complete(ids(15), &limits()).unwrap().max_new_tokens, 5);
        let message = open.options.complete(ids(16), &limits()).unwrap_err().to_string();
        assert_eq!(message, "Input validation error: `inputs` must have less than 15 tokens. Given: 16");
        assert!(open.options.complete(vec![100], &limits()).is_err(), "an id that the model does not know");
    }

    #[test]
    fn truncation_keeps_the_last_tokens() {
        let wire = with(r#"{"truncate":2,"max_new_tokens":1}"#).unwrap();
        assert_eq!(wire.options.complete(vec![1, 2, 3], &limits()).unwrap().prompt_ids, [2, 3]);
    }

    #[test]
    fn a_text_of_too_many_bytes_is_refused_before_it_is_tokenized() {
        let body = format!(r#"{{"inputs":"{}"}}"#, "a".repeat(8 * 16));
        assert!(matches!(parse(body.as_bytes(), &limits()), Err(Refused::Invalid(_))));
        let body = format!(r#"{{"inputs":"{}"}}"#, "a".repeat(8 * 15));
        assert!(parse(body.as_bytes(), &limits()).is_ok());
    }

    #[test]
    fn a_refusal_says_what_is_wrong_in_the_words_of_json() {
        for (parameters, expected) in [
            (r#"{"temperature":0}"#, "`temperature` must be strictly positive"),
            (r#"{"temperature":1e-60}"#, "`temperature` must be strictly positive"),
            (r#"{"temperature":1e39}"#, "`temperature` must be <= 3.4028235e38. Given: 1e39"),
            (r#"{"repetition_penalty":1e39}"#, "`repetition_penalty` must be <= 3.4028235e38. Given: 1e39"),
            (r#"{"top_k":-1}"#, "`top_k` must be strictly positive"),
            (r#"{"top_k":2147483648}"#, "`top_k` must be <= 2147483647. Given: 2147483648"),
            (r#"{"top_k":9223372036854775808}"#, "integer `9223372036854775808`, expected a smaller one at line"),
            (r#"{"top_k":1.5}"#, "`parameters.top_k`: invalid type: floating point `1.5`, expected an integer at line"),
            (r#"{"temperature":"1"}"#, "invalid type: string \"1\", expected a number at line 1"),
            (r#"{"seed":-1}"#, "expected an integer from 0 to 18446744073709551615 at line"),
            (r#"{"seed":18446744073709551616}"#, "expected an integer from 0 to 18446744073709551615 at line"),
            (r#"{"do_sample":", expected f64"}"#, "string \", expected f64\", expected a boolean at line"),
            (r#"{"stop":"a"}"#, "expected a sequence at line"),
            (r#"{"best_of":0}"#, "`best_of` must be strictly positive"),
            (r#"{"best_of":3,"do_sample":true}"#, "`best_of` must be > 0 and <= 2. Given: 3"),
            (r#"{"best_of":2}"#, "you must use sampling when `best_of` is > 1"),
            (r#"{"best_of":2,"top_k":3,"seed":1}"#, "`seed` must not be set when `best_of` > 1"),
            (r#"{"adapter_id":"x"}"#, "`adapter_id` names no adapter that is served"),
            (r#"{"grammar":{"type":"regex","value":7}}"#, "`grammar`: `value` must be a text"),
        ] {
            let message = with(parameters).unwrap_err().to_string();
            assert!(message.contains(expected), "{parameters}: {message}");
        }
    }

    #[test]
    fn a_list_is_not_an_object() {
        for body in [r#"["hi"]"#, r#"{"inputs":"a","parameters":[]}"#, "7", "null"] {
            assert!(matches!(parse(body.as_bytes(), &limits()), Err(Refused::Invalid(_))), "{body}");
        }
    }
}
