//! `/metrics`. A process has one recorder, so this is one test in a process of its own.

#![allow(clippy::unwrap_used)]

mod http_common;

use http_common::*;
use text_generation_router::engine::{FinishReason, GenerateError, Status};

#[tokio::test]
async fn metrics_tell_what_became_of_requests_under_the_names_of_tgi() {
    let config = config();
    config.metrics.install();
    let mut server = serve(config, Status::default(), tokenizer()).await;
    ask(server.address, &post("/generate", r#"{"inputs":"a"}"#)).await.check_error(503, "not_ready");
    let early = ask(server.address, &get("/metrics")).await.body;
    assert!(early.contains("\ntgi_request_count 1\n"), "before the model is known: {early}");
    assert!(early.contains("\ntgi_request_failure{err=\"overloaded\"} 1\n"), "{early}");
    server.status.send_replace(ready());

    let mut slow = Client::connect(server.address).await;
    let body = post("/generate", r#"{"inputs":"a"}"#);
    slow.send(&body[..body.len() - 1]).await;
    let count = async {
        while !ask(server.address, &get("/metrics")).await.body.contains("\ntgi_request_count 2\n") {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, count).await.expect("a request is counted when it arrives");
    drop(slow);

    for path in ["/generate", "/generate_stream"] {
        let asked = tokio::spawn({
            let address = server.address;
            async move { ask(address, &post(path, r#"{"inputs":"a"}"#)).await }
        });
        answer(server.submission().await, outputs(&["x", "y"], FinishReason::Length)).await;
        asked.await.unwrap();
    }
    ask(server.address, &post("/generate", r#"{"inputs":""}"#)).await.check_error(422, "validation");
    let mut gone = Client::connect(server.address).await;
    gone.send(&post("/generate", r#"{"inputs":"a"}"#)).await;
    let submission = server.submission().await;
    drop(gone);
    submission.outputs.closed().await;
    let asked = tokio::spawn({
        let address = server.address;
        async move { ask(address, &post("/generate", r#"{"inputs":"a"}"#)).await }
    });
    drop(server.submission().await);
    asked.await.unwrap().check_error(500, "incomplete_generation");
    let asked = tokio::spawn({
        let address = server.address;
        async move { ask(address, &post("/generate", r#"{"inputs":"a"}"#)).await }
    });
    let error = GenerateError::Row { kind: "numerical", message: "logits are not finite".into() };
    fail(server.submission().await, error).await;
    asked.await.unwrap().check_error(424, "numerical");

    // What no handler has seen is counted on neither side.
    let body = r#"{"inputs":"a"}"#;
    let with = |headers: &[(&str, &str)], body: &str| {
        let length = body.len().to_string();
        let headers = [headers, &[("Content-Length", &length), ("Connection", "close")]].concat();
        [head("POST", "/generate", &headers), body.to_owned()].concat().into_bytes()
    };
    let json = ("Content-Type", "application/json");
    ask(server.address, &with(&[("Content-Type", "text/plain")], body))
        .await
        .check_error(415, "unsupported_media_type");
    let error = ask(server.address, &with(&[json, ("Content-Encoding", "gzip")], body)).await;
    let text = error.check_error(415, "unsupported_media_type");
    assert!(text.contains("`Content-Encoding: gzip`"), "{text}");
    ask(server.address, &with(&[json], &"x".repeat(2_000_001))).await.check_error(413, "payload_too_large");
    let chunks = [head("POST", "/generate", &[json, ("Transfer-Encoding", "chunked")]), "nonsense\r\n".into()].concat();
    ask(server.address, chunks.as_bytes()).await.check_error(400, "bad_request");

    let answer = ask(server.address, &get("/metrics")).await;
    assert!(answer.headers["content-type"].starts_with("text/plain"));
    let lines: Vec<&str> = answer.body.lines().collect();
    let has = |line: &str| assert!(lines.contains(&line), "{line}: {}", answer.body);
    has("tgi_request_count 12");
    has("tgi_request_success 2");
    has(r#"tgi_request_failure{err="overloaded"} 1"#);
    has(r#"tgi_request_failure{err="validation"} 5"#);
    has(r#"tgi_request_failure{err="dropped"} 2"#);
    has(r#"tgi_request_failure{err="incomplete"} 1"#);
    has(r#"tgi_request_failure{err="numerical"} 1"#);
    has("tgi_request_generated_tokens_sum 4");
    has("tgi_request_generated_tokens_count 2");
    // A hundred steps up to 64 tokens, and two tokens in the fourth.
    has(r#"tgi_request_generated_tokens_bucket{le="64"} 2"#);
    has(r#"tgi_request_generated_tokens_bucket{le="1.92"} 0"#);
    has(r#"tgi_request_generated_tokens_bucket{le="2.56"} 2"#);
    // The first of TGI's steps; how many of the two were that fast is for the machine to say.
    let fast = lines.iter().find_map(|line| line.strip_prefix(r#"tgi_request_duration_bucket{le="0.00015"} "#));
    assert!(fast.is_some_and(|count| count.parse::<u32>().is_ok_and(|count| count <= 2)), "{fast:?}");
    for name in
        ["duration", "validation_duration", "queue_duration", "inference_duration", "mean_time_per_token_duration"]
    {
        has(&format!("tgi_request_{name}_count 2"));
    }
    has("tgi_request_input_length_count 5");
    has("tgi_request_max_new_tokens_count 5");
}
