//! Calls of tools as each family of models writes them, through the route: whole and streamed, for every choice.

#![allow(clippy::unwrap_used)]

mod http_common;

use http_common::*;
use serde_json::{Value, json};
use text_generation_router::engine::{FinishReason, Output};
use text_generation_router::http::Config;

const TOOLS: &str = r#""tools":[{"type":"function","function":{"name":"look","parameters":{"type":"object"}}},
    {"type":"function","function":{"name":"wait","parameters":{"type":"object"}}}]"#;

/// A template that mentions a mark, and an answer of two calls, as tokens; special ones begin with `!`.
const FAMILIES: [(&str, &[&str]); 4] = [
    (
        "<tool_call>",
        &[
            "!<tool_call>",
            "\n{\"name\": \"lo",
            "ok\", \"arguments\": {\"a\"",
            ": [1, 2]}}\n",
            "!</tool_call>",
            "\n",
            "!<tool_call>",
            "{\"name\": \"wait\", \"arguments\": {}}",
            "!</tool_call>",
            "!<|im_end|>",
        ],
    ),
    (
        "[TOOL_CALLS]",
        &[
            "![TOOL_CALLS]",
            " [{\"name\": \"look\", \"arguments\": {",
            "\"a\": [1, 2]}}, {\"na",
            "me\": \"wait\", ",
            "\"arguments\": {}}]",
            "!</s>",
        ],
    ),
    (
        "[TOOL_CALLS] of newer models",
        &[
            "![TOOL_CALLS]",
            "lo",
            "ok",
            "![ARGS]",
            "{\"a\": ",
            "[1, 2]}",
            "![TOOL_CALLS]",
            "wait",
            "![ARGS]",
            "{}",
            "!</s>",
        ],
    ),
    (
        "<|python_tag|>",
        &[
            "!<|python_tag|>",
            "{\"name\": \"look\", ",
            "\"parameters\": {\"a\": [1,",
            " 2]}}; {\"name\": \"wait\",",
            " \"parameters\": {}}",
            "!<|eom_id|>",
        ],
    ),
];

fn tokens(texts: &[&str], reason: FinishReason) -> Vec<Output> {
    let plain: Vec<_> = texts.iter().map(|text| text.trim_start_matches('!')).collect();
    let mut outputs = outputs(&plain, reason);
    for (output, text) in outputs.iter_mut().zip(texts) {
        output.token.special = text.starts_with('!');
    }
    outputs
}

async fn served(mentioned: &str) -> Server {
    let text = format!("{{# {mentioned} #}}{{% for t in tools or [] %}}{{{{ t.function.name }}}}{{% endfor %}}Hi");
    serve(Config { template: template(&text), ..config() }, ready(), tokenizer()).await
}

/// What a request with tools and these fields is answered when the model writes this: message and reason of the end,
/// the same streamed and not.
async fn answered(mentioned: &str, fields: &str, texts: &[&str], reason: FinishReason) -> (Value, Value) {
    let mut server = served(mentioned).await;
    let mut found = vec![];
    for stream in [false, true] {
        let messages = r#""messages":[{"role":"user","content":"Hi"}]"#;
        let body = format!(r#"{{{messages},{TOOLS}{fields},"stream":{stream}}}"#);
        let address = server.address;
        let asked = tokio::spawn(async move { ask(address, &post("/v1/chat/completions", body)).await });
        answer(server.submission().await, tokens(texts, reason)).await;
        let answer = asked.await.unwrap();
        found.push(if stream { joined(&answer) } else { whole(&answer) });
    }
    assert_eq!(found[0], found[1], "{mentioned} {fields}");
    found.remove(0)
}

fn whole(answer: &Answer) -> (Value, Value) {
    let mut choice = answer.json()["choices"][0].take();
    let calls = choice["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
    let calls: Vec<_> = calls.into_iter().map(|mut call| checked(call["id"].take(), call["function"].take())).collect();
    let content = choice["message"]["content"].as_str().unwrap_or_default();
    (json!([content, calls]), choice["finish_reason"].take())
}

fn joined(answer: &Answer) -> (Value, Value) {
    let events = answer.body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
    let chunks: Vec<Value> =
        events.filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect();
    let (mut content, mut calls) = (String::new(), Vec::<(Value, Value, String)>::new());
    for chunk in &chunks {
        let delta = &chunk["choices"][0]["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                calls.push((call["id"].clone(), call["function"]["name"].clone(), String::new()));
            }
            calls[index].2.push_str(call["function"]["arguments"].as_str().unwrap());
        }
    }
    let calls: Vec<_> =
        calls.into_iter().map(|(id, name, text)| checked(id, json!({"name": name, "arguments": text}))).collect();
    (json!([content, calls]), chunks.last().unwrap()["choices"][0]["finish_reason"].clone())
}

/// A call without its name, which is another each time.
fn checked(id: Value, function: Value) -> Value {
    let id = id.as_str().unwrap();
    let is_short = id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric());
    assert!(is_short || id.starts_with("call_"), "{id}");
    function
}

#[tokio::test]
async fn two_calls_of_every_family_are_told_streamed_or_not() {
    let look = json!({"name": "look", "arguments": "{\"a\": [1, 2]}"});
    let wait = json!({"name": "wait", "arguments": "{}"});
    for (mentioned, texts) in FAMILIES {
        for fields in ["", r#","tool_choice":"auto""#, r#","tool_choice":null"#] {
            let found = answered(mentioned, fields, texts, FinishReason::EosToken).await;
            assert_eq!(found, (json!(["", [look, wait]]), json!("tool_calls")), "{mentioned}");
        }
        let found = answered(mentioned, r#","parallel_tool_calls":false"#, texts, FinishReason::EosToken).await;
        assert_eq!(found, (json!(["", [look]]), json!("tool_calls")), "{mentioned}");
    }
}

#[tokio::test]
async fn an_answer_of_words_stays_one_and_a_call_that_is_cut_short_ends_with_length() {
    for (mentioned, texts) in FAMILIES {
        let found = answered(mentioned, "", &["It ", "rains", " {today}.", "!</s>"], FinishReason::EosToken).await;
        assert_eq!(found, (json!(["It rains {today}.", []]), json!("stop")), "{mentioned}");
        let at = texts.iter().position(|text| text.contains("\"a\"")).unwrap();
        let (told, reason) = answered(mentioned, "", &texts[..=at], FinishReason::Length).await;
        assert_eq!((&told[1][0]["name"], reason), (&json!("look"), json!("length")), "{mentioned}");
        assert!(told[1][0]["arguments"].as_str().unwrap().starts_with("{\"a\""), "{told}");
    }
}

#[tokio::test]
async fn with_the_choice_none_nothing_is_a_call() {
    for (mentioned, texts) in FAMILIES {
        let expected: String = texts.iter().filter(|text| !text.starts_with('!')).copied().collect();
        let found = answered(mentioned, r#","tool_choice":"none""#, texts, FinishReason::EosToken).await;
        assert_eq!(found, (json!([expected, []]), json!("stop")), "{mentioned}");
    }
}

#[tokio::test]
async fn a_forced_call_is_json_in_every_family_and_nothing_of_it_is_text() {
    let written = r#"{"name": "look", "parameters": {"a": 1}}"#;
    for (mentioned, _) in FAMILIES {
        for choice in [r#""required""#, r#""look""#, r#"{"type":"function","function":{"name":"look"}}"#] {
            let fields = format!(r#","tool_choice":{choice}"#);
            let found = answered(mentioned, &fields, &[&written[..20], &written[20..]], FinishReason::EosToken).await;
            let call = json!({"name": "look", "arguments": "{\"a\": 1}"});
            assert_eq!(found, (json!(["", [call]]), json!("tool_calls")), "{mentioned}");
            let cut = answered(mentioned, &fields, &[&written[..6]], FinishReason::Length).await;
            assert_eq!(cut, (json!(["", []]), json!("length")), "{mentioned}");
        }
    }
}
