//! What is answered: bodies, streams, headers, and what becomes of them when somebody goes away.

#![allow(clippy::unwrap_used)]

mod http_common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_common::*;
use serde_json::json;
use text_generation_router::engine::{FinishReason, GenerateError, Status};
use text_generation_router::http::{Config, Deadlines};
use text_generation_router::request::{Sampling, ValidRequest};
use text_generation_router::text::tokenizer::{Encode, Placed, TokenizerError};

const TEXTS: [&str; 3] = [" big", " \"bl\nue\" 🙂", "data: [DONE]\n\n"];

async fn ask_and_answer(server: &mut Server, request: Vec<u8>) -> (Answer, ValidRequest) {
    let asked = tokio::spawn({
        let address = server.address;
        async move { ask(address, &request).await }
    });
    let submission = server.submission().await;
    let request = submission.request.clone();
    answer(submission, outputs(&TEXTS, FinishReason::StopSequence)).await;
    (asked.await.unwrap(), request)
}

#[tokio::test]
async fn generate_answers_as_tgi_does() {
    let mut server = start().await;
    let body = r#"{"inputs":"The sky","parameters":{"max_new_tokens":3}}"#;
    let (answer, request) = ask_and_answer(&mut server, post("/generate", body)).await;
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "application/json"));
    assert_eq!(answer.json(), json!({"generated_text": TEXTS.concat()}));
    assert_eq!(request.prompt_ids, tokenizer().encode("The sky", true).unwrap());
    assert_eq!(answer.headers["x-compute-characters"], "7");
    assert_eq!(answer.headers["x-prompt-tokens"], request.prompt_ids.len().to_string());
    assert_eq!(answer.headers["x-generated-tokens"], "3");
    assert_eq!(answer.headers["x-compute-type"], "cpu+optimized");
    assert!(answer.headers["x-compute-time"].parse::<f64>().unwrap() >= 0.0);
    for name in ["x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token"] {
        assert!(answer.headers[name].parse::<u64>().unwrap() < 20_000, "{name}");
    }
}

#[tokio::test]
async fn the_header_x_compute_type_says_what_the_operator_says() {
    let config = Config { compute_type: Some("2-a100".parse().unwrap()), ..config() };
    let server = serve(config, ready(), tokenizer()).await.answer_all(&["x"]);
    for path in ["/generate", "/generate_stream", "/"] {
        let answer = ask(server.address, &post(path, r#"{"inputs":"a"}"#)).await;
        assert_eq!((answer.status, answer.headers["x-compute-type"].as_str()), (200, "2-a100"), "{path}");
    }
}

#[tokio::test]
async fn details_tell_tokens_alternatives_seed_and_the_reason_of_the_end() {
    let mut server = start().await;
    let body =
        r#"{"inputs":"a","parameters":{"details":true,"top_n_tokens":1,"do_sample":true,"seed":18446744073709551615}}"#;
    let (answer, request) = ask_and_answer(&mut server, post("/generate", body)).await;
    let token = |n: usize| json!({"id": 300 + n, "text": TEXTS[n], "logprob": -0.5, "special": false});
    let top = |n: usize| json!([{"id": 500 + n, "text": "!", "logprob": -1.5, "special": false}]);
    let expected = json!({"generated_text": TEXTS.concat(), "details": {
        "finish_reason": "stop_sequence", "generated_tokens": 3, "seed": u64::MAX, "prefill": [],
        "tokens": [token(0), token(1), token(2)], "top_tokens": [top(0), top(1), top(2)]}});
    assert_eq!(answer.json(), expected);
    assert_eq!((request.sampling.seed, request.sampling.top_n), (u64::MAX, 1));
    let body = r#"{"inputs":"a","parameters":{"details":true}}"#;
    let details = ask_and_answer(&mut server, post("/generate", body)).await.0.json()["details"].clone();
    assert_eq!(details["seed"], json!(null), "greedy");
    assert!(details.get("top_tokens").is_none());
}

#[tokio::test]
async fn the_compatibility_route_answers_a_list_after_the_prompt_or_a_stream() {
    let mut server = start().await;
    let text = TEXTS.concat();
    for (path, parameters, expected) in [
        ("/", "{}", json!([{"generated_text": format!("Hi{text}")}])),
        ("/", r#"{"return_full_text":null}"#, json!([{"generated_text": format!("Hi{text}")}])),
        ("/", r#"{"return_full_text":false}"#, json!([{"generated_text": text}])),
        ("/generate", r#"{"return_full_text":true}"#, json!({"generated_text": format!("Hi{text}")})),
    ] {
        let body = format!(r#"{{"inputs":"Hi","parameters":{parameters},"stream":false}}"#);
        assert_eq!(ask_and_answer(&mut server, post(path, body)).await.0.json(), expected, "{path} {parameters}");
    }
    let body = r#"{"inputs":"Hi","stream":true}"#;
    let events = ask_and_answer(&mut server, post("/", body)).await.0.events();
    assert_eq!(events.last().unwrap()["generated_text"], format!("Hi{text}"));
}

#[tokio::test]
async fn a_stream_is_byte_for_byte_what_tgi_sends() {
    let mut server = start().await;
    let body = r#"{"inputs":"a","parameters":{"details":true}}"#;
    let (answer, request) = ask_and_answer(&mut server, post("/generate_stream", body)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    assert_eq!((&*answer.headers["cache-control"], &*answer.headers["x-accel-buffering"]), ("no-cache", "no"));
    assert_eq!(answer.headers["x-compute-characters"], "1");
    let event = |n: usize, rest: &str| {
        let (id, text) = (300 + n, serde_json::to_string(TEXTS[n]).unwrap());
        let token = format!(r#"{{"id":{id},"text":{text},"logprob":-0.5,"special":false}}"#);
        let top = format!(r#"[{{"id":{},"text":"!","logprob":-1.5,"special":false}}]"#, 500 + n);
        format!("data: {{\"index\":{},\"token\":{token},\"top_tokens\":{top},{rest}}}\n\n", n + 1)
    };
    let length = request.prompt_ids.len();
    let end = format!(
        r#""generated_text":{},"details":{{"finish_reason":"stop_sequence","generated_tokens":3,"seed":null,"input_length":{length}}}"#,
        serde_json::to_string(&TEXTS.concat()).unwrap()
    );
    let nothing = r#""generated_text":null,"details":null"#;
    assert_eq!(answer.body, event(0, nothing) + &event(1, nothing) + &event(2, &end));
    let texts: String =
        answer.events().iter().map(|event| event["token"]["text"].as_str().unwrap().to_owned()).collect();
    assert_eq!(texts, TEXTS.concat(), "as the answer in one piece");
}

#[tokio::test]
async fn each_token_is_sent_when_it_is_there() {
    let mut server = start().await;
    let mut client = Client::connect(server.address).await;
    client.send(&post("/generate_stream", r#"{"inputs":"a"}"#)).await;
    let submission = server.submission().await;
    for (n, text) in (1..).zip(["x", "y", "z"]) {
        submission.outputs.send(Ok(output(n, text))).await.unwrap();
        let got = client.until(&format!("\"index\":{n},")).await;
        assert!(got.contains(text), "{got}");
    }
}

#[tokio::test]
async fn parameters_reach_the_engine_with_their_defaults() {
    let mut server = start().await.answer_all(&["x"]);
    let greedy = Sampling { seed: 7, ..Sampling::default() };
    let sampled = Sampling { do_sample: true, ..greedy.clone() };
    let cases: Vec<(&str, Sampling)> = vec![
        ("", greedy.clone()),
        (
            r#","best_of":1,"watermark":false,"decoder_input_details":false,"grammar":null,"adapter_id":"docs""#,
            greedy.clone(),
        ),
        (
            r#","do_sample":null,"temperature":null,"top_k":null,"top_p":null,"typical_p":null,"stop":null,"details":null,
               "repetition_penalty":null,"frequency_penalty":null,"truncate":null,"top_n_tokens":null,"best_of":null,
               "max_new_tokens":null,"watermark":null,"decoder_input_details":null,"adapter_id":null,"unknown":[1]"#,
            greedy.clone(),
        ),
        (r#","temperature":1.0"#, greedy.clone()),
        (r#","do_sample":true"#, sampled.clone()),
        (r#","temperature":0.5"#, Sampling { temperature: 0.5, ..sampled.clone() }),
        (r#","top_k":2147483647"#, Sampling { top_k: 2_147_483_647, ..sampled.clone() }),
        (r#","top_p":0.9"#, Sampling { top_p: 0.9, ..sampled.clone() }),
        (r#","typical_p":0.25"#, Sampling { typical_p: 0.25, ..sampled }),
        (r#","repetition_penalty":1.5"#, Sampling { repetition_penalty: 1.5, ..greedy.clone() }),
        (r#","frequency_penalty":-2.0"#, Sampling { frequency_penalty: -2.0, ..greedy.clone() }),
        (r#","top_n_tokens":5"#, Sampling { top_n: 5, ..greedy.clone() }),
    ];
    for (parameters, expected) in cases {
        let body = format!(r#"{{"inputs":"a","unknown":{{}},"parameters":{{"seed":7{parameters}}}}}"#);
        assert_eq!(ask(server.address, &post("/generate", body)).await.status, 200, "{parameters}");
        let request = server.requests.recv().await.unwrap();
        assert_eq!(request.sampling, expected, "{parameters}");
        assert_eq!(request.prompt_ids.len() + request.max_new_tokens, 64, "as long as the model goes");
        assert!(!request.ignore_eos && request.stop.is_empty());
    }
}

#[tokio::test]
async fn lengths_truncation_stops_and_seeds_are_passed_on() {
    let mut server = start().await.answer_all(&["x"]);
    let mut seen = async |parameters: &str| {
        let body = format!(r#"{{"inputs":"a b c d","parameters":{parameters}}}"#);
        assert_eq!(ask(server.address, &post("/generate", body)).await.status, 200, "{parameters}");
        server.requests.recv().await.unwrap()
    };
    let ids = tokenizer().encode("a b c d", true).unwrap();
    let request = seen(r#"{"max_new_tokens":59,"stop":["a","b","é","🙂🙂"],"ignore_eos_token":true}"#).await;
    assert_eq!((request.prompt_ids.len(), request.max_new_tokens, request.ignore_eos), (5, 59, true));
    assert_eq!(request.stop, ["a", "b", "é", "🙂🙂"]);
    assert_eq!(seen(r#"{"truncate":1}"#).await.prompt_ids, ids[4..]);
    assert_eq!(seen(r#"{"truncate":63}"#).await.prompt_ids, ids);
    let (one, other) = (seen(r#"{"do_sample":true}"#).await, seen(r#"{"do_sample":true}"#).await);
    assert_ne!(one.sampling.seed, other.sampling.seed, "drawn for each request");
}

#[tokio::test]
async fn one_request_more_than_allowed_is_429_with_retry_after() {
    let mut server = start().await;
    let mut clients = vec![];
    let mut held = vec![];
    for _ in 0..4 {
        let mut client = Client::connect(server.address).await;
        client.send(&post("/generate_stream", r#"{"inputs":"a"}"#)).await;
        held.push(server.submission().await);
        clients.push(client);
    }
    for path in ["/generate", "/generate_stream", "/"] {
        let begun = Instant::now();
        let answer = ask(server.address, &post(path, r#"{"inputs":"a","stream":true}"#)).await;
        assert_eq!(answer.check_error(429, "overloaded"), "Model is overloaded");
        assert_eq!(answer.headers["retry-after"], "1");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    // A long body is not even read: that would have it wait with others of its size.
    let long = format!("{{\"inputs\":\"{}\",}}", "a".repeat(1 << 16));
    ask(server.address, &post("/generate", &long)).await.check_error(429, "overloaded");
    drop(held);
    assert_eq!(server.engine.num_free_permits(), 4);
    ask(server.address, &post("/generate", &long)).await.check_error(400, "validation");
    assert_eq!(server.engine.num_free_permits(), 4);
}

#[tokio::test]
async fn a_request_that_fails_before_its_first_token_gets_its_status_streaming_or_not() {
    let mut server = start().await;
    let row = |kind| GenerateError::Row { kind, message: "logits are not finite".into() };
    let cases: Vec<(GenerateError, u16, &str, &str)> = vec![
        (GenerateError::QueueTimeout { seconds: 2.0 }, 429, "overloaded", "the request waited longer than 2 s"),
        (GenerateError::TooLong { tokens: 9, limit: 8 }, 422, "validation", "Input validation error: "),
        (GenerateError::ShuttingDown { reason: "over".into() }, 503, "shutting_down", "over"),
        (GenerateError::KilledShards, 424, "generation", "Request failed during generation: "),
        (GenerateError::Stalled, 424, "generation", "Request failed during generation: "),
        (row("numerical"), 424, "numerical", "Request failed during generation: logits are not finite"),
        (row("unsupported"), 422, "validation", "Input validation error: logits are not finite"),
    ];
    for (error, status, error_type, text) in cases {
        for path in ["/generate", "/generate_stream", "/"] {
            let asked = tokio::spawn({
                let address = server.address;
                async move { ask(address, &post(path, r#"{"inputs":"a","stream":true}"#)).await }
            });
            fail(server.submission().await, error.clone()).await;
            let answer = asked.await.unwrap();
            let said = answer.check_error(status, error_type);
            assert!(said.starts_with(text), "{said}");
            assert_eq!(answer.headers.contains_key("retry-after"), status == 429);
        }
    }
    // An engine that ends without a word.
    for (path, error_type) in
        [("/generate", "incomplete_generation"), ("/generate_stream", "incomplete_generation_stream")]
    {
        let asked = tokio::spawn({
            let address = server.address;
            async move { ask(address, &post(path, r#"{"inputs":"a"}"#)).await }
        });
        drop(server.submission().await);
        asked.await.unwrap().check_error(500, error_type);
    }
}

#[tokio::test]
async fn an_error_after_the_first_token_is_the_last_event() {
    let mut server = start().await;
    for is_silent in [false, true] {
        let asked = tokio::spawn({
            let address = server.address;
            async move { ask(address, &post("/generate_stream", r#"{"inputs":"a"}"#)).await }
        });
        let submission = server.submission().await;
        submission.outputs.send(Ok(output(0, "x"))).await.unwrap();
        if is_silent {
            drop(submission)
        } else {
            fail(submission, GenerateError::KilledShards).await
        }
        let answer = asked.await.unwrap();
        assert_eq!(answer.status, 200);
        let events = answer.events();
        assert_eq!(events.len(), 2, "{events:?}");
        let expected = if is_silent { "incomplete_generation_stream" } else { "generation" };
        assert_eq!(events[1]["error_type"], expected);
        assert_eq!(events[1].as_object().unwrap().len(), 2);
    }
}

fn lost() -> Status {
    Status { is_ready: false, detail: "a shard is being replaced".into(), ..ready() }
}

#[tokio::test]
async fn while_the_shards_are_lost_requests_wait_and_streams_are_told_each_second() {
    let mut server = serve(config(), lost(), tokenizer()).await;
    assert_eq!(ask(server.address, &get("/health")).await.check_error(503, "healthcheck"), "unhealthy");
    let mut client = Client::connect(server.address).await;
    client.send(&post("/generate_stream", r#"{"inputs":"a"}"#)).await;
    let submission = server.submission().await;
    let mut asked = tokio::spawn({
        let address = server.address;
        async move { ask(address, &post("/generate", r#"{"inputs":"a"}"#)).await }
    });
    let other = server.submission().await;
    let begun = Instant::now();
    let head = client.until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    client.until(":\n\n").await;
    client.until(":\n\n").await;
    let waited = begun.elapsed();
    assert!(waited > Duration::from_millis(1500) && waited < Duration::from_millis(4000), "{waited:?}");
    assert!(!asked.is_finished(), "the other waits");
    server.status.send_replace(ready());
    answer(other, outputs(&["y"], FinishReason::Length)).await;
    assert_eq!((&mut asked).await.unwrap().json(), json!({"generated_text": "y"}));
    answer(submission, outputs(&["x"], FinishReason::Length)).await;
    client.until("\"generated_text\":\"x\"").await;
    assert_eq!(ask(server.address, &get("/health")).await.status, 200);
}

#[tokio::test]
async fn a_stream_that_waits_in_the_queue_is_told_within_15_s_and_on_every_route() {
    assert!(Deadlines::default().comment < Duration::from_secs(15));
    let comment = Duration::from_millis(400);
    let deadlines = Deadlines { comment, ..Deadlines::default() };
    let mut server = serve(Config { deadlines, ..config() }, ready(), tokenizer()).await;
    let chat = r#"{"messages":[{"role":"user","content":"a"}],"stream":true}"#;
    let routes = [
        ("/generate_stream", r#"{"inputs":"a"}"#),
        ("/", r#"{"inputs":"a","stream":true}"#),
        ("/v1/completions", r#"{"prompt":"a","stream":true}"#),
        ("/v1/chat/completions", chat),
    ];
    for (path, body) in routes {
        let mut client = Client::connect(server.address).await;
        let begun = Instant::now();
        client.send(&post(path, body)).await;
        let submission = server.submission().await;
        let told = client.until(":\n\n").await;
        // With the head, not an interval after it: three quarters of one are for a busy machine.
        let waited = begun.elapsed();
        assert!(waited >= comment && waited < comment * 7 / 4, "{path}: {waited:?}");
        assert!(told.starts_with("HTTP/1.1 200") && !told.contains("data:"), "{path}: {told}");
        let again = Instant::now();
        client.until(":\n\n").await;
        assert!(again.elapsed() >= comment / 2, "{path}: {:?}", again.elapsed());
        answer(submission, outputs(&["x"], FinishReason::Length)).await;
        client.until("x").await;
    }
}

#[tokio::test]
async fn a_stream_that_loses_its_shards_is_told_each_second_and_goes_on() {
    let mut server = start().await;
    let mut client = Client::connect(server.address).await;
    client.send(&post("/generate_stream", r#"{"inputs":"a"}"#)).await;
    let submission = server.submission().await;
    submission.outputs.send(Ok(output(0, "x"))).await.unwrap();
    client.until("\"index\":1,").await;
    server.status.send_replace(lost());
    let begun = Instant::now();
    client.until(":\n\n").await;
    client.until(":\n\n").await;
    assert!(begun.elapsed() < Duration::from_millis(4000), "{:?}", begun.elapsed());
    server.status.send_replace(ready());
    submission.outputs.send(Ok(output(1, "y"))).await.unwrap();
    client.until("\"index\":2,").await;
}

#[tokio::test]
async fn a_client_that_goes_away_aborts_its_sequence_streaming_or_not() {
    let mut server = start().await;
    for (path, num_tokens) in
        [("/generate", 0), ("/generate", 2), ("/", 1), ("/generate_stream", 0), ("/generate_stream", 2)]
    {
        let mut client = Client::connect(server.address).await;
        client.send(&post(path, r#"{"inputs":"a"}"#)).await;
        let submission = server.submission().await;
        for n in 0..num_tokens {
            submission.outputs.send(Ok(output(n, "x"))).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!submission.outputs.is_closed());
        drop(client);
        tokio::time::timeout(Duration::from_secs(2), submission.outputs.closed()).await.expect("aborted at once");
        drop(submission);
        assert_eq!(server.engine.num_free_permits(), 4);
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped_at_the_write_deadline() {
    let deadlines = Deadlines { write: Duration::from_millis(500), ..Deadlines::default() };
    let mut server = serve(Config { deadlines, ..config() }, ready(), tokenizer()).await;
    let mut client = Client::connect(server.address).await;
    client.send(&post("/generate_stream", r#"{"inputs":"a"}"#)).await;
    let submission = server.submission().await;
    let text = "x".repeat(100_000);
    let sent = async { while submission.outputs.send(Ok(output(0, &text))).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, sent).await.expect("dropped in time");
    drop(client);
}

#[tokio::test]
async fn while_draining_new_requests_are_503_and_running_ones_finish() {
    let mut server = start().await;
    let mut client = Client::connect(server.address).await;
    let headers = [("Content-Type", "application/json"), ("Content-Length", "14")];
    client.send((head("POST", "/generate_stream", &headers) + r#"{"inputs":"a"}"#).as_bytes()).await;
    let submission = server.submission().await;
    submission.outputs.send(Ok(output(0, "x"))).await.unwrap();
    client.until("\"index\":1,").await;
    server.status.send_replace(Status { is_draining: true, ..ready() });
    for path in ["/generate", "/generate_stream", "/"] {
        let mut other = Client::connect(server.address).await;
        other.send((head("POST", path, &headers) + r#"{"inputs":"a"}"#).as_bytes()).await;
        let answer = Answer::parse(&other.rest().await);
        answer.check_error(503, "shutting_down");
        assert_eq!(answer.headers["connection"], "close");
    }
    for path in ["/health", "/readyz", "/ping"] {
        ask(server.address, &get(path)).await.check_error(503, "healthcheck");
    }
    assert_eq!(ask(server.address, &get("/livez")).await.status, 200);
    let _ = server.shutdown.send(());
    answer(submission, outputs(&["y", "z"], FinishReason::Length)).await;
    let rest = String::from_utf8(client.rest().await).unwrap();
    assert!(rest.contains("\"generated_text\":\"yz\""), "{rest}");
    assert!(tokio::time::timeout(PATIENCE, server.served).await.expect("ends").unwrap().is_ok());
    assert!(tokio::net::TcpStream::connect(server.address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_up_the_end() {
    let server = start().await;
    let mut client = Client::connect(server.address).await;
    client.send(head("GET", "/health", &[]).as_bytes()).await;
    client.until("\r\n\r\n").await;
    let _ = server.shutdown.send(());
    tokio::time::timeout(Duration::from_secs(5), server.served).await.expect("ends").unwrap().unwrap();
    assert!(client.rest().await.is_empty());
}

#[tokio::test]
async fn probes_tell_the_state_apart() {
    let starting = Status { detail: "loading the model".into(), ..Status::default() };
    let draining = Status { is_draining: true, ..ready() };
    let paths = ["/", "/health", "/ping", "/readyz", "/livez", "/startupz", "/info", "/metrics"];
    for (status, expected) in [
        (starting.clone(), [503, 503, 503, 503, 200, 503, 503, 200]),
        (ready(), [200, 200, 200, 200, 200, 200, 200, 200]),
        (lost(), [503, 503, 503, 503, 200, 200, 200, 200]),
        (draining, [503, 503, 503, 503, 200, 200, 200, 200]),
    ] {
        let server = serve(config(), status.clone(), tokenizer()).await;
        for (path, expected) in paths.iter().zip(expected) {
            let answer = ask(server.address, &get(path)).await;
            assert_eq!(answer.status, expected, "{path} {status:?}");
        }
        let phase = ask(server.address, &get("/startupz")).await.json();
        let expected = if status.is_draining { "draining; serving" } else { &status.detail };
        assert_eq!(phase["phase"], expected);
    }
    let server = serve(config(), starting, tokenizer()).await;
    for path in ["/generate", "/generate_stream", "/"] {
        ask(server.address, &post(path, r#"{"inputs":"a"}"#)).await.check_error(503, "not_ready");
    }
}

#[tokio::test]
async fn info_tells_the_model_and_its_limits() {
    let server = start().await;
    let info = ask(server.address, &get("/info")).await.json();
    let expected = json!({"model_id": "docs", "model_sha": null, "model_pipeline_tag": null, "model_dtype": "float32",
        "model_device_type": "cpu", "max_concurrent_requests": 4, "max_best_of": 2, "max_stop_sequences": 4,
        "max_input_tokens": 63, "max_total_tokens": 64, "validation_workers": 2, "max_client_batch_size": 4,
        "router": "text-generation-router", "version": env!("CARGO_PKG_VERSION"), "sha": null, "docker_label": null});
    assert_eq!(info, expected);
}

/// Panics on a text that says so, and knows an id that the model does not.
#[derive(Debug)]
struct Moody;

impl Encode for Moody {
    fn encode(&self, text: &str, _add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        assert!(!text.starts_with("panic"));
        match text {
            "strange" => Err(TokenizerError::Text),
            "nothing" => Ok(vec![]),
            "unknown" => Ok(vec![1, 4096]),
            _ => Ok(vec![1, 2, 3]),
        }
    }

    fn places(&self, text: &str, _add_special: bool) -> Result<Vec<Placed>, TokenizerError> {
        assert!(!text.starts_with("panic"));
        Ok(vec![])
    }

    fn decode(&self, _ids: &[u32]) -> String {
        String::new()
    }

    fn spell(&self, _id: u32) -> Vec<u8> {
        vec![]
    }

    fn max_token_bytes(&self) -> Option<usize> {
        None
    }
}

#[tokio::test]
async fn a_text_on_which_the_tokenizer_fails_fails_alone() {
    let server = serve(config(), ready(), Arc::new(Moody)).await.answer_all(&["x"]);
    for _ in 0..4 {
        ask(server.address, &post("/generate", r#"{"inputs":"panic"}"#)).await.check_error(500, "internal");
        for text in ["strange", "nothing", "unknown"] {
            let body = format!(r#"{{"inputs":"{text}"}}"#);
            ask(server.address, &post("/generate", body)).await.check_error(422, "validation");
        }
        assert_eq!(ask(server.address, &post("/generate", r#"{"inputs":"fine"}"#)).await.status, 200);
        assert_eq!(ask(server.address, &get("/health")).await.status, 200);
    }
    assert_eq!(server.engine.num_free_permits(), 4);
}

#[tokio::test]
async fn after_a_panic_of_the_tokenizer_a_thousand_requests_are_answered() {
    let server = serve(config(), ready(), Arc::new(Moody)).await.answer_all(&["x"]);
    // Each is encoded elsewhere: where it is asked for, by a thread for short texts, by one for long ones, with places.
    for (path, length) in [("/generate", 5), ("/generate", 2000), ("/generate", 100_000), ("/tokenize", 5)] {
        let body = |text: &str| format!(r#"{{"inputs":"{text}{}"}}"#, "a".repeat(length - 5));
        ask(server.address, &post(path, body("panic"))).await.check_error(500, "internal");
        let fine = post(path, body("fine "));
        for n in 0..250 {
            assert_eq!(ask(server.address, &fine).await.status, 200, "{path} {length}: {n}");
            if n % 25 == 0 {
                assert_eq!(ask(server.address, &get("/health")).await.status, 200);
            }
        }
    }
    assert_eq!(server.engine.num_free_permits(), 4);
}
