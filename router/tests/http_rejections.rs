//! What is refused, with which status and body: by table, over real connections. And what the log says of it.

#![allow(clippy::unwrap_used)]

mod http_common;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_common::*;
use serde_json::{Value, json};
use text_generation_router::engine::{FinishReason, GenerateError};
use text_generation_router::http::{Config, Deadlines};

const OK: &str = r#"{"inputs":"a","parameters":{"max_new_tokens":1}}"#;

#[tokio::test]
async fn routes_and_methods_that_do_not_exist_are_refused_as_json() {
    let server = start().await.answer_all(&["x"]);
    for path in ["/nope", "//generate", "/generate%00", "/..%2fgenerate", "/v1/nope", "/generate/"] {
        let length = OK.len().to_string();
        for request in [post(path, OK), head("HEAD", path, &[("Connection", "close")]).into_bytes(), get(path)] {
            let is_head = request.starts_with(b"HEAD");
            let answer = ask(server.address, &request).await;
            assert_eq!(answer.status, 404, "{path} {length}");
            if path.starts_with("/v1/") && !is_head {
                answer.check_openai_error(404, "not_found");
            } else if !is_head {
                answer.check_error(404, "not_found");
            }
        }
    }
    for (method, path, allowed) in [
        ("GET", "/generate", "POST"),
        ("DELETE", "/generate", "POST"),
        ("TRACE", "/generate_stream", "POST"),
        ("PUT", "/", "GET,HEAD,POST"),
        ("POST", "/health", "GET,HEAD"),
        ("OPTIONS", "/metrics", "GET,HEAD"),
    ] {
        let answer = ask(server.address, head(method, path, &[("Connection", "close")]).as_bytes()).await;
        answer.check_error(405, "method_not_allowed");
        assert_eq!(answer.headers["allow"], allowed, "{method} {path}");
    }
}

#[tokio::test]
async fn what_is_no_json_is_400() {
    let server = start().await.answer_all(&["x"]);
    let deep = "[".repeat(100_000);
    let digits = format!(r#"{{"inputs":"a","parameters":{{"seed":0{}}}}}"#, "1".repeat(1_000_000));
    let cases: Vec<&[u8]> = vec![
        b"",
        b" ",
        br#"{"inputs":"hi""#,
        br#"{"inputs":"a"} x"#,
        b"\xEF\xBB\xBF{\"inputs\":\"a\"}",
        br#"{"inputs":"a",}"#,
        br#"{"inputs":'a'}"#,
        br#"["a",]"#,
        br#"{"a":1 "b":2}"#,
        b"{\"inputs\":\"\xFF\xFE\"}",
        b"{\"inputs\":\"\xED\xA0\x80\"}",
        b"{\"inputs\":\"a\nb\"}",
        br#"{"inputs":"\x41"}"#,
        br#"{"inputs":"\ud8"}"#,
        br#"{"inputs":"a","parameters":{"temperature":NaN}}"#,
        br#"{"inputs":"a","parameters":{"temperature":Infinity}}"#,
        br#"{"inputs":"a","parameters":{"temperature":0x10}}"#,
        br#"{"inputs":"a","parameters":{"temperature":01}}"#,
        br#"{"inputs":"a","parameters":{"temperature":.5}}"#,
        b"nul",
        deep.as_bytes(),
        digits.as_bytes(),
    ];
    for body in cases {
        for path in ["/generate", "/generate_stream", "/"] {
            let begun = Instant::now();
            let answer = ask(server.address, &post(path, body)).await;
            let error = answer.check_error(400, "validation");
            assert!(error.starts_with("the body is not valid JSON"), "{error}");
            assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        }
    }
}

#[tokio::test]
async fn json_that_asks_for_what_is_not_given_is_422_and_says_why() {
    let mut server = start().await.answer_all(&["x"]);
    let long = format!(r#"{{"inputs":"{}"}}"#, "a".repeat(1_900_000));
    let seed = format!(r#"{{"inputs":"a","parameters":{{"seed":{}}}}}"#, "1".repeat(100_000));
    let with = |parameters: &str| format!(r#"{{"inputs":"a b c","parameters":{{{parameters}}}}}"#);
    let stop = |text: &str| with(&format!(r#""stop":{text}"#));
    let long_stop = stop(&format!("[\"{}\"]", "é".repeat(257)));
    let cases: Vec<(String, &str)> = vec![
        (r#"["hi"]"#.into(), "object"),
        (r#""hi""#.into(), "object"),
        ("null".into(), "object"),
        ("{}".into(), "missing field `inputs`"),
        (r#"{"inputs":null}"#.into(), "missing field `inputs`"),
        (r#"{"inputs":""}"#.into(), "`inputs` cannot be empty"),
        (r#"{"inputs":5}"#.into(), "`inputs`: invalid type"),
        (r#"{"inputs":["a"]}"#.into(), "`inputs`: invalid type"),
        (r#"{"inputs":"\ud800"}"#.into(), "`inputs`"),
        (r#"{"inputs":"\udc00\ud800"}"#.into(), "`inputs`"),
        (r#"{"inputs":"a","inputs":"b"}"#.into(), "duplicate field `inputs`"),
        (r#"{"inputs":"a","parameters":[1,2]}"#.into(), "`parameters`: invalid type"),
        (r#"{"inputs":"a","parameters":"x"}"#.into(), "`parameters`: invalid type"),
        (with(r#""seed":1,"seed":2"#), "duplicate field `seed`"),
        (r#"{"inputs":"a","stream":"true"}"#.into(), "`stream`: invalid type"),
        (r#"{"inputs":"a","stream":1}"#.into(), "`stream`: invalid type"),
        (with(r#""temperature":-1"#), "`temperature` must be strictly positive"),
        (with(r#""temperature":0"#), "`temperature` must be strictly positive"),
        (with(r#""temperature":"0.5""#), "`parameters.temperature`: invalid type"),
        (with(r#""temperature":true"#), "`parameters.temperature`: invalid type"),
        (with(r#""temperature":1e39"#), "`temperature`"),
        (with(r#""temperature":1e400"#), "temperature`: number out of range"),
        (with(r#""top_p":0"#), "`top_p` must be > 0.0 and < 1.0"),
        (with(r#""top_p":-0.1"#), "`top_p`"),
        (with(r#""top_p":1.0"#), "`top_p`"),
        (with(r#""top_p":1.0000001"#), "`top_p`"),
        (with(r#""typical_p":1.0"#), "`typical_p` must be > 0.0 and < 1.0"),
        (with(r#""typical_p":0"#), "`typical_p`"),
        (with(r#""top_k":0"#), "`top_k` must be strictly positive"),
        (with(r#""top_k":-1"#), "`top_k`"),
        (with(r#""top_k":2147483648"#), "`top_k`"),
        (with(r#""top_n_tokens":6"#), "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        (with(r#""top_n_tokens":4294967295"#), "`top_n_tokens`"),
        (with(r#""repetition_penalty":0"#), "`repetition_penalty` must be strictly positive"),
        (with(r#""repetition_penalty":-1"#), "`repetition_penalty`"),
        (with(r#""repetition_penalty":1e39"#), "`repetition_penalty`"),
        (with(r#""frequency_penalty":2.0000001"#), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        (with(r#""frequency_penalty":-2.1"#), "`frequency_penalty`"),
        (with(r#""max_new_tokens":0"#), "`max_new_tokens` must be strictly positive"),
        (with(r#""max_new_tokens":-1"#), "`parameters.max_new_tokens`"),
        (with(r#""max_new_tokens":1.5"#), "`parameters.max_new_tokens`"),
        (with(r#""max_new_tokens":1e3"#), "`parameters.max_new_tokens`"),
        (with(r#""max_new_tokens":4294967296"#), "must be <= 64. Given: 4 `inputs` tokens and 4294967296"),
        (with(r#""max_new_tokens":4294967295"#), "must be <= 64"),
        (with(r#""max_new_tokens":18446744073709551615"#), "must be <= 64"),
        (with(r#""max_new_tokens":61"#), "must be <= 64. Given: 4 `inputs` tokens and 61 `max_new_tokens`"),
        (with(r#""best_of":0"#), "`best_of`"),
        (with(r#""best_of":3,"do_sample":true"#), "`best_of`"),
        (with(r#""best_of":2"#), "`best_of`"),
        (with(r#""best_of":2,"do_sample":true,"seed":1"#), "`best_of`"),
        (with(r#""best_of":1000000000"#), "`best_of`"),
        (stop(r#"["a","b","c","d","e"]"#), "`stop` supports up to 4 stop sequences. Given: 5"),
        (stop(r#"[""]"#), "`stop`"),
        (stop("[null]"), "`parameters.stop[0]`"),
        (stop(r#""str""#), "`parameters.stop`: invalid type"),
        (long_stop, "`stop` sequences must have at most 256 characters"),
        (with(r#""seed":-1"#), "`parameters.seed`"),
        (with(r#""seed":18446744073709551616"#), "`parameters.seed`"),
        (seed, "`parameters.seed`"),
        (with(r#""truncate":0"#), "`truncate` must be strictly positive and less than 63. Given: 0"),
        (with(r#""truncate":64"#), "`truncate`"),
        (with(r#""do_sample":1"#), "`parameters.do_sample`"),
        (with(r#""details":"yes""#), "`parameters.details`"),
        (with(r#""grammar":{"type":"regex","value":"("}"#), "`grammar`: regex: unclosed group"),
        (with(r#""grammar":{"type":"text"}"#), "`grammar`: `type` must be one of"),
        (with(r#""adapter_id":"../../../../etc/passwd""#), "`adapter_id`"),
        (long, "`inputs` must have less than 63 tokens. Given: at least"),
        (format!(r#"{{"inputs":"{}","parameters":{{"max_new_tokens":1}}}}"#, "a ".repeat(64)), "`inputs`"),
    ];
    for (body, expected) in cases {
        for path in ["/generate", "/generate_stream", "/"] {
            let shown: String = body.chars().take(100).collect();
            let begun = Instant::now();
            let error = ask(server.address, &post(path, &body)).await.check_error(422, "validation");
            assert!(error.starts_with("Input validation error: "), "{error}");
            assert!(error.contains(expected), "{shown}: {error}");
            assert!(begun.elapsed() < Duration::from_secs(2), "{shown}: {:?}", begun.elapsed());
        }
    }
    assert!(server.requests.try_recv().is_err(), "none of them got through");
    assert_eq!(server.engine.num_free_permits(), 4);
}

#[tokio::test]
async fn the_text_of_a_rejection_repeats_little_of_what_was_sent() {
    let server = start().await.answer_all(&["x"]);
    let body = format!(r#"{{"inputs":"a","parameters":{{"temperature":"{}"}}}}"#, "\\u0001".repeat(100_000));
    ask(server.address, &post("/generate", body)).await.check_error(422, "validation");
}

#[tokio::test]
async fn a_body_of_another_type_is_415() {
    let server = start().await.answer_all(&["x"]);
    for content_type in ["text/plain", "", "application/json; charset=utf-16", "application/jsonx", "x"] {
        let headers = [("Content-Type", content_type), ("Content-Length", "2"), ("Connection", "close")];
        let request = [head("POST", "/generate", &headers).as_bytes(), b"{}"].concat();
        ask(server.address, &request).await.check_error(415, "unsupported_media_type");
    }
    let none =
        [head("POST", "/generate", &[("Content-Length", "2"), ("Connection", "close")]).as_bytes(), b"{}"].concat();
    ask(server.address, &none).await.check_error(415, "unsupported_media_type");
    for content_type in ["application/json", "Application/JSON; charset=UTF-8", "application/x+json"] {
        let length = OK.len().to_string();
        let headers = [("Content-Type", content_type), ("Content-Length", &length), ("Connection", "close")];
        let answer =
            ask(server.address, &[head("POST", "/generate", &headers).as_bytes(), OK.as_bytes()].concat()).await;
        assert_eq!(answer.status, 200, "{content_type}");
    }
}

#[tokio::test]
async fn a_body_longer_than_the_limit_is_413_and_one_at_the_limit_is_read() {
    let server = serve(Config { payload_limit: 100_000, ..config() }, ready(), tokenizer()).await.answer_all(&["x"]);
    let body = |length: usize| {
        let padding = " ".repeat(length - OK.len());
        format!("{OK}{padding}")
    };
    assert_eq!(ask(server.address, &post("/generate", body(100_000))).await.status, 200);
    let answer = ask(server.address, &post("/generate", body(100_001))).await;
    answer.check_error(413, "payload_too_large");
    // Refused by its length alone, before a byte of it has come.
    let mut client = Client::connect(server.address).await;
    let headers = [("Content-Type", "application/json"), ("Content-Length", "100001")];
    client.send(head("POST", "/generate", &headers).as_bytes()).await;
    client.until("payload_too_large").await;
    // Without a stated length, once it is too long; many small chunks before.
    let mut client = Client::connect(server.address).await;
    let headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")];
    client.send(head("POST", "/generate", &headers).as_bytes()).await;
    client.send("1\r\n \r\n".repeat(65_537).as_bytes()).await;
    client.send(format!("{:x}\r\n{}\r\n", 60_000, " ".repeat(60_000)).as_bytes()).await;
    Answer::parse(&client.rest().await).check_error(413, "payload_too_large");
}

#[tokio::test]
async fn a_head_that_is_not_http_or_too_much_is_refused_as_json() {
    let mut server = start().await.answer_all(&["x"]);
    let smuggled = format!("\r\n{}", String::from_utf8(post("/generate", OK)).unwrap());
    let chunked = "5\r\nhello\r\n0\r\n\r\n";
    let lengths =
        |lines: &str| format!("POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{lines}\r\n");
    let cases: Vec<(String, u16, &str)> = vec![
        ("GARBAGE\r\n\r\n".into(), 400, "bad_request"),
        ("GET /health HTTP/9.9\r\n\r\n".into(), 400, "bad_request"),
        ("GET /health HTTP/1.1\r\nbad header\r\n\r\n".into(), 400, "bad_request"),
        (head("GET", "/health", &[("x", &"a".repeat(1_000_000))]), 431, "headers_too_large"),
        (head("GET", "/health", &vec![("x", "y"); 200]), 431, "headers_too_large"),
        (head("GET", &format!("/{}", "a".repeat(1_000_000)), &[]), 431, "headers_too_large"),
        (lengths("Content-Length: 4\r\nContent-Length: 5\r\n") + &smuggled, 400, "bad_request"),
        (lengths("Content-Length: +5\r\n") + &smuggled, 400, "bad_request"),
        (lengths("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n") + chunked + &smuggled, 400, "bad_request"),
        (lengths("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n") + chunked + &smuggled, 400, "bad_request"),
        (lengths("Transfer-Encoding: chunked\r\n") + "ffffffffffffffff1\r\n" + &smuggled, 400, "bad_request"),
    ];
    for (request, status, error_type) in cases {
        let answer = ask(server.address, request.as_bytes()).await;
        answer.check_error(status, error_type);
        assert_eq!(answer.headers["connection"], "close");
    }
    assert!(server.requests.try_recv().is_err(), "no smuggled request got through");
    assert_eq!(ask(server.address, &get("/health")).await.status, 200);
}

fn hurried() -> Config {
    let deadlines = Deadlines {
        head: Duration::from_millis(300),
        idle: Duration::from_millis(600),
        body: Duration::from_millis(300),
        write: Duration::from_millis(300),
        ..Deadlines::default()
    };
    Config { deadlines, ..config() }
}

#[tokio::test]
async fn a_head_that_comes_slowly_is_not_waited_for_and_one_that_was_begun_is_408() {
    let server = serve(hurried(), ready(), tokenizer()).await.answer_all(&["x"]);
    for begun in ["", "G", "GET /hea", "GET /health HTTP/1.1\r", "GET /health HTTP/1.1\r\n", "GET / HTTP/1.1\r\na: b"] {
        let mut client = Client::connect(server.address).await;
        client.send(begun.as_bytes()).await;
        let since = Instant::now();
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            client.send(if begun.is_empty() { b"" } else { b"x" }).await;
        }
        let rest = client.rest().await;
        assert!(since.elapsed() < Duration::from_secs(3));
        if begun.is_empty() {
            assert_eq!(String::from_utf8(rest).unwrap(), "", "nobody has asked anything");
        } else {
            let answer = Answer::parse(&rest);
            let text = answer.check_error(408, "request_timeout");
            assert_eq!(text, "the head of the request did not arrive within 0.3 s", "{begun:?}");
            assert_eq!(answer.headers["connection"], "close");
        }
    }
}

#[tokio::test]
async fn the_second_request_of_a_connection_is_408_too_after_the_first_was_answered() {
    let server = serve(hurried(), ready(), tokenizer()).await.answer_all(&["x"]);
    let mut client = Client::connect(server.address).await;
    client.send(head("GET", "/health", &[]).as_bytes()).await;
    client.until("\r\n\r\n").await;
    client.send(b"GET /health HT").await;
    Answer::parse(&client.rest().await).check_error(408, "request_timeout");
}

#[tokio::test]
async fn a_connection_is_kept_alive_between_requests_for_longer_than_a_head_may_take() {
    let server = serve(hurried(), ready(), tokenizer()).await.answer_all(&["x"]);
    let mut client = Client::connect(server.address).await;
    for _ in 0..3 {
        client.send(head("GET", "/health", &[]).as_bytes()).await;
        client.until("\r\n\r\n").await;
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert!(client.rest().await.is_empty(), "and not for ever");
}

#[tokio::test]
async fn a_body_that_comes_slowly_is_408_and_takes_no_permit() {
    let server = serve(hurried(), ready(), tokenizer()).await.answer_all(&["x"]);
    let mut client = Client::connect(server.address).await;
    let headers = [("Content-Type", "application/json"), ("Content-Length", "100")];
    client.send(head("POST", "/generate", &headers).as_bytes()).await;
    client.send(b"{").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.engine.num_free_permits(), 4);
    Answer::parse(&client.rest().await).check_error(408, "request_timeout");
}

#[tokio::test]
async fn http2_is_refused_cleanly() {
    let server = start().await.answer_all(&["x"]);
    let mut client = Client::connect(server.address).await;
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    client.rest().await;
    assert_eq!(ask(server.address, &get("/health")).await.status, 200);
}

#[tokio::test]
async fn browsers_are_told_which_origins_may_call() {
    let any = start().await.answer_all(&["x"]);
    let preflight = [("Origin", "http://a"), ("Access-Control-Request-Method", "POST"), ("Connection", "close")];
    let answer = ask(any.address, head("OPTIONS", "/generate", &preflight).as_bytes()).await;
    assert_eq!((answer.status, answer.headers["access-control-allow-origin"].as_str()), (200, "*"));
    assert_eq!(answer.headers["access-control-allow-methods"], "GET,POST");
    assert_eq!(answer.headers["access-control-allow-headers"], "content-type,authorization,x-request-id");
    let one = Config { cors_allow_origin: vec!["http://a".into()], ..config() };
    let one = serve(one, ready(), tokenizer()).await.answer_all(&["x"]);
    for (origin, is_allowed) in [("http://a", true), ("http://b", false)] {
        let headers = [("Origin", origin), ("Connection", "close")];
        let answer = ask(one.address, head("GET", "/health", &headers).as_bytes()).await;
        assert_eq!(answer.headers.get("access-control-allow-origin").map(String::as_str) == Some(origin), is_allowed);
    }
}

/// What is logged, as bytes.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Takes what this thread logs from now on. For all threads, as a place in the code that another one comes to first would
    /// else be taken for one whose events nobody wants.
    fn install(&self) {
        let (log, own) = (self.clone(), std::thread::current().id());
        let writer = move || -> Box<dyn Write> {
            if std::thread::current().id() == own { Box::new(log.clone()) } else { Box::new(std::io::sink()) }
        };
        let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_writer(writer).finish();
        tracing::subscriber::set_global_default(subscriber).unwrap();
    }

    /// The lines since the last call.
    fn take(&self) -> Vec<Value> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        let lines = String::from_utf8(bytes).unwrap();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A POST by a client that names and traces its requests.
fn traced(path: &str, body: &str) -> Vec<u8> {
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let names = format!("x-request-id: mine\r\ntraceparent: {trace}\r\nContent-Type");
    String::from_utf8(post(path, body)).unwrap().replacen("Content-Type", &names, 1).into_bytes()
}

#[tokio::test]
async fn every_request_leaves_one_line_in_the_log_by_which_it_is_found_again() {
    let log = Log::default();
    log.install();
    let mut server = start().await;

    let body = r#"{"inputs":"a","parameters":{"max_new_tokens":3,"temperature":0.5,"seed":7}}"#;
    let (address, request) = (server.address, traced("/generate", body));
    let asked = tokio::spawn(async move { ask(address, &request).await });
    answer(server.submission().await, outputs(&["x", "y", "z"], FinishReason::StopSequence)).await;
    assert_eq!(asked.await.unwrap().status, 200);
    let [line] = log.take().try_into().unwrap();
    for (name, value) in [
        ("level", json!("INFO")),
        ("message", json!("success")),
        ("id", json!("mine")),
        ("trace", json!("4bf92f3577b34da6a3ce929d0e0e4736")),
        ("parameters", json!("sampled temperature=0.5")),
        ("max_new_tokens", json!(3)),
        ("seed", json!(7)),
        ("generated_tokens", json!(3)),
        ("finish_reason", json!("stop_sequence")),
    ] {
        assert_eq!(line[name], value, "{name}: {line}");
    }
    for name in ["total_time", "validation_time", "queue_time", "inference_time", "time_per_token"] {
        assert!(line[name].is_string(), "{name}: {line}");
    }

    let nan = GenerateError::Row { kind: "numerical", message: "logits are not finite".into() };
    for path in ["/generate", "/generate_stream", "/"] {
        for (error, status, error_type, level) in [
            (Some(nan.clone()), 424, "numerical", "ERROR"),
            (Some(GenerateError::KilledShards), 424, "generation", "ERROR"),
            (Some(GenerateError::QueueTimeout { seconds: 1.0 }), 429, "overloaded", "WARN"),
            (None, 500, "incomplete_generation", "ERROR"),
        ] {
            let (address, request) = (server.address, traced(path, r#"{"inputs":"a"}"#));
            let asked = tokio::spawn(async move { ask(address, &request).await });
            let submission = server.submission().await;
            match error {
                Some(error) => fail(submission, error).await,
                None => drop(submission),
            }
            let answer = asked.await.unwrap();
            let [line] = log.take().try_into().unwrap();
            assert_eq!((&line["level"], &line["status"]), (&json!(level), &json!(status)), "{line}");
            assert_eq!((answer.status, &line["message"]), (status, &answer.json()["error"]), "{line}");
            assert!(line["error_type"].as_str().unwrap().starts_with(error_type), "{line}");
            assert_eq!((&line["id"], &line["trace"]), (&json!("mine"), &json!("4bf92f3577b34da6a3ce929d0e0e4736")));
        }
    }

    // After its first token a stream has answered 200; the log tells how it ended.
    let (address, request) = (server.address, traced("/generate_stream", r#"{"inputs":"a"}"#));
    let asked = tokio::spawn(async move { ask(address, &request).await });
    let submission = server.submission().await;
    submission.outputs.send(Ok(output(0, "x"))).await.unwrap();
    fail(submission, GenerateError::KilledShards).await;
    assert_eq!(asked.await.unwrap().status, 200);
    let [line] = log.take().try_into().unwrap();
    assert_eq!((&line["level"], &line["status"]), (&json!("ERROR"), &json!(424)), "{line}");

    // What clients do wrong; and without a name and a trace of theirs a request has a number.
    ask(server.address, &post("/generate", r#"{"inputs":""}"#)).await.check_error(422, "validation");
    let [line] = log.take().try_into().unwrap();
    assert_eq!(
        (&line["level"], &line["status"], &line["trace"]),
        (&json!("INFO"), &json!(422), &Value::Null),
        "{line}"
    );
    assert!(line["id"].as_str().unwrap().parse::<u64>().is_ok(), "{line}");
}
