//! The routes of `OpenAI`'s API, in front of a scripted engine.

#![allow(clippy::unwrap_used)]

mod http_common;

use http_common::*;
use serde_json::{Value, json};
use text_generation_router::engine::{FinishReason, Finished, GenerateError, Output, PromptToken, Submission};
use text_generation_router::http::Config;
use tokio::task::JoinHandle;

const HERMES: &str = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}<|{{ m.role }}|>\
                      {{ m.content }}{% if m.tool_calls %}<tool_call>{% endif %}{% endfor %}<think>?";

const TOOLS: &str = r#""tools":[{"type":"function","function":{"name":"weather","parameters":{"type":"object"}}}]"#;

fn asked(address: std::net::SocketAddr, path: &'static str, body: String) -> JoinHandle<Answer> {
    tokio::spawn(async move { ask(address, &post(path, body)).await })
}

fn chat(fields: &str) -> String {
    format!(r#"{{"model":"tgi","messages":[{{"role":"user","content":"Hi"}}]{fields}}}"#)
}

/// The chunks of a stream, and whether it ended as it should.
fn chunks(answer: &Answer) -> (Vec<Value>, bool) {
    let events: Vec<_> =
        answer.body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
    let is_done = events.last() == Some(&"[DONE]");
    let events = events.into_iter().filter(|event| *event != "[DONE]");
    (events.map(|event| serde_json::from_str(event).unwrap()).collect(), is_done)
}

/// Tokens that the tokenizer calls special, where the flag says so.
fn marked(texts: &[(&str, bool)], reason: FinishReason) -> Vec<Output> {
    let plain: Vec<_> = texts.iter().map(|(text, _)| *text).collect();
    let mut outputs = outputs(&plain, reason);
    for (output, (_, special)) in outputs.iter_mut().zip(texts) {
        output.token.special = *special;
        output.token.top.clear();
    }
    outputs
}

async fn served(template_text: &str) -> Server {
    serve(Config { template: template(template_text), ..config() }, ready(), tokenizer()).await
}

#[tokio::test]
async fn a_chat_is_rendered_sampled_and_answered() {
    let mut server = start().await;
    let answered =
        asked(server.address, "/v1/chat/completions", chat(r#","max_tokens":9,"seed":3,"stop":"x","ignored":1"#));
    let submission = server.submission().await;
    let expected = tokenizer().encode("<|user|>Hi\n<|assistant|>", false).unwrap();
    assert_eq!(submission.request.prompt_ids, expected, "the template adds the special tokens, nobody else");
    let sampling = &submission.request.sampling;
    assert!(sampling.do_sample && sampling.seed == 3 && submission.request.cuts_stop);
    assert_eq!((submission.request.max_new_tokens, &submission.request.stop[..]), (9, &["x".to_owned()][..]));
    answer(submission, outputs(&["Hel", "lo"], FinishReason::StopSequence)).await;
    let answer = answered.await.unwrap();
    let mut json = answer.json();
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-") && json["created"].as_u64().unwrap() > 1_700_000_000);
    json["id"].take();
    json["created"].take();
    assert_eq!(
        json,
        json!({"id": null, "object": "chat.completion", "created": null, "model": "docs",
            "system_fingerprint": concat!(env!("CARGO_PKG_VERSION"), "-native"),
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": null,
                "finish_reason": "stop"}],
            "usage": {"prompt_tokens": expected.len(), "completion_tokens": 2, "total_tokens": expected.len() + 2}})
    );
    assert_eq!(answer.headers["x-generated-tokens"], "2");
    assert_eq!(answer.headers["x-compute-characters"], "24");
}

#[tokio::test]
async fn a_streamed_chat_has_one_role_one_finish_reason_and_usage_where_asked() {
    for (fields, has_usage) in [("", false), (r#","stream_options":{"include_usage":true}"#, true)] {
        let mut server = start().await;
        let answered = asked(server.address, "/v1/chat/completions", chat(&format!(r#","stream":true{fields}"#)));
        answer(
            server.submission().await,
            marked(&[("Hel", false), ("lo", false), ("</s>", true)], FinishReason::EosToken),
        )
        .await;
        let answer = answered.await.unwrap();
        assert_eq!(answer.headers["content-type"], "text/event-stream");
        let (chunks, is_done) = chunks(&answer);
        assert!(is_done);
        let deltas: Vec<_> = chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).collect();
        assert_eq!(deltas[0]["delta"], json!({"role": "assistant", "content": "Hel"}));
        assert_eq!(deltas[1]["delta"], json!({"content": "lo"}));
        assert_eq!(deltas[2]["delta"], json!({}), "a special token is no text");
        let reasons: Vec<_> = deltas.iter().map(|delta| delta["finish_reason"].clone()).collect();
        assert_eq!(reasons, [json!(null), json!(null), json!("stop")]);
        assert_eq!(chunks.len(), if has_usage { 4 } else { 3 });
        let last = chunks.last().unwrap();
        assert_eq!(last["choices"].as_array().unwrap().is_empty(), has_usage);
        assert_eq!(last["usage"]["completion_tokens"], if has_usage { json!(3) } else { json!(null) });
        assert!(
            chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk")
        );
    }
}

#[tokio::test]
async fn calls_and_thoughts_are_the_same_streamed_or_not() {
    let texts = [
        ("<think>", false),
        ("Let me", false),
        (" see", false),
        ("</think>", false),
        ("\n\nI look. ", false),
        ("<tool_call>\n{\"name\": \"wea", false),
        ("ther\", \"arguments\": {\"city\":", false),
        (" \"Köln\"}", false),
        ("}\n</tool_call>", false),
        ("<|im_end|>", true),
    ];
    let mut server = served(HERMES).await;
    let body = |stream: bool| chat(&format!(r#",{TOOLS},"stream":{stream}"#));
    let whole = asked(server.address, "/v1/chat/completions", body(false));
    answer(server.submission().await, marked(&texts, FinishReason::EosToken)).await;
    let whole = whole.await.unwrap().json()["choices"][0].take();
    assert_eq!(whole["finish_reason"], "tool_calls");
    let message = &whole["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Let me see"), &json!("I look.")));
    let call = &message["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "weather", "arguments": "{\"city\": \"Köln\"}"}));
    assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function");

    let streamed = asked(server.address, "/v1/chat/completions", body(true));
    answer(server.submission().await, marked(&texts, FinishReason::EosToken)).await;
    let (chunks, is_done) = chunks(&streamed.await.unwrap());
    assert!(is_done);
    let deltas = || chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]);
    let text = |field: &str| deltas().filter_map(|delta| delta[field].as_str()).collect::<String>();
    assert_eq!((text("reasoning_content"), text("content")), ("Let me see".into(), "I look.".into()));
    let calls: Vec<_> = deltas().filter_map(|delta| delta["tool_calls"].as_array()).flatten().collect();
    assert_eq!((&calls[0]["index"], &calls[0]["function"]["name"]), (&json!(0), &json!("weather")));
    assert!(calls.len() > 1 && calls[1..].iter().all(|call| call.get("id").is_none()), "{calls:?}");
    let arguments: String = calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"city\": \"Köln\"}");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_results_turn_reaches_the_template() {
    let mut server = served(
        "{% for m in messages %}{{ m.role }}{{ m.tool_calls[0].function.arguments.a if m.tool_calls }};{% endfor %}",
    )
    .await;
    let messages = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{"id":"1",
        "type":"function","function":{"name":"f","arguments":"{\"a\": 41}"}}]},
        {"role":"tool","tool_call_id":"1","content":"42"}]}"#;
    let answered = asked(server.address, "/chat_tokenize", messages.into());
    assert_eq!(answered.await.unwrap().json()["templated_text"], "user;assistant41;tool;");
    let answered = asked(server.address, "/v1/chat/completions", messages.into());
    answer(server.submission().await, outputs(&["x"], FinishReason::Length)).await;
    assert_eq!(answered.await.unwrap().json()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn several_answers_are_branches_of_one_draw() {
    for stream in [false, true] {
        let mut server = start().await;
        let answered =
            asked(server.address, "/v1/chat/completions", chat(&format!(r#","n":3,"seed":5,"stream":{stream}"#)));
        let mut submissions = vec![];
        for _ in 0..3 {
            submissions.push(server.submission().await);
        }
        let branches: Vec<_> =
            submissions.iter().map(|one| (one.request.sampling.branch, one.request.sampling.seed)).collect();
        assert_eq!(branches, [(0, 5), (1, 5), (2, 5)]);
        assert_eq!(server.engine.num_free_permits(), 1);
        for (submission, text) in submissions.into_iter().zip(["a", "b", "c"]).rev() {
            answer(submission, outputs(&[text, "!"], FinishReason::EosToken)).await;
        }
        let answer = answered.await.unwrap();
        let texts: Vec<String> = if stream {
            let (chunks, is_done) = chunks(&answer);
            assert!(is_done);
            let of =
                |index: usize| chunks.iter().map(|chunk| &chunk["choices"][0]).filter(move |one| one["index"] == index);
            assert!((0..3).all(|n| of(n).filter(|one| one["delta"]["role"] == "assistant").count() == 1));
            (0..3).map(|n| of(n).filter_map(|one| one["delta"]["content"].as_str()).collect()).collect()
        } else {
            let json = answer.json();
            assert_eq!(json["usage"]["completion_tokens"], 6);
            let choices = json["choices"].as_array().unwrap();
            assert!(choices.iter().enumerate().all(|(n, choice)| choice["index"] == n));
            choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(texts, ["a!", "b!", "c!"]);
    }
    let mut server = start().await;
    let body = chat(r#","n":4"#);
    let held = server.engine.permit().unwrap();
    let refused = ask(server.address, &post("/v1/chat/completions", &body)).await;
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.check_openai_error(429, "overloaded")["type"], "rate_limit_error");
    drop(held);
    assert_eq!(server.engine.num_free_permits(), 4, "all or none are taken");
    assert!(server.submissions.try_recv().is_err());
}

#[tokio::test]
async fn log_probabilities_have_the_bytes_of_their_tokens() {
    let mut server = start().await;
    let answered = asked(server.address, "/v1/chat/completions", chat(r#","logprobs":true,"top_logprobs":1"#));
    let submission = server.submission().await;
    assert_eq!(submission.request.sampling.top_n, 1);
    answer(submission, outputs(&["He"], FinishReason::EosToken)).await;
    let content = answered.await.unwrap().json()["choices"][0]["logprobs"]["content"].take();
    let spelled = |id: u32| tokenizer().decode_one(id);
    assert_eq!(content[0]["token"], spelled(300));
    assert_eq!(content[0]["bytes"], json!(spelled(300).as_bytes()));
    assert_eq!((&content[0]["logprob"], content.as_array().unwrap().len()), (&json!(-0.5), 1));
    assert_eq!(content[0]["top_logprobs"][0]["token"], spelled(500));
}

#[tokio::test]
async fn ids_are_told_where_asked() {
    for stream in [false, true] {
        let mut server = start().await;
        let fields = format!(r#","return_token_ids":true,"ignore_eos":true,"min_tokens":2,"stream":{stream}"#);
        let answered = asked(server.address, "/v1/chat/completions", chat(&fields));
        let submission = server.submission().await;
        assert!(submission.request.ignore_eos && submission.request.sampling.min_new_tokens == 2);
        let prompt = submission.request.prompt_ids.clone();
        answer(submission, outputs(&["a", "", "b"], FinishReason::Length)).await;
        let answer = answered.await.unwrap();
        let (chunks, whole) = if stream { (chunks(&answer).0, json!({})) } else { (vec![], answer.json()) };
        let first = chunks.first().unwrap_or(&whole);
        assert_eq!(first["prompt_token_ids"], json!(prompt));
        let ids: Vec<_> = if stream {
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten().cloned().collect()
        } else {
            whole["choices"][0]["token_ids"].as_array().unwrap().clone()
        };
        assert_eq!(ids, [300, 301, 302]);
    }
}

#[tokio::test]
async fn completions_take_prompts_in_all_forms() {
    let mut server = start().await;
    let body = r#"{"prompt":["a","b c"],"n":2,"echo":true,"max_tokens":4,"temperature":0}"#;
    let answered = asked(server.address, "/v1/completions", body.into());
    for n in 0..4 {
        let submission = server.submission().await;
        assert!(!submission.request.sampling.do_sample);
        let text = ["a", "b c"][n / 2];
        assert_eq!(submission.request.prompt_ids, tokenizer().encode(text, true).unwrap(), "with special tokens");
        answer(submission, outputs(&[&format!("{n}")], FinishReason::EosToken)).await;
    }
    let json = answered.await.unwrap().json();
    let texts: Vec<_> = json["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect();
    assert_eq!(texts, ["a0", "a1", "b c2", "b c3"]);
    assert!(json["object"] == "text_completion" && json["choices"][3]["index"] == 3);
    assert_eq!(json["choices"][0]["finish_reason"], "stop");

    let ids = tokenizer().encode("hello", false).unwrap();
    let answered = asked(server.address, "/v1/completions", json!({"prompt": ids, "echo": true}).to_string());
    let submission = server.submission().await;
    assert_eq!(submission.request.prompt_ids, ids, "as they are");
    answer(submission, outputs(&["!"], FinishReason::EosToken)).await;
    assert_eq!(answered.await.unwrap().json()["choices"][0]["text"], "hello!");
}

fn prompt_token(id: u32, logprob: Option<f32>) -> PromptToken {
    PromptToken { id, text: String::new(), logprob, top: vec![] }
}

#[tokio::test]
async fn an_echo_with_log_probabilities_scores_the_prompt() {
    for (stream, max_tokens) in [(false, 0), (false, 1), (true, 1)] {
        let mut server = start().await;
        let body =
            json!({"prompt": [300, 301], "echo": true, "logprobs": 1, "max_tokens": max_tokens, "stream": stream});
        let answered = asked(server.address, "/v1/completions", body.to_string());
        let submission = server.submission().await;
        assert!(submission.request.wants_prompt_logprobs && submission.request.max_new_tokens == 1);
        let mut generated = outputs(&["x"], FinishReason::Length);
        generated[0].prompt = Some(vec![prompt_token(300, None), prompt_token(301, Some(-2.5))]);
        answer(submission, generated).await;
        let answer = answered.await.unwrap();
        let json = if stream { chunks(&answer).0.remove(0) } else { answer.json() };
        let choice = &json["choices"][0];
        let logprobs = &choice["logprobs"];
        let generated = usize::try_from(max_tokens).unwrap();
        assert_eq!(logprobs["token_logprobs"].as_array().unwrap()[..2], [json!(null), json!(-2.5)]);
        assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 2 + generated);
        assert_eq!(logprobs["top_logprobs"][0], json!(null));
        let text = tokenizer().decode_one(300) + &tokenizer().decode_one(301);
        assert_eq!(choice["text"], text + if max_tokens == 0 { "" } else { "x" });
        if !stream {
            assert_eq!(json["usage"]["completion_tokens"], max_tokens);
        }
    }
}

#[tokio::test]
async fn the_best_candidates_are_answered() {
    let mut server = start().await;
    let answered = asked(server.address, "/v1/completions", r#"{"prompt":"a","n":1,"best_of":3}"#.into());
    for (text, logprob) in [("bad", -3.0), ("best", -0.1), ("good", -1.0)] {
        let mut generated = outputs(&[text], FinishReason::EosToken);
        generated[0].token.logprob = logprob;
        answer(server.submission().await, generated).await;
    }
    let json = answered.await.unwrap().json();
    assert_eq!((json["choices"].as_array().unwrap().len(), &json["choices"][0]["text"]), (1, &json!("best")));
    assert_eq!(json["usage"]["completion_tokens"], 3, "all that was generated");
}

#[tokio::test]
async fn a_streamed_completion_ends_with_its_reason_and_usage() {
    let mut server = start().await;
    let body = r#"{"prompt":["a","b"],"stream":true,"stream_options":{"include_usage":true},"stop":["x"]}"#;
    let answered = asked(server.address, "/v1/completions", body.into());
    for text in ["1", "2"] {
        answer(server.submission().await, marked(&[(text, false), ("</s>", true)], FinishReason::EosToken)).await;
    }
    let (chunks, is_done) = chunks(&answered.await.unwrap());
    assert!(is_done);
    for (index, text) in ["1", "2"].into_iter().enumerate() {
        let of: Vec<_> =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        assert_eq!((&of[0]["text"], &of[0]["finish_reason"]), (&json!(text), &json!(null)));
        assert_eq!((&of[1]["text"], &of[1]["finish_reason"]), (&json!(""), &json!("stop")));
    }
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn rejections_are_told_as_openai_does_with_their_true_status() {
    let server = served("{{ raise_exception('no ' ~ messages[0].content) }}").await;
    let refused = async |path, body: &str| ask(server.address, &post(path, body)).await;
    let error = refused("/v1/chat/completions", &chat("")).await.check_openai_error(422, "template_error");
    assert_eq!(error["message"], "Template error: no Hi");
    let error =
        refused("/v1/chat/completions", &chat(r#","temperature":-1"#)).await.check_openai_error(422, "validation");
    assert_eq!((&error["param"], &error["type"]), (&json!("temperature"), &json!("invalid_request_error")));
    refused("/v1/chat/completions", "{").await.check_openai_error(400, "validation");
    let other = chat("").replace("tgi", "gpt-4");
    let error = refused("/v1/chat/completions", &other).await.check_openai_error(404, "model_not_found");
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    refused("/v1/completions", r#"{"prompt":"a","suffix":"b"}"#).await.check_openai_error(422, "suffix not supported");
    refused("/v1/completions", r#"{"prompt":["a","a","a","a","a"]}"#)
        .await
        .check_openai_error(422, "batch size exceeded");
    let both = chat(&format!(r#",{TOOLS},"response_format":{{"type":"json_object"}}"#));
    let error = refused("/v1/chat/completions", &both).await.check_openai_error(422, "tool_error");
    assert_eq!(error["message"], "Tool error: Grammar and tools are mutually exclusive");
    let streamed = chat(r#","stream":true,"n":0"#);
    refused("/v1/chat/completions", &streamed).await.check_openai_error(422, "validation");
    refused("/generate", "{").await.check_error(400, "validation");
    assert_eq!(server.engine.num_free_permits(), 4);
}

#[tokio::test]
async fn a_failure_in_a_stream_ends_it_with_an_error_and_no_done() {
    let mut server = start().await;
    let answered = asked(server.address, "/v1/chat/completions", chat(r#","stream":true"#));
    let submission: Submission = server.submission().await;
    submission.outputs.send(Ok(output(0, "a"))).await.unwrap();
    fail(submission, GenerateError::KilledShards).await;
    let (chunks, is_done) = chunks(&answered.await.unwrap());
    assert!(!is_done);
    let last = chunks.last().unwrap();
    assert_eq!((&last["error_type"], &last["error"]["type"]), (&json!("generation"), &json!("server_error")));
}

#[tokio::test]
async fn the_served_model_is_listed_and_found_by_its_name() {
    let server = serve(Config { model_id: "org/model".into(), ..config() }, ready(), tokenizer()).await;
    let model = json!({"id": "org/model", "object": "model", "created": 0, "owned_by": "org/model"});
    let list = ask(server.address, &get("/v1/models")).await.json();
    assert_eq!(list, json!({"object": "list", "data": [model]}));
    // By every name that a request may give it.
    for path in ["/v1/models/org/model", "/v1/models/org%2Fmodel", "/v1/models/tgi", "/v1/models/dummy"] {
        assert_eq!(ask(server.address, &get(path)).await.json(), model, "{path}");
    }
    ask(server.address, &get("/v1/models/other")).await.check_openai_error(404, "model_not_found");
}

#[tokio::test]
async fn the_last_message_of_the_assistant_is_gone_on_with() {
    let mut server = start().await;
    let body = r#"{"messages":[{"role":"user","content":"Count"},{"role":"assistant","content":"one two "}]}"#;
    let answered = asked(server.address, "/v1/chat/completions", body.into());
    let submission = server.submission().await;
    let expected = tokenizer().encode("<|user|>Count\n<|assistant|>one two ", false).unwrap();
    assert_eq!(submission.request.prompt_ids, expected);
    let finished = Finished { reason: FinishReason::EosToken, text: "three".into(), num_tokens: 1 };
    answer(submission, vec![Output { finished: Some(finished), ..output(0, "three") }]).await;
    assert_eq!(answered.await.unwrap().json()["choices"][0]["message"]["content"], "three");
}
