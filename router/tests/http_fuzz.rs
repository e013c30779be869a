//! Random bodies against every route that takes one: whatever comes, the answer is no fault of the server's, and every
//! permit comes back. `COUNT` and `FIRST` choose the seeds.

#![allow(clippy::unwrap_used)]

mod http_common;

use http_common::*;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

const ROUTES: [&str; 10] = [
    "/",
    "/generate",
    "/generate_stream",
    "/tokenize",
    "/chat_tokenize",
    "/v1/chat/completions",
    "/v1/completions",
    "/invocations",
    "/vertex",
    "/v2/models/m/versions/1/infer",
];

/// Names of fields of any of the routes.
const NAMES: [&str; 62] = [
    "inputs",
    "parameters",
    "stream",
    "best_of",
    "temperature",
    "repetition_penalty",
    "frequency_penalty",
    "top_k",
    "top_p",
    "typical_p",
    "do_sample",
    "max_new_tokens",
    "return_full_text",
    "stop",
    "truncate",
    "watermark",
    "details",
    "decoder_input_details",
    "seed",
    "top_n_tokens",
    "grammar",
    "adapter_id",
    "ignore_eos_token",
    "messages",
    "model",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stream_options",
    "include_usage",
    "tools",
    "tool_prompt",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
    "chat_template",
    "ignore_eos",
    "min_tokens",
    "return_token_ids",
    "prompt",
    "echo",
    "suffix",
    "instances",
    "outputs",
    "data",
    "name",
    "role",
    "content",
    "tool_calls",
    "function",
    "arguments",
    "type",
    "text",
    "value",
    "schema",
];

/// Texts that have broken others: in the manner of the big list of naughty strings.
const TEXTS: [&str; 40] = [
    "",
    " ",
    "a",
    "undefined",
    "null",
    "NaN",
    "true",
    "1E02",
    "-1",
    "1/0",
    "0x10",
    "𝕿𝖍𝖊",
    "Ω≈ç√∫˜µ≤≥÷",
    "،",
    "表ポあA鷗",
    "👩‍👩‍👧‍👧",
    "\u{202e}abc",
    "\u{0}",
    "\u{1}\u{2}",
    "\u{feff}",
    "\u{fffd}",
    "\u{10ffff}",
    "e\u{301}\u{301}\u{301}",
    "<s>",
    "</s>",
    "<|im_start|>system",
    "[INST]",
    "{{7*7}}",
    "{% for i in range(10**9) %}",
    "' OR 1=1 --",
    "<script>alert(0)</script>",
    "../../../../etc/passwd",
    "$(touch x)",
    "%s%n%x",
    "data: [DONE]\n\n",
    "\r\n\r\n",
    "{\"a\":",
    "text",
    "function",
    "user",
];

fn scalar(rng: &mut StdRng) -> Value {
    match rng.random_range(0..9) {
        0 => Value::Null,
        1 => json!(rng.random_bool(0.5)),
        2 => json!(rng.random_range(-3..6)),
        3 => json!(*[u64::MAX, 1 << 31, 1 << 32, 0, 64, 65].choose(rng).unwrap()),
        4 => json!(*[0.0, -0.5, 1.0, 1e-40, 1e39, 2.000_000_1, 0.7].choose(rng).unwrap()),
        _ => json!(*TEXTS.choose(rng).unwrap()),
    }
}

fn any(rng: &mut StdRng, depth: u32) -> Value {
    match rng.random_range(0..10) {
        0..=1 if depth > 0 => (0..rng.random_range(0..4)).map(|_| any(rng, depth - 1)).collect(),
        2..=3 if depth > 0 => Value::Object(object(rng, depth - 1)),
        _ => scalar(rng),
    }
}

fn object(rng: &mut StdRng, depth: u32) -> Map<String, Value> {
    let count = rng.random_range(0..6);
    (0..count).map(|_| ((*NAMES.choose(rng).unwrap()).to_owned(), any(rng, depth))).collect()
}

/// A body that the route would answer, so that what is changed about it is what is judged.
fn sound(path: &str, rng: &mut StdRng) -> Value {
    let text = *["a", "Grüße 🙂", "The function returns", "x y z"].choose(rng).unwrap();
    let message = json!({"role": "user", "content": text});
    match path {
        "/v1/chat/completions" | "/chat_tokenize" => json!({"messages": [message], "max_tokens": 3}),
        "/v1/completions" => json!({"prompt": text, "max_tokens": 3}),
        "/vertex" => json!({"instances": [{"inputs": text}, {"messages": [message]}]}),
        "/v2/models/m/versions/1/infer" => json!({"inputs": [{"data": [104, 105]}], "outputs": [{"name": "o"}]}),
        _ => json!({"inputs": text, "parameters": {"max_new_tokens": 3}}),
    }
}

fn body(path: &str, rng: &mut StdRng) -> Vec<u8> {
    let mut value = sound(path, rng);
    for _ in 0..rng.random_range(0..4) {
        let fields = object(rng, 3);
        match rng.random_range(0..8) {
            0 => value = any(rng, 4),
            1 if value.get("parameters").is_some_and(Value::is_object) => {
                value["parameters"].as_object_mut().unwrap().extend(fields);
            }
            2 if value.get("messages").is_some_and(Value::is_array) => {
                value["messages"].as_array_mut().unwrap().push(Value::Object(fields));
            }
            _ => {
                if let Some(object) = value.as_object_mut() {
                    object.extend(fields);
                }
            }
        }
    }
    let mut bytes = value.to_string().into_bytes();
    if rng.random_bool(0.1) && !bytes.is_empty() {
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..3) {
            0 => bytes.truncate(at),
            1 => bytes[at] = rng.random(),
            _ => bytes.insert(at, *b"{}[]\",:0\\".choose(rng).unwrap()),
        }
    }
    bytes
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::test]
async fn no_body_is_a_fault_of_the_server() {
    let server = start().await.answer_all(&["Hé", "", "🙂", "</tool_call>"]);
    let (first, count) = (number("FIRST", 0), number("COUNT", 1500));
    let (mut num_answered, mut num_refused) = (0, 0);
    for seed in first..first + count {
        let mut rng = StdRng::seed_from_u64(seed);
        let path = *ROUTES.choose(&mut rng).unwrap();
        let body = body(path, &mut rng);
        let answer = ask(server.address, &post(path, &body)).await;
        let shown = || format!("seed {seed}: {path} {}", String::from_utf8_lossy(&body));
        match answer.status {
            200 => num_answered += 1,
            // More prompts and choices than may run at once are refused too.
            400 | 404 | 422 | 429 => {
                num_refused += 1;
                assert!(answer.body.len() <= 2048 && answer.json()["error_type"].is_string(), "{}", shown());
            }
            status => panic!("{status}: {} {}", shown(), answer.body),
        }
        let permits_are_back = async {
            while server.engine.num_free_permits() < 4 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, permits_are_back).await.unwrap_or_else(|_| panic!("permits: {}", shown()));
    }
    assert!(num_answered * 10 > count && num_refused * 10 > count, "{num_answered} answered, {num_refused} refused");
}
