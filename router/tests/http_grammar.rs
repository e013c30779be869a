//! Forms of answers over HTTP: what reaches the engine, what is refused and under which name, what a bound answer reads as.
#![allow(missing_docs, clippy::unwrap_used)]

mod http_common;

use std::time::{Duration, Instant};

use http_common::*;
use serde_json::{Value, json};
use text_generation_router::engine::{FinishReason, FirstRank, Status};
use text_generation_router::http::Config;
use text_generation_router::request::form::Kind;
use text_generation_router::shards::fake::{FakeOptions, FakeShards, REFUSED_REGEX};

fn generate(grammar: &Value) -> Vec<u8> {
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 4, "grammar": grammar}});
    post("/generate", body.to_string())
}

fn chat(fields: Value) -> Vec<u8> {
    let mut body = json!({"model": "tgi", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    post("/v1/chat/completions", body.to_string())
}

fn tools() -> Value {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    json!([
        tool("f", json!({"type": "object", "properties": {"a": {"type": "integer"}}})),
        tool("g", json!({"type": "object"}))
    ])
}

/// A server whose template is told of tools, so that they are not told in many words.
async fn start_with(text: &str) -> Server {
    let template = template(&format!("{text}{{% if tools %}} {{% endif %}}"));
    serve(Config { template, ..config() }, ready(), tokenizer()).await
}

#[tokio::test]
async fn every_way_to_ask_for_a_form_reaches_the_engine_as_a_grammar() {
    let mut server = start_with(CHATML).await;
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let requests = [
        (generate(&json!({"type": "json", "value": schema})), Kind::JsonSchema),
        (generate(&json!({"type": "regex", "value": "[ab]+"})), Kind::Regex),
        (chat(json!({"response_format": {"type": "json_object"}})), Kind::JsonSchema),
        (
            chat(
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
            ),
            Kind::JsonSchema,
        ),
        (chat(json!({"tools": tools(), "tool_choice": "required"})), Kind::JsonSchema),
        (chat(json!({"tools": tools(), "tool_choice": "g"})), Kind::JsonSchema),
    ];
    for (request, kind) in requests {
        let address = server.address;
        let answered = tokio::spawn(async move { ask(address, &request).await });
        let submission = server.submission().await;
        assert_eq!(submission.request.sampling.grammar.as_ref().map(|grammar| grammar.kind), Some(kind));
        answer(submission, outputs(&["1"], FinishReason::EosToken)).await;
        assert_eq!(answered.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn a_forced_call_is_told_as_a_call_whatever_the_models_own_format_is() {
    for template in [CHATML, "a <tool_call> <think>", "a [TOOL_CALLS]"] {
        let mut server = start_with(template).await;
        let address = server.address;
        let request = chat(json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "f"}}}));
        let answered = tokio::spawn(async move { ask(address, &request).await });
        let submission = server.submission().await;
        answer(submission, outputs(&[r#"{"name": "f", "#, r#""arguments": {"a": 1}}"#], FinishReason::EosToken)).await;
        let choice = answered.await.unwrap().json()["choices"][0].clone();
        let function = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(*function, json!({"name": "f", "arguments": r#"{"a": 1}"#}), "{template}: {choice}");
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&Value::Null, &json!("tool_calls")));
    }
}

#[tokio::test]
async fn refusals_name_the_field_and_the_place_and_give_their_permits_back() {
    let server = start_with(CHATML).await;
    let error =
        ask(server.address, &generate(&json!({"type": "json", "value": {"properties": {"a": {"type": "strnig"}}}})))
            .await
            .check_error(422, "validation");
    assert_eq!(error, "Input validation error: `grammar`: at /properties/a: Invalid type: strnig");
    let format = json!({"type": "json_schema", "json_schema": {"schema": {"enum": []}}});
    let error =
        ask(server.address, &chat(json!({"response_format": format}))).await.check_openai_error(422, "validation");
    assert_eq!(error["param"], "response_format");
    let parameters = json!({"type": "object", "properties": {"a": {"uniqueItems": true, "type": "array"}}});
    let bad = json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}]);
    let error = ask(server.address, &chat(json!({"tools": bad, "tool_choice": "required"})))
        .await
        .check_openai_error(422, "tool_error");
    let message = error["message"].as_str().unwrap();
    assert!(message.starts_with("Tool error: `tool_choice`: at /tools/0/properties/a: Unimplemented"), "{message}");
    assert_eq!(server.engine.num_free_permits(), 4);
}

#[tokio::test]
async fn hostile_grammars_keep_nobody_else_waiting() {
    let mut server = start().await;
    let address = server.address;
    let hostile = [
        json!({"type": "regex", "value": "(a{1000}){1000}"}),
        json!({"type": "json", "value": {"type": "integer", "multipleOf": 1_000_003}}),
        json!({"type": "json", "value": {"enum": (0..100_000).map(|i| i.to_string()).collect::<Vec<_>>()}}),
        json!({"type": "json", "value": {"type": "object", "properties": (0..900).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect::<serde_json::Map<_, _>>()}}),
    ];
    let attacks = hostile.map(|grammar| tokio::spawn(async move { ask(address, &generate(&grammar)).await }));
    let begun = Instant::now();
    let plain = tokio::spawn(async move { ask(address, &post("/tokenize", r#"{"inputs":"a b"}"#)).await });
    assert_eq!(plain.await.unwrap().status, 200);
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    for attack in attacks {
        attack.await.unwrap().check_error(422, "validation");
    }
    assert!(server.submissions.try_recv().is_err());
}

#[tokio::test]
async fn what_the_shard_does_not_take_is_refused_like_what_the_router_does_not() {
    let shards = FakeShards::new(FakeOptions::default());
    let first_rank = FirstRank::new(shards.rank(0));
    let server = serve(config(), Status { first_rank, ..ready() }, tokenizer()).await;
    for _ in 0..2 {
        let error = ask(server.address, &generate(&json!({"type": "regex", "value": REFUSED_REGEX}))).await;
        assert_eq!(error.check_error(422, "validation"), "Input validation error: `grammar`: not here");
    }
}

#[tokio::test]
async fn a_server_without_grammars_refuses_all_of_them() {
    let server = serve(Config { has_grammars: false, ..config() }, ready(), tokenizer()).await;
    let error = ask(server.address, &generate(&json!({"type": "regex", "value": "a"}))).await;
    assert!(error.check_error(422, "validation").contains("`grammar`: grammar is not supported"));
}
