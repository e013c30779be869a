//! What the HTTP tests share: a server on loopback in front of a scripted engine, and a client that sees every byte.

#![allow(clippy::unwrap_used, dead_code)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use text_generation_router::chat::template::{ChatTemplate, Source};
use text_generation_router::engine::{
    Engine, FinishReason, Finished, GenerateError, ModelFacts, Output, Status, Submission, Token, TopToken,
};
use text_generation_router::http::{self, Config};
use text_generation_router::text::tokenizer::{Encode, Tokenizer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// No single wait of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The tokenizer of a shipped model.
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
    Arc::clone(TOKENIZER.get_or_init(|| Arc::new(Tokenizer::from_file(&file).unwrap())))
}

/// A model of 64 positions.
pub fn ready() -> Status {
    let model = ModelFacts {
        model_type: "llama".into(),
        dtype: "float32".into(),
        device: "cpu".into(),
        vocab_size: 4096,
        eos_token_ids: vec![2],
        max_input_tokens: 63,
        max_total_tokens: 64,
        num_blocks: 100,
        block_size: 16,
        world_size: 2,
    };
    let detail = "serving".into();
    Status {
        is_ready: true,
        was_ready: true,
        detail,
        epoch: 1,
        generation: 1,
        model: Some(model.into()),
        ..Status::default()
    }
}

/// Messages between marks.
pub const CHATML: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}\
                          {% if add_generation_prompt %}<|assistant|>{% endif %}";

pub fn template(text: &str) -> ChatTemplate {
    let source = Source { name: "default".into(), text: text.into(), file: "chat_template.jinja".into() };
    ChatTemplate::new(vec![source], serde_json::Map::new()).unwrap()
}

pub fn config() -> Config {
    Config { max_concurrent_requests: 4, template: template(CHATML), ..Config::of("docs") }
}

/// A server whose engine is the test.
pub struct Server {
    pub address: SocketAddr,
    pub engine: Engine,
    pub status: watch::Sender<Status>,
    pub submissions: mpsc::Receiver<Submission>,
    pub shutdown: oneshot::Sender<()>,
    pub served: JoinHandle<std::io::Result<()>>,
}

pub async fn serve(config: Config, status: Status, encoder: Arc<dyn Encode>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, submissions) = mpsc::channel(16);
    let (status, seen) = watch::channel(status);
    let engine = Engine::new(sender, config.max_concurrent_requests, seen);
    let (shutdown, is_shut_down) = oneshot::channel::<()>();
    let until = async move {
        let _ = is_shut_down.await;
    };
    let served = tokio::spawn(http::serve(listener, config, engine.clone(), encoder, until));
    Server { address, engine, status, submissions, shutdown, served }
}

/// A server with usual settings.
pub async fn start() -> Server {
    serve(config(), ready(), tokenizer()).await
}

impl Server {
    /// The next request that gets through.
    pub async fn submission(&mut self) -> Submission {
        tokio::time::timeout(PATIENCE, self.submissions.recv()).await.expect("a request in time").unwrap()
    }

    /// From now on every request is answered with these texts.
    pub fn answer_all(self, texts: &'static [&'static str]) -> Answering {
        let Self { address, engine, status, mut submissions, shutdown, served } = self;
        let (seen, requests) = mpsc::channel(64);
        tokio::spawn(async move {
            while let Some(submission) = submissions.recv().await {
                let _ = seen.try_send(submission.request.clone());
                for output in outputs(texts, FinishReason::EosToken) {
                    let _ = submission.outputs.send(Ok(output)).await;
                }
            }
        });
        Answering { address, engine, status, requests, shutdown, served }
    }
}

/// A server that answers.
pub struct Answering {
    pub address: SocketAddr,
    pub engine: Engine,
    pub status: watch::Sender<Status>,
    pub requests: mpsc::Receiver<text_generation_router::request::ValidRequest>,
    pub shutdown: oneshot::Sender<()>,
    pub served: JoinHandle<std::io::Result<()>>,
}

pub fn output(n: u32, text: &str) -> Output {
    let top = vec![TopToken { id: 500 + n, text: "!".into(), logprob: -1.5, special: false }];
    let token = Token { id: 300 + n, text: text.into(), logprob: -0.5, special: false, top };
    Output { token, finished: None, started: Some(Instant::now()), prompt: None }
}

/// Tokens with these texts, the last of which ends the stream.
pub fn outputs(texts: &[&str], reason: FinishReason) -> Vec<Output> {
    let mut outputs: Vec<_> = (0..).zip(texts).map(|(n, text)| output(n, text)).collect();
    let finished = Finished { reason, text: texts.concat(), num_tokens: texts.len() as u32 };
    outputs.last_mut().unwrap().finished = Some(finished);
    outputs
}

/// Answers a request.
pub async fn answer(submission: Submission, outputs: Vec<Output>) {
    for output in outputs {
        submission.outputs.send(Ok(output)).await.unwrap();
    }
}

pub async fn fail(submission: Submission, error: GenerateError) {
    submission.outputs.send(Err(error)).await.unwrap();
}

/// An answer as it came over the wire.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: HashMap<String, String> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let is_chunked = headers.get("transfer-encoding").is_some_and(|value| value == "chunked");
        let body = if is_chunked { dechunked(body) } else { body.to_owned() };
        Self { status, headers, body }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The JSON of each event.
    pub fn events(&self) -> Vec<Value> {
        let events = self.body.split_terminator("\n\n").filter(|event| *event != ":");
        events.map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    /// Checks what holds for every rejection; its kind.
    #[track_caller]
    pub fn check_error(&self, status: u16, error_type: &str) -> String {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.headers["content-type"], "application/json", "{self:?}");
        assert!(self.body.len() <= 2048, "{} bytes", self.body.len());
        let json = self.json();
        assert_eq!(json["error_type"], error_type, "{json}");
        assert_eq!(json.as_object().unwrap().len(), 2, "{json}");
        json["error"].as_str().unwrap().to_owned()
    }
}

impl Answer {
    /// Checks what holds for every rejection by the `OpenAI` routes; the error.
    #[track_caller]
    pub fn check_openai_error(&self, status: u16, error_type: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.headers["content-type"], "application/json", "{self:?}");
        assert!(self.body.len() <= 2048, "{} bytes", self.body.len());
        let json = self.json();
        assert_eq!(json["error_type"], error_type, "{json}");
        let keys: Vec<_> = json["error"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "{json}");
        json["error"].clone()
    }
}

/// The body that chunks carry, as far as they have come.
pub fn dechunked(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 || after.len() < size + 2 {
            break;
        }
        body.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    body
}

pub fn head(method: &str, path: &str, headers: &[(&str, &str)]) -> String {
    let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("{method} {path} HTTP/1.1\r\nHost: test\r\n{lines}\r\n")
}

/// A POST of JSON, the last of its connection.
pub fn post(path: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = body.len().to_string();
    let headers = [("Content-Type", "application/json"), ("Content-Length", &length), ("Connection", "close")];
    [head("POST", path, &headers).as_bytes(), body].concat()
}

pub fn get(path: &str) -> Vec<u8> {
    head("GET", path, &[("Connection", "close")]).into_bytes()
}

/// A connection of the client.
pub struct Client(pub TcpStream);

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // The server may have refused already and stopped to read.
        let _ = tokio::time::timeout(PATIENCE, self.0.write_all(bytes)).await.expect("sent in time");
    }

    /// All that comes until the server closes.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = vec![];
        let read = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut bytes)).await;
        let _ = read.expect("the server closes in time");
        bytes
    }

    /// What comes until it holds `end`.
    pub async fn until(&mut self, end: &str) -> String {
        let mut bytes = vec![];
        while !String::from_utf8_lossy(&bytes).contains(end) {
            let read = tokio::time::timeout(PATIENCE, self.0.read_buf(&mut bytes)).await;
            assert_ne!(read.expect("more in time").unwrap(), 0, "closed: {:?}", String::from_utf8_lossy(&bytes));
        }
        String::from_utf8(bytes).unwrap()
    }
}

/// One request on its own connection.
pub async fn ask(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut client = Client::connect(address).await;
    client.send(bytes).await;
    Answer::parse(&client.rest().await)
}
