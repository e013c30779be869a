//! Raw sockets against the HTTP server: what a client that does not keep to the rules sees.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use text_generation_router::engine::{Engine, FinishReason, Finished, ModelFacts, Output, Status, Submission, Token};
use text_generation_router::http::{Config, Deadlines, serve};
use text_generation_router::text::tokenizer::Tokenizer;
use tokio::sync::{mpsc, watch};

struct Rig {
    address: SocketAddr,
    submitted: Arc<AtomicUsize>,
    aborted: Arc<AtomicUsize>,
    status: watch::Sender<Status>,
    _stop: tokio::sync::oneshot::Sender<()>,
    _runtime: tokio::runtime::Runtime,
}

fn status() -> Status {
    let model = ModelFacts {
        model_type: "llama".into(),
        dtype: "float32".into(),
        device: "cpu".into(),
        vocab_size: 4096,
        eos_token_ids: vec![2],
        max_input_tokens: 2047,
        max_total_tokens: 2048,
        num_blocks: 128,
        block_size: 16,
        world_size: 1,
    };
    Status { is_ready: true, was_ready: true, model: Some(Arc::new(model)), ..Status::default() }
}

/// Answers with one token per 20 ms, `max_new_tokens` of them.
async fn answer(submission: Submission, aborted: Arc<AtomicUsize>) {
    let most = submission.request.max_new_tokens;
    for n in 1..=most {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let token = Token { id: 300, text: "x".into(), logprob: -0.5, special: false, top: vec![] };
        let finished = (n == most).then(|| Finished {
            reason: FinishReason::Length,
            text: "x".repeat(most),
            num_tokens: most as u32,
        });
        let started = Some(Instant::now());
        if submission.outputs.send(Ok(Output { token, finished, started, prompt: None })).await.is_err() {
            aborted.fetch_add(1, Ordering::SeqCst);
            return;
        }
    }
}

fn rig() -> Rig {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (submissions, mut waiting) = mpsc::channel::<Submission>(64);
    let (sender, receiver) = watch::channel(status());
    let engine = Engine::new(submissions, 8, receiver);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
    let deadlines = Deadlines { head: Duration::from_secs(1), body: Duration::from_secs(1), ..Deadlines::default() };
    let config = Config { max_concurrent_requests: 8, validation_workers: 1, deadlines, ..Config::of("m") };
    let (submitted, aborted) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (count, aborts) = (Arc::clone(&submitted), Arc::clone(&aborted));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let address = runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Some(submission) = waiting.recv().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(answer(submission, Arc::clone(&aborts)));
            }
        });
        let tokenizer = Arc::new(Tokenizer::from_file(&file).unwrap());
        tokio::spawn(serve(listener, config, engine, tokenizer, async move { drop(stopped.await) }));
        address
    });
    Rig { address, submitted, aborted, status: sender, _stop: stop, _runtime: runtime }
}

impl Rig {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
        stream
    }

    /// Sends, reads to the end, returns what came (also if the connection was reset after it).
    fn exchange(&self, request: &[u8]) -> String {
        let mut stream = self.connect();
        let sent = stream.write_all(request);
        let mut answer = vec![];
        let read = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(!text.is_empty(), "no answer; sent: {sent:?}, read: {read:?}");
        text
    }
}

fn post(body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn assert_refused(answer: &str, status: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer:.400}");
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let json: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer:.400}"));
    assert!(json["error"].is_string() && json["error_type"].is_string() && body.len() < 2048);
}

#[test]
fn heads_that_hyper_refuses_get_json_and_the_client_can_read_it() {
    let rig = rig();
    let long = format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(1_000_000));
    assert_refused(&rig.exchange(long.as_bytes()), "431");
    let many: String = (0..10_000).map(|n| format!("x{n}: 1\r\n")).collect();
    assert_refused(&rig.exchange(format!("GET /health HTTP/1.1\r\n{many}\r\n").as_bytes()), "431");
    let uri = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(1_000_000));
    assert_refused(&rig.exchange(uri.as_bytes()), "4");
    assert_refused(&rig.exchange(b"NONSENSE\r\n\r\n"), "400");
}

#[test]
fn contradicting_lengths_are_refused_and_nothing_smuggled_is_run() {
    let rig = rig();
    let inner = r#"{"inputs":"a","parameters":{"max_new_tokens":1}}"#;
    let smuggled = String::from_utf8(post(inner)).unwrap();
    let heads = [
        format!("transfer-encoding: chunked\r\ncontent-length: {}\r\n", inner.len()),
        format!("content-length: {}\r\ntransfer-encoding: chunked\r\n", inner.len()),
        "content-length: 5\r\ncontent-length: 6\r\n".into(),
        "content-length: +5\r\n".into(),
    ];
    for head in heads {
        let request = format!(
            "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{head}\r\n0\r\n\r\n{smuggled}"
        );
        let answer = rig.exchange(request.as_bytes());
        assert_refused(&answer, "400");
    }
    let request = "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
                   transfer-encoding: chunked\r\n\r\nffffffffffffffff1\r\nabc\r\n";
    assert_refused(&rig.exchange(request.as_bytes()), "400");
    assert_eq!(rig.submitted.load(Ordering::SeqCst), 0);
}

#[test]
fn a_body_too_large_is_refused_legibly_while_it_is_still_being_sent() {
    let rig = rig();
    let body = format!(r#"{{"inputs":"{}"}}"#, "a".repeat(2_100_000));
    for _ in 0..5 {
        assert_refused(&rig.exchange(&post(&body)), "413");
    }
    let mut chunked =
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..40 {
        chunked.extend_from_slice(format!("10000\r\n{}\r\n", "a".repeat(0x10000)).as_bytes());
    }
    assert_refused(&rig.exchange(&chunked), "413");
}

#[test]
fn a_client_that_reads_its_refusal_first_may_send_its_body_to_the_end_and_is_not_reset() {
    let rig = rig();
    let mut stream = rig.connect();
    let head =
        "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 3000000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 1024];
    let count = stream.read(&mut answer).unwrap();
    assert_refused(&String::from_utf8_lossy(&answer[..count]), "413");
    for _ in 0..30 {
        stream.write_all(&[b'a'; 100_000]).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut answer).unwrap(), 0, "an orderly end");
}

#[test]
fn slow_heads_and_slow_bodies_are_cut_off_but_slow_answers_are_not() {
    let rig = rig();
    let started = Instant::now();
    let mut slow = rig.connect();
    let mut byte = [0; 1024];
    slow.write_all(b"POST /generate HTTP/1.1\r\n").unwrap();
    let count = slow.read(&mut byte).unwrap();
    assert!(started.elapsed() < Duration::from_secs(3));
    assert_refused(&String::from_utf8_lossy(&byte[..count]), "408");
    let body = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{";
    assert_refused(&rig.exchange(body), "408");
    let long = post(r#"{"inputs":"a","parameters":{"max_new_tokens":120}}"#);
    assert!(rig.exchange(&long).starts_with("HTTP/1.1 200"), "an answer of 2.4 s");
}

#[test]
fn a_client_that_goes_away_aborts_its_sequence_streaming_or_not() {
    let rig = rig();
    for path in ["/generate", "/generate_stream", "/"] {
        let before = rig.aborted.load(Ordering::SeqCst);
        let body = r#"{"inputs":"a","parameters":{"max_new_tokens":2000}}"#;
        let request = String::from_utf8(post(body)).unwrap().replacen("/generate", path, 1);
        let mut stream = rig.connect();
        stream.write_all(request.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        drop(stream);
        let deadline = Instant::now() + Duration::from_secs(2);
        while rig.aborted.load(Ordering::SeqCst) == before {
            assert!(Instant::now() < deadline, "{path}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn odd_methods_and_paths_are_refused_in_json() {
    let rig = rig();
    let cases = [
        ("TRACE /generate", "405"),
        ("DELETE /generate", "405"),
        ("GET /generate", "405"),
        ("PUT /health", "405"),
        ("GET //generate", "404"),
        ("POST /generate%00", "404"),
        ("GET /..%2fgenerate", "404"),
        ("CONNECT example.com:443", "4"),
        ("OPTIONS *", "4"),
    ];
    for (line, status) in cases {
        let answer = rig.exchange(format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes());
        assert_refused(&answer, status);
        if status == "405" {
            assert!(answer.to_lowercase().contains("\r\nallow: "), "{answer}");
        }
    }
}

#[test]
fn two_requests_in_one_packet_are_both_answered_and_a_kept_connection_serves_again() {
    let rig = rig();
    let body = r#"{"inputs":"a","parameters":{"max_new_tokens":2}}"#;
    let kept = String::from_utf8(post(body)).unwrap().replace("connection: close\r\n", "");
    let both = [kept.as_bytes(), &post(body)].concat();
    let answer = rig.exchange(&both);
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 2, "{answer}");
    let mut stream = rig.connect();
    for _ in 0..2 {
        stream.write_all(kept.as_bytes()).unwrap();
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).unwrap();
        assert!(buffer[..count].starts_with(b"HTTP/1.1 200"));
        std::thread::sleep(Duration::from_millis(1500)); // longer than the head may take
    }
}

#[test]
fn expect_100_continue_is_answered_before_the_body() {
    let rig = rig();
    let mut stream = rig.connect();
    let body = r#"{"inputs":"a","parameters":{"max_new_tokens":2}}"#;
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut buffer = [0; 1024];
    let count = stream.read(&mut buffer).unwrap();
    assert!(buffer[..count].starts_with(b"HTTP/1.1 100"));
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn draining_refuses_new_requests_and_closes_while_a_running_stream_ends() {
    let rig = rig();
    let mut stream = rig.connect();
    let body = r#"{"inputs":"a","parameters":{"max_new_tokens":50}}"#;
    let request = String::from_utf8(post(body)).unwrap().replacen("/generate", "/generate_stream", 1);
    stream.write_all(request.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    rig.status.send_modify(|status| {
        status.is_draining = true;
        status.is_ready = false;
    });
    let answer = rig.exchange(&post(body));
    assert_refused(&answer, "503");
    assert!(answer.to_lowercase().contains("connection: close"));
    let mut whole = String::new();
    stream.read_to_string(&mut whole).unwrap();
    assert_eq!(whole.matches("data: ").count(), 50, "{whole}");
    stream.shutdown(Shutdown::Both).ok();
}

#[test]
fn json_that_is_deeper_than_serde_reads_is_422_whatever_field_it_is_in_and_400_where_it_is_no_json() {
    let rig = rig();
    for levels in [200, 5000, 100_000] {
        let deep = format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        for body in [deep.clone(), format!(r#"{{"inputs":"a","unknown":{deep}}}"#), format!(r#"{{"inputs":{deep}}}"#)] {
            let answer = rig.exchange(&post(&body));
            assert_refused(&answer, "422");
            assert!(answer.contains("nested deeper than 127 levels"), "{answer}");
            assert_refused(&rig.exchange(&post(&body[..body.len() - 2])), "400");
        }
    }
}

#[test]
fn duplicates_numbers_out_of_range_and_half_surrogates_are_refused() {
    let rig = rig();
    let cases = [
        (r#"{"inputs":"a","inputs":"b"}"#.to_owned(), "422"),
        (r#"{"inputs":"a","parameters":{"seed":1,"seed":1}}"#.into(), "422"),
        (r#"{"inputs":"a","parameters":{"temperature":1e400}}"#.into(), "422"),
        (format!(r#"{{"inputs":"a","parameters":{{"seed":{}}}}}"#, "9".repeat(1_000_000)), "422"),
        (r#"{"inputs":"\ud800"}"#.into(), "4"),
        (r#"{"inputs":"\udc00\ud800"}"#.into(), "4"),
    ];
    for (body, status) in cases {
        assert_refused(&rig.exchange(&post(&body)), status);
    }
}
