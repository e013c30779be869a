//! From wire JSON to a request that can be generated: every limit and default, no I/O.
//!
//! Two steps, with tokenizing between them: `parse` judges the body, `WireRequest::complete` the length of its prompt.

use std::fmt;
use std::marker::PhantomData;

use rand::Rng;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

/// Levels of nested lists and objects: as many as serde reads.
const MAX_DEPTH: usize = 127;

/// Characters of one stop string.
const MAX_STOP_CHARS: usize = 256;

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
    /// 0: off.
    pub frequency_penalty: f32,
    /// Of the counter-based draws.
    pub seed: u64,
    /// Most probable ids to report beside the chosen one.
    pub top_n: u32,
}

/// For the log: what is not neutral, as the client writes it. The seed is told apart.
impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            do_sample,
            temperature,
            top_k,
            top_p,
            typical_p,
            repetition_penalty,
            frequency_penalty,
            seed: _,
            top_n,
        } = *self;
        let numbers = [
            ("temperature", temperature, 1.0),
            ("top_k", top_k as f32, 0.0),
            ("top_p", top_p, 1.0),
            ("typical_p", typical_p, 1.0),
            ("repetition_penalty", repetition_penalty, 1.0),
            ("frequency_penalty", frequency_penalty, 0.0),
            ("top_n_tokens", top_n as f32, 0.0),
        ];
        f.write_str(if do_sample { "sampled" } else { "greedy" })?;
        let mut given = numbers.iter().filter(|(_, value, neutral)| value != neutral);
        given.try_for_each(|(name, value, _)| write!(f, " {name}={value}"))
    }
}

/// A request within every limit.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    /// The prompt, special tokens included, truncated where asked.
    pub prompt_ids: Vec<u32>,
    /// At least 1; prompt and these fit in `max_total_tokens`.
    pub max_new_tokens: usize,
    /// Strings that end the generation; their text stays in the answer, as in TGI.
    pub stop: Vec<String>,
    /// How ids are drawn.
    pub sampling: Sampling,
    /// An end-of-sequence id is an id like any other.
    pub ignore_eos: bool,
}

/// What clients may ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Stop strings of one request.
    pub max_stop_sequences: usize,
    /// Most probable ids beside the chosen one.
    pub max_top_n_tokens: u32,
    /// Tokens of a prompt.
    pub max_input_tokens: usize,
    /// Tokens of a prompt and its answer.
    pub max_total_tokens: usize,
    /// Every id of a prompt is below it.
    pub vocab_size: u32,
    /// No token stands for more bytes of text, where that is known.
    pub max_token_bytes: Option<usize>,
    /// How the served model is called; beside it, `tgi` is a name for it.
    pub model_id: String,
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
}

fn invalid(cause: impl Into<String>) -> Refused {
    Refused::Invalid(cause.into())
}

/// `parameters` of the native routes. `null` means absent, everywhere.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Parameters {
    best_of: Option<u64>,
    temperature: Option<f64>,
    repetition_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    top_k: Option<i64>,
    top_p: Option<f64>,
    typical_p: Option<f64>,
    do_sample: Option<bool>,
    max_new_tokens: Option<u64>,
    return_full_text: Option<bool>,
    stop: Option<Vec<String>>,
    truncate: Option<u64>,
    watermark: Option<bool>,
    details: Option<bool>,
    decoder_input_details: Option<bool>,
    seed: Option<u64>,
    top_n_tokens: Option<u64>,
    grammar: Option<IgnoredAny>,
    adapter_id: Option<String>,
    ignore_eos_token: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Body {
    inputs: Option<String>,
    #[serde(default, deserialize_with = "object")]
    parameters: Parameters,
    stream: Option<bool>,
}

/// Reads a JSON object, or `null` for one without fields. Left alone, serde takes a list of the fields' values as well.
fn object<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de> + Default> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a JSON object")
        }

        fn visit_unit<E>(self) -> Result<T, E> {
            Ok(T::default())
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(Object(PhantomData))
}

/// A body whose parameters are within their limits; its prompt is still text.
#[derive(Clone, Debug, PartialEq)]
pub struct WireRequest {
    /// The prompt.
    pub inputs: String,
    /// Of the compatibility route `/` alone.
    pub stream: bool,
    /// Whether tokens and the reason of the end are wanted.
    pub details: bool,
    /// Whether the prompt is repeated before the answer; each route has its own default.
    pub return_full_text: Option<bool>,
    max_new_tokens: Option<usize>,
    truncate: Option<usize>,
    stop: Vec<String>,
    sampling: Sampling,
    ignore_eos: bool,
}

/// Judges a body, all but the length of its prompt.
pub fn parse(body: &[u8], limits: &Limits) -> Result<WireRequest, Refused> {
    let Body { inputs, parameters, stream } = read(body)?;
    let inputs = inputs.ok_or_else(|| invalid("missing field `inputs`"))?;
    refuse_what_is_not_served(&parameters, limits)?;
    let sampling = sampling(&parameters, limits)?;
    let max_new_tokens = parameters.max_new_tokens.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if max_new_tokens == Some(0) {
        return Err(invalid("`max_new_tokens` must be strictly positive"));
    }
    let stop = parameters.stop.unwrap_or_default();
    check_stops(&stop, limits)?;
    if inputs.is_empty() {
        return Err(invalid("`inputs` cannot be empty"));
    }
    let truncate = parameters.truncate.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if truncate.is_some_and(|n| !(1..=limits.max_input_tokens).contains(&n)) {
        let (most, given) = (limits.max_input_tokens, truncate.unwrap_or_default());
        return Err(invalid(format!("`truncate` must be strictly positive and less than {most}. Given: {given}")));
    }
    let request = WireRequest {
        inputs,
        stream: stream.unwrap_or(false),
        details: parameters.details.unwrap_or(false),
        return_full_text: parameters.return_full_text,
        max_new_tokens,
        truncate,
        stop,
        sampling,
        ignore_eos: parameters.ignore_eos_token.unwrap_or(false),
    };
    request.check_bytes(limits)?;
    Ok(request)
}

/// JSON to a body. First the whole is checked to be JSON, so that what is none is told from what asks for something odd;
/// that needs no memory and no stack, however deep it is.
fn read(body: &[u8]) -> Result<Body, Refused> {
    let malformed = |cause: &str| Refused::Malformed(format!("the body is not valid JSON: {cause}"));
    let text = std::str::from_utf8(body).map_err(|_| malformed("it is not UTF-8"))?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| malformed(&short(error.to_string(), 300)))?;
    if depth(text) > MAX_DEPTH {
        return Err(malformed(&format!("it is nested deeper than {MAX_DEPTH} levels")));
    }
    if !text.trim_start().starts_with('{') {
        return Err(invalid("the body must be a JSON object"));
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let cause = in_words(error.inner());
        let path = error.path();
        let is_field = path.iter().next().is_some();
        invalid(if is_field { format!("`{path}`: {cause}") } else { cause })
    })
}

/// How deep lists and objects are nested in a text that is JSON.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest, mut is_string, mut is_escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => is_string = !is_string,
            b'[' | b'{' if !is_string => depth += 1,
            b']' | b'}' if !is_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// Without most of what the client has sent.
fn short(mut text: String, most: usize) -> String {
    if let Some((at, _)) = text.char_indices().nth(most) {
        text.truncate(at);
    }
    text
}

/// What serde says, in the words of JSON rather than of Rust. What the client has sent stands before the last comma.
fn in_words(error: &serde_json::Error) -> String {
    let cause = error.to_string();
    let Some((found, expected)) = cause.rsplit_once(", expected ") else { return short(cause, 300) };
    let (name, rest) = expected.split_once(' ').unwrap_or((expected, ""));
    let is_too_large = found.contains("invalid value: integer");
    let words = match name {
        "f64" => "a number",
        "i64" if is_too_large => "a smaller one",
        "i64" => "an integer",
        "u64" => "an integer from 0 to 18446744073709551615",
        other => other,
    };
    format!("{}, expected {words} {rest}", short(found.into(), 200)).trim_end().into()
}

fn refuse_what_is_not_served(parameters: &Parameters, limits: &Limits) -> Result<(), Refused> {
    match parameters.best_of {
        None | Some(1) => {}
        Some(0) => return Err(invalid("`best_of` must be strictly positive")),
        Some(_) => return Err(invalid("`best_of` > 1 is not supported yet")),
    }
    let refused = [
        ("watermark", parameters.watermark == Some(true)),
        ("decoder_input_details", parameters.decoder_input_details == Some(true)),
        ("grammar", parameters.grammar.is_some()),
    ];
    if let Some((name, _)) = refused.iter().find(|(_, is_asked)| *is_asked) {
        return Err(invalid(format!("`{name}` is not supported yet")));
    }
    let names_the_model = |id: &String| *id == limits.model_id || id == "tgi";
    match &parameters.adapter_id {
        Some(id) if !names_the_model(id) => Err(invalid("`adapter_id` names no adapter that is served")),
        _ => Ok(()),
    }
}

/// A number of JSON as it is computed with.
fn narrow(value: Option<f64>, neutral: f32) -> f32 {
    value.map_or(neutral, |value| value as f32)
}

/// A number above zero and within the range of `f32`.
fn positive(name: &str, value: Option<f64>, neutral: f32) -> Result<f32, Refused> {
    match narrow(value, neutral) {
        // As in TGI, also for what is so small that it is zero in `f32`.
        number if number <= 0.0 => Err(invalid(format!("`{name}` must be strictly positive"))),
        number if number.is_finite() => Ok(number),
        _ => Err(invalid(format!("`{name}` must be <= {:e}. Given: {:e}", f32::MAX, value.unwrap_or_default()))),
    }
}

fn sampling(parameters: &Parameters, limits: &Limits) -> Result<Sampling, Refused> {
    let temperature = positive("temperature", parameters.temperature, 1.0)?;
    let repetition_penalty = positive("repetition_penalty", parameters.repetition_penalty, 1.0)?;
    let frequency_penalty = parameters.frequency_penalty.unwrap_or(0.0);
    if !(-2.0..=2.0).contains(&frequency_penalty) {
        return Err(invalid("`frequency_penalty` must be >= -2.0 and <= 2.0"));
    }
    for (name, value) in [("top_p", parameters.top_p), ("typical_p", parameters.typical_p)] {
        if value.is_some_and(|value| !(value > 0.0 && value < 1.0)) {
            return Err(invalid(format!("`{name}` must be > 0.0 and < 1.0")));
        }
    }
    let top_k = match parameters.top_k {
        None => 0,
        Some(k) if k <= 0 => return Err(invalid("`top_k` must be strictly positive")),
        Some(k) if k > i64::from(i32::MAX) => {
            return Err(invalid(format!("`top_k` must be <= {}. Given: {k}", i32::MAX)));
        }
        Some(k) => k as u32,
    };
    let top_n = parameters.top_n_tokens.unwrap_or(0);
    if top_n > u64::from(limits.max_top_n_tokens) {
        let most = limits.max_top_n_tokens;
        return Err(invalid(format!("`top_n_tokens` must be >= 0 and <= {most}. Given: {top_n}")));
    }
    let is_warped = temperature != 1.0 || top_k != 0 || parameters.top_p.is_some() || parameters.typical_p.is_some();
    Ok(Sampling {
        // As in TGI, an option that is given but changes nothing (temperature 1) does not make it draw.
        do_sample: parameters.do_sample == Some(true) || is_warped,
        temperature,
        top_k,
        // The smallest value that is one: rounding to `f32` must not switch the option off or empty the support.
        top_p: narrow(parameters.top_p, 1.0).clamp(f32::MIN_POSITIVE, 1.0),
        typical_p: narrow(parameters.typical_p, 1.0).clamp(f32::MIN_POSITIVE, 1.0),
        repetition_penalty,
        frequency_penalty: frequency_penalty as f32,
        seed: parameters.seed.unwrap_or_else(|| rand::rng().random()),
        top_n: top_n as u32,
    })
}

fn check_stops(stop: &[String], limits: &Limits) -> Result<(), Refused> {
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

impl WireRequest {
    /// Whether ids are drawn rather than the most probable taken.
    pub fn do_sample(&self) -> bool {
        self.sampling.do_sample
    }

    /// The seed of the draws.
    pub fn seed(&self) -> u64 {
        self.sampling.seed
    }

    /// Whether alternatives are wanted.
    pub fn has_top(&self) -> bool {
        self.sampling.top_n > 0
    }

    /// How the log describes the parameters.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Refuses a text that cannot fit whatever its tokens are, without tokenizing it.
    fn check_bytes(&self, limits: &Limits) -> Result<(), Refused> {
        let Some(max_token_bytes) = limits.max_token_bytes else { return Ok(()) };
        let least = self.inputs.len().div_ceil(max_token_bytes);
        if self.truncate.is_none() && least > limits.max_input_tokens {
            let most = limits.max_input_tokens;
            return Err(invalid(format!("`inputs` must have less than {most} tokens. Given: at least {least}")));
        }
        Ok(())
    }

    /// Judges the prompt's length. `ids`: the prompt, special tokens included.
    pub fn complete(&self, mut ids: Vec<u32>, limits: &Limits) -> Result<ValidRequest, Refused> {
        if let Some(most) = self.truncate {
            ids.drain(..ids.len().saturating_sub(most));
        }
        if ids.is_empty() {
            return Err(invalid("`inputs` has no tokens"));
        }
        if let Some(id) = ids.iter().find(|id| **id >= limits.vocab_size) {
            let most = limits.vocab_size - 1;
            return Err(invalid(format!("`inputs` has a token with id {id}; the model knows ids up to {most}")));
        }
        let (num_prompt, total) = (ids.len(), limits.max_total_tokens);
        let max_new_tokens = self.max_new_tokens.unwrap_or_else(|| total.saturating_sub(num_prompt).max(1));
        if num_prompt.saturating_add(max_new_tokens) > total {
            return Err(invalid(format!(
                "`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {num_prompt} `inputs` tokens and \
                 {max_new_tokens} `max_new_tokens`"
            )));
        }
        if num_prompt > limits.max_input_tokens {
            let most = limits.max_input_tokens;
            return Err(invalid(format!("`inputs` must have less than {most} tokens. Given: {num_prompt}")));
        }
        Ok(ValidRequest {
            prompt_ids: ids,
            max_new_tokens,
            stop: self.stop.clone(),
            sampling: self.sampling.clone(),
            ignore_eos: self.ignore_eos,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            max_stop_sequences: 4,
            max_top_n_tokens: 5,
            max_input_tokens: 15,
            max_total_tokens: 20,
            vocab_size: 100,
            max_token_bytes: Some(8),
            model_id: "m".into(),
        }
    }

    fn with(parameters: &str) -> Result<WireRequest, Refused> {
        parse(format!(r#"{{"inputs":"a","parameters":{parameters}}}"#).as_bytes(), &limits())
    }

    #[test]
    fn omitted_parameters_mean_the_same_as_empty_ones() {
        let mut omitted = parse(br#"{"inputs":"a"}"#, &limits()).unwrap();
        let empty = with("{}").unwrap();
        assert!(!omitted.do_sample());
        omitted.sampling.seed = empty.seed();
        assert_eq!(omitted, empty);
    }

    #[test]
    fn any_warper_turns_sampling_on() {
        for parameters in [r#"{"do_sample":true}"#, r#"{"temperature":0.9}"#, r#"{"top_k":3}"#, r#"{"top_p":0.5}"#] {
            assert!(with(parameters).unwrap().do_sample(), "{parameters}");
        }
        for parameters in [r#"{"repetition_penalty":1.2,"seed":4}"#, r#"{"temperature":1.0}"#, r#"{"do_sample":null}"#]
        {
            assert!(!with(parameters).unwrap().do_sample(), "{parameters}");
        }
    }

    #[test]
    fn the_log_names_what_is_not_neutral() {
        let described = |parameters| with(parameters).unwrap().sampling().to_string();
        assert_eq!(described(r#"{"seed":7,"stop":["x"]}"#), "greedy");
        assert_eq!(
            described(r#"{"temperature":0.7,"top_k":40,"repetition_penalty":1.25,"top_n_tokens":2}"#),
            "sampled temperature=0.7 top_k=40 repetition_penalty=1.25 top_n_tokens=2"
        );
    }

    #[test]
    fn a_tiny_top_p_stays_one() {
        assert!(with(r#"{"top_p":1e-60}"#).unwrap().sampling.top_p > 0.0);
        assert_eq!(with(r#"{"top_p":0.9999999999}"#).unwrap().sampling.top_p, 1.0);
    }

    #[test]
    fn lengths_are_judged_exactly() {
        let ids = |n: u32| (0..n).collect::<Vec<u32>>();
        let five = with(r#"{"max_new_tokens":5}"#).unwrap();
        assert!(five.complete(ids(15), &limits()).is_ok());
        let message = five.complete(ids(16), &limits()).unwrap_err().to_string();
        assert_eq!(
            message,
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 20. Given: 16 `inputs` tokens and 5 \
             `max_new_tokens`"
        );
        let open = with("{}").unwrap();
        assert_eq!(open.complete(ids(15), &limits()).unwrap().max_new_tokens, 5);
        let message = open.complete(ids(16), &limits()).unwrap_err().to_string();
        assert_eq!(message, "Input validation error: `inputs` must have less than 15 tokens. Given: 16");
        assert!(open.complete(vec![100], &limits()).is_err(), "an id that the model does not know");
    }

    #[test]
    fn truncation_keeps_the_last_tokens() {
        let wire = with(r#"{"truncate":2,"max_new_tokens":1}"#).unwrap();
        assert_eq!(wire.complete(vec![1, 2, 3], &limits()).unwrap().prompt_ids, [2, 3]);
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
