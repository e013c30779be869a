//! What clients of every kind see: of HTTP/1.0, that accept one thing or another, that keep their connection.

#![allow(clippy::unwrap_used)]

mod http_common;

use http_common::*;
use serde_json::json;

/// As a client of HTTP/1.0 asks; `wishes`: its header `Connection`, if any.
fn old_post(path: &str, wishes: &str) -> String {
    let headers = "Content-Type: application/json\r\nContent-Length: 14";
    format!("POST {path} HTTP/1.0\r\n{wishes}{headers}\r\n\r\n{{\"inputs\":\"a\"}}")
}

#[tokio::test]
async fn http_1_0_clients_get_a_stream_that_ends_with_the_connection() {
    let server = start().await.answer_all(&["x", "y"]);
    for wishes in ["", "Connection: keep-alive\r\n"] {
        let answer = ask(server.address, old_post("/generate_stream", wishes).as_bytes()).await;
        assert!(!answer.headers.contains_key("transfer-encoding"));
        assert!(answer.headers.get("connection").is_none_or(|value| value == "close"), "{:?}", answer.headers);
        assert_eq!(answer.events().len(), 2);
    }
}

#[tokio::test]
async fn http_1_0_clients_get_whole_answers_and_keep_their_connection_if_they_ask_to() {
    let server = start().await.answer_all(&["x"]);
    let answer = ask(server.address, old_post("/generate", "").as_bytes()).await;
    assert_eq!(answer.json(), json!({"generated_text": "x"}));
    assert_eq!(answer.headers["content-length"], answer.body.len().to_string());
    let mut client = Client::connect(server.address).await;
    for _ in 0..2 {
        client.send(old_post("/generate", "Connection: keep-alive\r\n").as_bytes()).await;
        let answer = client.until(r#"{"generated_text":"x"}"#).await;
        assert!(answer.contains("connection: keep-alive"), "{answer}");
    }
    let refused = ask(server.address, b"GET /nowhere HTTP/1.0\r\n\r\n").await;
    refused.check_error(404, "not_found");
}

#[tokio::test]
async fn what_a_client_accepts_changes_no_answer_but_that_of_the_page() {
    let server = start().await.answer_all(&["x"]);
    for accept in ["application/json", "text/event-stream", "text/html", "image/png", "*/*;q=0", "nonsense"] {
        let with = |path: &str| {
            let headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", "14"),
                ("Connection", "close"),
                ("Accept", accept),
            ];
            head("POST", path, &headers) + r#"{"inputs":"a"}"#
        };
        for (path, kind) in [("/generate", "application/json"), ("/generate_stream", "text/event-stream")] {
            let answer = ask(server.address, with(path).as_bytes()).await;
            assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, kind), "{path} {accept}");
        }
        let page = head("GET", "/", &[("Connection", "close"), ("Accept", accept)]);
        let answer = ask(server.address, page.as_bytes()).await;
        assert_eq!((answer.status, answer.body.is_empty()), (200, accept != "text/html"), "{accept}");
    }
}

#[tokio::test]
async fn connections_are_kept_alive_for_further_requests() {
    let server = start().await.answer_all(&["x"]);
    let mut client = Client::connect(server.address).await;
    let headers = [("Content-Type", "application/json"), ("Content-Length", "14")];
    for _ in 0..3 {
        client.send((head("POST", "/generate", &headers) + r#"{"inputs":"a"}"#).as_bytes()).await;
        client.until(r#"{"generated_text":"x"}"#).await;
    }
    client.send((head("POST", "/generate", &headers) + r#"{"inputs":4  }"#).as_bytes()).await;
    client.until("\"error_type\":\"validation\"").await;
    client.send((head("POST", "/generate_stream", &headers) + r#"{"inputs":"a"}"#).as_bytes()).await;
    client.until("0\r\n\r\n").await;
}
