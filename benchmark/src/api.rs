//! The three ways to ask for tokens: request bodies, and what an answer says about itself.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A route and the bodies that belong to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Api {
    /// `POST /generate_stream`: one event for each token.
    GenerateStream,
    /// `POST /generate`: one JSON answer.
    Generate,
    /// `POST /v1/completions` with `stream`: events hold any number of tokens; `usage`, if sent, counts them.
    Openai,
}

impl Api {
    /// The path below the server's address.
    pub fn path(self) -> &'static str {
        match self {
            Self::GenerateStream => "/generate_stream",
            Self::Generate => "/generate",
            Self::Openai => "/v1/completions",
        }
    }

    /// The body that asks for `max_new_tokens` after `prompt`; `extra` fields are added where this API has its options.
    pub fn body(self, prompt: &str, max_new_tokens: u32, model: Option<&str>, extra: &Map<String, Value>) -> Bytes {
        let mut options = match self {
            Self::GenerateStream | Self::Generate => json!({"max_new_tokens": max_new_tokens, "details": true}),
            Self::Openai => {
                json!({"model": model, "prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0.0, "stream": true})
            }
        };
        for (name, value) in extra {
            options[name.as_str()] = value.clone();
        }
        let body = match self {
            Self::GenerateStream | Self::Generate => json!({"inputs": prompt, "parameters": options}),
            Self::Openai => options,
        };
        Bytes::from(body.to_string())
    }
}

/// What one event of a stream says, as far as it is counted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// Text arrived.
    Tokens,
    /// Nothing to count: an end mark, or a chunk without text.
    Other,
    /// The server failed in the middle of the stream; its `error_type`, or its message.
    Error(String),
}

/// Reads one event; looks only at its first bytes where that suffices.
pub fn read_event(api: Api, data: &[u8]) -> Event {
    if data.starts_with(b"{\"error\"") {
        return Event::Error(error_of(data));
    }
    if api == Api::Openai && has_no_text(data) {
        return Event::Other;
    }
    Event::Tokens
}

/// Whether an OpenAI event is the end mark, has an empty text, or tells `usage` alone.
fn has_no_text(data: &[u8]) -> bool {
    let holds = |part: &[u8]| memchr::memmem::find(data, part).is_some();
    data == b"[DONE]" || holds(b"\"text\":\"\"") || holds(b"\"choices\":[]")
}

/// The kind of an error body: `error_type` if it has one, else its text or OpenAI's `error.message`.
pub fn error_of(body: &[u8]) -> String {
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        return "an error that is not JSON".into();
    };
    [&value["error_type"], &value["error"]["message"], &value["error"], &value["detail"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or("an unknown error")
        .to_owned()
}

#[derive(Deserialize)]
struct NativeEnd {
    generated_text: Option<String>,
    details: Option<NativeDetails>,
}

#[derive(Deserialize)]
struct NativeDetails {
    generated_tokens: u64,
}

#[derive(Deserialize)]
struct OpenaiEnd {
    usage: Option<OpenaiUsage>,
}

#[derive(Deserialize)]
struct OpenaiUsage {
    completion_tokens: u64,
}

/// Tokens of a complete native answer: the body of `/generate`, or the last event of `/generate_stream`. An error says
/// what is missing.
pub fn native_tokens(end: &[u8]) -> Result<u64, &'static str> {
    let end: NativeEnd =
        serde_json::from_slice(end).map_err(|_| "the answer ended with something else than its end")?;
    end.generated_text.ok_or("the stream was cut before its end")?;
    Ok(end.details.ok_or("the answer has no details")?.generated_tokens)
}

/// The count in an OpenAI chunk that carries `usage`.
pub fn openai_usage(data: &[u8]) -> Option<u64> {
    memchr::memmem::find(data, b"\"completion_tokens\"")?;
    serde_json::from_slice::<OpenaiEnd>(data).ok()?.usage.map(|usage| usage.completion_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The answers are those of tgi-compat's examples, of transformers serve 5.23 and of vLLM 0.32.
    const NATIVE_TOKEN: &[u8] =
        br#"{"index":1,"token":{"id":9,"text":" \"error\":","logprob":-0.7,"special":false},"generated_text":null,"details":null}"#;
    const NATIVE_LAST: &[u8] = br#"{"index":2,"token":{"id":2,"text":"</s>","logprob":-0.1,"special":true},"generated_text":" blue","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,"input_length":3}}"#;
    const OPENAI_CHUNK: &[u8] =
        br#"{"id":"1","choices":[{"index":0,"text":" a"}],"created":1,"model":"m","object":"text_completion"}"#;
    const OPENAI_LAST: &[u8] = br#"{"id":"1","choices":[{"finish_reason":"length","index":0,"text":""}],"created":1,"model":"m","object":"text_completion","usage":{"completion_tokens":20,"prompt_tokens":4,"total_tokens":24}}"#;
    const OPENAI_USAGE: &[u8] = br#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":4,"total_tokens":24,"completion_tokens":20}}"#;

    #[test]
    fn events_are_told_apart() {
        let check = |api, data, expected| assert_eq!(read_event(api, data), expected);
        check(Api::GenerateStream, NATIVE_TOKEN, Event::Tokens);
        check(Api::GenerateStream, NATIVE_LAST, Event::Tokens);
        check(Api::GenerateStream, br#"{"error":"x","error_type":"generation"}"#, Event::Error("generation".into()));
        check(Api::Openai, OPENAI_CHUNK, Event::Tokens);
        check(Api::Openai, OPENAI_LAST, Event::Other);
        check(Api::Openai, OPENAI_USAGE, Event::Other);
        check(Api::Openai, b"[DONE]", Event::Other);
        check(Api::Openai, br#"{"error":{"message":"gone","http_status_code":422}}"#, Event::Error("gone".into()));
    }

    #[test]
    fn an_answer_counts_its_tokens_or_says_what_is_missing() {
        assert_eq!(native_tokens(NATIVE_LAST), Ok(2));
        assert_eq!(native_tokens(NATIVE_TOKEN), Err("the stream was cut before its end"));
        assert_eq!(native_tokens(br#"{"generated_text":" blue"}"#), Err("the answer has no details"));
        assert!(native_tokens(b"").is_err());
        assert_eq!(openai_usage(OPENAI_LAST), Some(20));
        assert_eq!(openai_usage(OPENAI_USAGE), Some(20));
        assert_eq!(openai_usage(OPENAI_CHUNK), None);
    }

    #[test]
    fn bodies_carry_the_extra_options_where_the_api_has_them() {
        let extra = Map::from_iter([("seed".to_owned(), json!(7))]);
        let native: Value = serde_json::from_slice(&Api::Generate.body("hi", 5, None, &extra)).unwrap();
        assert_eq!(native, json!({"inputs": "hi", "parameters": {"max_new_tokens": 5, "details": true, "seed": 7}}));
        let openai: Value = serde_json::from_slice(&Api::Openai.body("hi", 5, Some("m"), &extra)).unwrap();
        assert_eq!((&openai["seed"], &openai["model"], &openai["max_tokens"]), (&json!(7), &json!("m"), &json!(5)));
    }
}
