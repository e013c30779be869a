//! The load generator against the null server, as a user runs them.

// Clippy counts helpers of integration tests as code; they are tests.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_text-generation-benchmark");

/// A null server that ends with this value.
struct NullServer {
    process: Child,
    address: String,
}

impl NullServer {
    fn start(options: &[&str]) -> Self {
        let mut process = Command::new(BINARY)
            .args(["null-server", "--exit-with-stdin", "--exit-after", "60"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Self { process, address }
    }
}

impl Drop for NullServer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

fn load(address: &str, options: &[&str]) -> (Output, Value) {
    let name = format!("load-{}-{:?}.json", std::process::id(), std::thread::current().id());
    let json: PathBuf = std::env::temp_dir().join(name);
    let output = Command::new(BINARY)
        .args(["load", "--address", address, "--timeout", "10", "--json"])
        .arg(&json)
        .args(options)
        .output()
        .unwrap();
    let report = std::fs::read(&json).map(|text| serde_json::from_slice(&text).unwrap()).unwrap_or_default();
    let _ = std::fs::remove_file(&json);
    (output, report)
}

#[test]
fn every_token_of_every_api_is_counted() {
    for options in [&["--flush-each"][..], &["--threads", "2"]] {
        let server = NullServer::start(options);
        for (api, events, first_tokens) in [("generate-stream", 400, 20), ("generate", 0, 0), ("openai", 400, 20)] {
            let common = ["--api", api, "--model", "m", "--requests", "20", "--streams", "3", "--max-new-tokens", "20"];
            let (output, report) = load(&server.address, &common);
            assert!(output.status.success(), "{output:?}");
            assert_eq!((&report["requests"], &report["tokens"]), (&20.into(), &400.into()), "{api}");
            assert_eq!((&report["events"], &report["failed"]), (&events.into(), &0.into()), "{api}");
            assert_eq!(report["time_to_first_token"]["count"], first_tokens, "{api}");
            assert_eq!(report["between_tokens"]["count"], events - first_tokens, "{api}");
            assert_eq!(report["end_to_end"]["count"], 20, "{api}");
        }
    }
}

#[test]
fn refusals_are_counted_by_kind_and_a_run_without_answers_fails() {
    let server = NullServer::start(&[]);
    let (output, report) = load(&server.address, &["--requests", "5", "--max-new-tokens", "100000"]);
    assert!(!output.status.success());
    assert_eq!(report["errors"]["status 422: validation"], 5);
    assert!(String::from_utf8(output.stdout).unwrap().contains("| status 422: validation | 5 |"));
}

#[test]
fn a_server_that_is_not_there_is_said_and_ends_the_run() {
    let (output, report) = load("127.0.0.1:9", &["--requests", "2"]);
    assert!(!output.status.success());
    assert_eq!(report["failed"], 2);
    assert!(report["errors"].to_string().contains("connecting"));
}

#[test]
fn the_time_bounds_a_run_that_the_number_of_requests_does_not() {
    let server = NullServer::start(&[]);
    let (output, report) = load(&server.address, &["--requests", "1000000000", "--duration", "1"]);
    assert!(output.status.success());
    assert!((0.9..15.0).contains(&report["seconds"].as_f64().unwrap()));
}
