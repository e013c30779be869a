//! Stands in for `text-generation-server` and `text-generation-router` in the launcher's tests, whichever name it is
//! called by. The variable FAKE lists what it does wrong; FAKE_DIR is where the router notes what it is told.

#![allow(clippy::unwrap_used)] // Part of the tests; a panic is seen there as a death of the child.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use text_generation_router::control::{ToLauncher, ToRouter};
use text_generation_router::shards::proto::health_reply::Phase;
use text_generation_router::shards::proto::shard_server::{Shard, ShardServer};
use text_generation_router::shards::proto::{
    DescribeRequest, Description, Grammar, HealthReply, HealthRequest, JoinReply, JoinRequest, PrepareReply, StepPlan,
    StepResult, WarmupReply, WarmupRequest,
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

fn fake(what: &str) -> bool {
    std::env::var("FAKE").unwrap_or_default().split(' ').any(|word| word == what)
}

fn flag(args: &[String], name: &str) -> String {
    let position = args.iter().position(|arg| arg == name).unwrap_or_else(|| panic!("{name} is missing in {args:?}"));
    args[position + 1].clone()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let is_router = Path::new(&args[0]).ends_with("text-generation-router");
    match args[1].as_str() {
        _ if is_router && args.iter().any(|arg| arg == "--check") => {
            if fake("router-refuses") {
                eprintln!("error: --chat-template none: cannot be read");
                std::process::exit(1);
            }
        }
        _ if is_router => router(&args).await,
        "download-weights" => {
            if fake("download-refuses") {
                eprintln!("Fetching 7 files: 0%\nerror: the cache has no room");
                std::process::exit(1);
            }
            if fake("download-hangs") {
                tokio::time::sleep(Duration::from_secs(100)).await;
            }
            println!("some progress\n{{\"model_dir\": \"{}\"}}", std::env::var("FAKE_DIR").unwrap());
        }
        "devices" if fake("no-gpu") => {
            eprintln!("error: --device cuda: the NVIDIA driver was not found; use --device cpu");
            std::process::exit(1);
        }
        "devices" => println!(r#"[{{"index": 0, "name": "Paper", "free_bytes": 64000, "has_bfloat16": true}}]"#),
        "plan" if fake("plan-refuses") => {
            eprintln!(
                "error: config.json: model_type is \"martian\"; expected one of llama, qwen2; choose another model"
            );
            std::process::exit(1);
        }
        "plan" => println!("{{\"model_dir\": \"{}\", \"weight_bytes_per_rank\": 10, \"max_positions\": 64}}", args[2]),
        "serve" => shard(&args).await,
        other => panic!("unknown command {other}"),
    }
}

/// Ends with its launcher, unless it is to be killed.
fn hold_lifeline() {
    std::thread::spawn(|| {
        while std::io::stdin().read(&mut [0]).is_ok_and(|count| count > 0) {}
        if !fake("deaf") {
            std::process::exit(0);
        }
    });
}

async fn on_signal(kind: SignalKind, mut act: impl FnMut()) {
    let mut stream = signal(kind).unwrap();
    while stream.recv().await.is_some() {
        act();
    }
}

#[derive(Clone)]
struct FakeShard {
    rank: u32,
    start: Instant,
}

async fn shard(args: &[String]) {
    let rank: u32 = flag(args, "--rank").parse().unwrap();
    if fake("shard-crashes") {
        println!("about to break");
        eprintln!("something broke");
        std::process::abort();
    }
    if fake("shard-refuses") {
        eprintln!("tensor model.embed_tokens.weight is missing in model.safetensors");
        std::process::exit(1);
    }
    hold_lifeline();
    tokio::spawn(on_signal(SignalKind::user_defined1(), move || {
        eprintln!("stack of rank {rank}: load() in loading.py")
    }));
    tokio::spawn(on_signal(SignalKind::terminate(), || {
        if !fake("deaf") {
            std::process::exit(0);
        }
    }));
    if fake("shard-floods") && rank == 0 {
        std::thread::spawn(flood);
    }
    let listener = UnixListener::bind(flag(args, "--uds-path")).unwrap();
    let service = ShardServer::new(FakeShard { rank, start: Instant::now() });
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await
        .unwrap();
}

/// 100 MB, one line of 10 MB among them, none of it UTF-8.
fn flood() {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(&vec![0xff; 10_000_000]);
    for _ in 0..90_000 {
        let mut line = vec![0xfe; 1000];
        line[999] = b'\n';
        let _ = stderr.write_all(&line);
    }
    std::fs::write(PathBuf::from(std::env::var("FAKE_DIR").unwrap()).join("flooded"), "").unwrap();
}

#[tonic::async_trait]
impl Shard for FakeShard {
    type RunStream = tokio_stream::Empty<Result<StepResult, Status>>;

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthReply>, Status> {
        let total = 13_600_000;
        let done = if fake("shard-stalls") {
            total * 45 / 100
        } else if fake("shard-loads-slowly") {
            (self.start.elapsed().as_millis() as u64 * 1000).min(total)
        } else {
            (self.start.elapsed().as_millis() as u64 * 100_000).min(total)
        };
        let phase = if done == total { Phase::Loaded } else { Phase::Loading };
        Ok(Response::new(HealthReply {
            phase: phase.into(),
            done,
            total,
            rank: self.rank,
            process_id: std::process::id(),
            ..HealthReply::default()
        }))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<Description>, Status> {
        Err(Status::unimplemented("fake"))
    }

    async fn join(&self, _: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        Err(Status::unimplemented("fake"))
    }

    async fn warmup(&self, _: Request<WarmupRequest>) -> Result<Response<WarmupReply>, Status> {
        Err(Status::unimplemented("fake"))
    }

    async fn prepare(&self, _: Request<Grammar>) -> Result<Response<PrepareReply>, Status> {
        Err(Status::unimplemented("fake"))
    }

    async fn run(&self, _: Request<tonic::Streaming<StepPlan>>) -> Result<Response<Self::RunStream>, Status> {
        Err(Status::unimplemented("fake"))
    }
}

/// Notes its process id and every message; serves nobody.
async fn router(args: &[String]) {
    if fake("router-is-hopeless") {
        eprintln!("error: tokenizer.json: is missing");
        std::process::exit(78);
    }
    if fake("router-crashes") {
        eprintln!("the router broke");
        std::process::exit(3);
    }
    hold_lifeline();
    tokio::spawn(on_signal(SignalKind::terminate(), || {
        if !fake("router-drains-for-ever") && !fake("deaf") {
            std::process::exit(0);
        }
    }));
    let address = format!("{}:{}", flag(args, "--hostname"), flag(args, "--port"));
    let _listener = TcpListener::bind(address).await.unwrap();
    let (reader, mut writer) = UnixStream::connect(flag(args, "--control-socket")).await.unwrap().into_split();
    let mut notes = OpenOptions::new()
        .create(true)
        .append(true)
        .open(PathBuf::from(std::env::var("FAKE_DIR").unwrap()).join("router.log"))
        .unwrap();
    writeln!(notes, "{{\"type\": \"router\", \"process_id\": {}}}", std::process::id()).unwrap();
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let message: ToRouter = serde_json::from_str(&line).unwrap();
        if message == ToRouter::Ping {
            say(&mut writer, ToLauncher::Pong).await;
            continue;
        }
        writeln!(notes, "{line}").unwrap();
        let ToRouter::Generation { number, .. } = message else { continue };
        let mut answers = vec![ToLauncher::Serving { number, epoch: number, num_blocks: 7 }];
        if fake("router-steps") {
            answers.push(ToLauncher::Stepped { number });
        }
        if fake("router-cannot-serve") {
            answers = vec![ToLauncher::CannotServe { reason: "no block fits into the memory".into() }];
        }
        for answer in answers {
            say(&mut writer, answer).await;
        }
    }
    std::future::pending::<()>().await;
}

async fn say(writer: &mut OwnedWriteHalf, message: ToLauncher) {
    let line = format!("{}\n", serde_json::to_string(&message).unwrap());
    writer.write_all(line.as_bytes()).await.unwrap();
}
