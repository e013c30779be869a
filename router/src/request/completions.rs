//! Bodies of `/v1/completions`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::limits::MAX_TOP_LOGPROBS;
pub use super::openai::StreamOptions;
use super::openai::{Shared, check_model, include_usage, options, shared};
use super::{Limits, Options, Refused, invalid, json};

/// Body of `/v1/completions`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct CompletionRequest {
    /// A text, a list of texts, a list of ids, or a list of lists of ids.
    #[schema(value_type = Prompt)]
    pub prompt: Option<Value>,
    /// The served model's name, or `tgi`.
    pub model: Option<String>,
    /// Tokens to generate at most; as many as fit, if not given. With `echo` it may be 0.
    pub max_tokens: Option<u64>,
    /// 0 takes the most probable tokens; anything else divides the logits before sampling.
    #[schema(minimum = 0.0)]
    pub temperature: Option<f64>,
    /// Sample from the most probable ids that have this share of the probability.
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    pub top_p: Option<f64>,
    /// Sample from so many most probable ids.
    pub top_k: Option<i64>,
    /// Candidates, of which the `n` whose tokens are most probable on average are returned.
    pub best_of: Option<u64>,
    /// Answers to each prompt.
    pub n: Option<u64>,
    /// Whether tokens are sent as they come.
    pub stream: Option<bool>,
    /// What a stream ends with.
    pub stream_options: Option<StreamOptions>,
    /// Tell the log-probability of every token, and so many alternatives.
    #[schema(maximum = 20)]
    pub logprobs: Option<u64>,
    /// Repeat the prompt before the answer.
    pub echo: Option<bool>,
    /// Texts that end the answer, which they are not part of.
    #[schema(value_type = Option<Stop>)]
    pub stop: Option<Value>,
    /// Refused: put what follows into the prompt.
    pub suffix: Option<String>,
    /// Lowers the logits of ids that the answer has already.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub presence_penalty: Option<f64>,
    /// Lowers the logits of ids for each time that the answer has them already.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub frequency_penalty: Option<f64>,
    /// Divides the logits of ids that have occurred, 1 for none.
    pub repetition_penalty: Option<f64>,
    /// Added to the logits of ids, -100 to 100 by id.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Of the sampling.
    pub seed: Option<u64>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: Option<bool>,
    /// Tokens before the answer may end.
    pub min_tokens: Option<u64>,
    /// Tell the ids of prompt and answer.
    pub return_token_ids: Option<bool>,
}

/// A prompt, as documented.
#[derive(ToSchema)]
#[schema(title = "Prompt")]
#[allow(dead_code)]
#[serde(untagged)]
#[derive(serde::Serialize)]
pub enum Prompt {
    /// One text.
    Single(String),
    /// Several.
    Multiple(Vec<String>),
    /// One, as ids.
    Ids(Vec<u32>),
    /// Several, as ids.
    ManyIds(Vec<Vec<u32>>),
}

/// Texts that end an answer, as documented.
#[derive(ToSchema, serde::Serialize)]
#[allow(dead_code)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// One prompt.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Source {
    /// To be tokenized, special tokens added.
    Text(String),
    /// As it is.
    Ids(Vec<u32>),
}

/// A request within its limits; its prompts are still text.
#[derive(Clone, Debug, PartialEq)]
pub struct Completions {
    /// Never empty.
    pub prompts: Vec<Source>,
    /// How each is answered.
    pub options: Options,
    /// Whether tokens are sent as they come.
    pub stream: bool,
    /// Whether a stream tells how many tokens there were.
    pub include_usage: bool,
    /// Whether log-probabilities are told.
    pub logprobs: bool,
    /// Whether the prompt comes before the answer.
    pub echo: bool,
    /// Nothing but the prompt is wanted: `max_tokens` is 0.
    pub drops_answer: bool,
    /// Whether ids are told.
    pub return_token_ids: bool,
}

/// Judges a body, all but the lengths of its prompts.
pub fn parse(body: &[u8], limits: &Limits) -> Result<Completions, Refused> {
    check(&json::read(body)?, limits)
}

/// Judges a request, all but the lengths of its prompts.
pub fn check(request: &CompletionRequest, limits: &Limits) -> Result<Completions, Refused> {
    if request.suffix.is_some() {
        return Err(Refused::Suffix);
    }
    check_model(request.model.as_deref(), limits)?;
    let prompts = prompts(request.prompt.as_ref().ok_or_else(|| invalid("missing field `prompt`"))?)?;
    if prompts.len() > limits.max_client_batch_size {
        return Err(Refused::BatchSize(limits.max_client_batch_size));
    }
    let stream = request.stream.unwrap_or(false);
    let echo = request.echo.unwrap_or(false);
    let top_n = request.logprobs.unwrap_or(0);
    if top_n > MAX_TOP_LOGPROBS {
        return Err(invalid(format!("`logprobs` must be <= {MAX_TOP_LOGPROBS}. Given: {top_n}")));
    }
    if stream && request.best_of.is_some_and(|best_of| best_of > request.n.unwrap_or(1)) {
        return Err(invalid("`best_of` above `n` is not supported when streaming tokens"));
    }
    let drops_answer = echo && request.max_tokens == Some(0);
    let max_tokens = ("max_tokens", if drops_answer { Some(1) } else { request.max_tokens });
    let shared = Shared { max_tokens, best_of: request.best_of, top_n, prompt_name: "prompt", ..shared!(request) };
    let mut options = options(&shared, limits)?;
    options.wants_prompt_logprobs = echo && request.logprobs.is_some();
    for prompt in &prompts {
        if let Source::Text(text) = prompt {
            options.check_bytes(text.len(), limits)?;
        }
    }
    Ok(Completions {
        prompts,
        options,
        stream,
        include_usage: include_usage(request.stream_options.as_ref(), stream)?,
        logprobs: request.logprobs.is_some(),
        echo,
        drops_answer,
        return_token_ids: request.return_token_ids.unwrap_or(false),
    })
}

fn prompts(value: &Value) -> Result<Vec<Source>, Refused> {
    let wrong = || invalid("`prompt`: expected a text, a list of texts, a list of ids, or a list of lists of ids");
    let ids = |ids: &[Value]| {
        let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong));
        ids.collect::<Result<Vec<_>, _>>().map(Source::Ids)
    };
    let prompts = match value {
        Value::String(text) => vec![Source::Text(text.clone())],
        Value::Array(list) if list.first().is_some_and(Value::is_number) => vec![ids(list)?],
        Value::Array(list) => {
            let one = |prompt: &Value| match prompt {
                Value::String(text) => Ok(Source::Text(text.clone())),
                Value::Array(list) => ids(list),
                _ => Err(wrong()),
            };
            list.iter().map(one).collect::<Result<_, _>>()?
        }
        _ => return Err(wrong()),
    };
    let is_empty = |prompt: &Source| match prompt {
        Source::Text(text) => text.is_empty(),
        Source::Ids(ids) => ids.is_empty(),
    };
    if prompts.is_empty() || prompts.iter().any(is_empty) {
        return Err(invalid("`prompt` cannot be empty"));
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::super::test_limits;
    use super::*;

    fn parse(fields: &str) -> Result<Completions, Refused> {
        super::parse(format!("{{{fields}}}").as_bytes(), &test_limits())
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let text = |text: &str| Source::Text(text.into());
        for (prompt, expected) in [
            (r#""a""#, vec![text("a")]),
            (r#"["a","b"]"#, vec![text("a"), text("b")]),
            ("[1,2]", vec![Source::Ids(vec![1, 2])]),
            ("[[1],[2,3]]", vec![Source::Ids(vec![1]), Source::Ids(vec![2, 3])]),
        ] {
            assert_eq!(parse(&format!(r#""prompt":{prompt}"#)).unwrap().prompts, expected);
        }
    }

    #[test]
    fn these_routes_sample_unless_the_temperature_is_zero() {
        assert!(parse(r#""prompt":"a""#).unwrap().options.sampling.do_sample);
        let greedy = parse(r#""prompt":"a","temperature":0"#).unwrap().options.sampling;
        assert!(!greedy.do_sample && greedy.temperature == 1.0);
        assert_eq!(parse(r#""prompt":"a","top_p":1.0"#).unwrap().options.sampling.top_p, 1.0);
    }

    #[test]
    fn what_is_refused_is_named() {
        for (fields, expected) in [
            ("", "missing field `prompt`"),
            (r#""prompt":[]"#, "`prompt` cannot be empty"),
            (r#""prompt":"""#, "`prompt` cannot be empty"),
            (r#""prompt":["a",""]"#, "`prompt` cannot be empty"),
            (r#""prompt":["a",1]"#, "`prompt`: expected a text"),
            (r#""prompt":[1,-1]"#, "`prompt`: expected a text"),
            (r#""prompt":["a","b","c","d","e"]"#, "Number of prompts exceeds the maximum allowed batch size of 4"),
            (r#""prompt":"a","suffix":"b""#, "Suffix is not supported"),
            (r#""prompt":"a","n":0"#, "`n` must be >= 1 and <= 8. Given: 0"),
            (r#""prompt":"a","n":129"#, "`n` must be >= 1 and <= 8. Given: 129"),
            (r#""prompt":"a","n":2,"best_of":1"#, "`best_of` must be at least `n`"),
            (r#""prompt":"a","best_of":2,"stream":true"#, "`best_of` above `n` is not supported when streaming"),
            (r#""prompt":"a","logprobs":21"#, "`logprobs` must be <= 20"),
            (r#""prompt":"a","stop":7"#, "`stop`: expected a text or a list of texts"),
            (r#""prompt":"a","logit_bias":{"100":1}"#, "`logit_bias`: expected ids from 0 to 99"),
            (r#""prompt":"a","logit_bias":{"AI":1}"#, "`logit_bias`: expected ids from 0 to 99"),
            (r#""prompt":"a","logit_bias":{"-1":1}"#, "`logit_bias`: expected ids from 0 to 99"),
            (r#""prompt":"a","logit_bias":{"1":101}"#, "`logit_bias`: expected values from -100 to 100"),
            (r#""prompt":"a","logit_bias":[1]"#, "`logit_bias`: invalid type: sequence, expected a map"),
            (r#""prompt":"a","max_tokens":0"#, "`max_tokens` must be strictly positive"),
            (r#""prompt":"a","top_p":1.0000001"#, "`top_p` must be > 0.0 and <= 1.0"),
            (r#""prompt":"a","stream_options":{}"#, "`stream_options` is only allowed when `stream` is true"),
            (r#""prompt":"a","model":"gpt-4""#, "the model \"gpt-4\" is not served here"),
        ] {
            let message = parse(fields).unwrap_err().to_string();
            assert!(message.contains(expected), "{fields}: {message}");
        }
    }
}
