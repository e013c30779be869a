//! The closed-loop load generator: each stream sends its next request when it has its last answer.
//!
//! Streams are divided over threads, each with a runtime, connections and counters of its own, so that nothing is shared
//! while it measures. Both the number of requests and the time are bounded. Answers are read event by event without
//! being parsed, but for the last one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value};

use crate::api::{self, Api, Event};
use crate::histogram::Histogram;
use crate::prompts;
use crate::report::Report;
use crate::sse::EventReader;

/// How long a stream waits after a failure, so that a server that is down is not asked in a tight loop.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// Sends requests and measures the answers.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadArgs {
    /// Address of the server, as host:port.
    #[arg(long, default_value = "127.0.0.1:3000")]
    pub address: String,
    /// What to ask for, and how.
    #[arg(long, value_enum, default_value = "generate-stream")]
    pub api: Api,
    /// Name of the model, for `--api openai`.
    #[arg(long)]
    pub model: Option<String>,
    /// Requests in flight at any time.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub streams: u32,
    /// Requests to send at most; the run ends when they are answered.
    #[arg(long, default_value_t = 256)]
    pub requests: u64,
    /// Seconds after which no further request is sent; those in flight are finished.
    #[arg(long, default_value_t = 60.0)]
    pub duration: f64,
    /// Requests sent beforehand and not counted.
    #[arg(long, default_value_t = 0)]
    pub warmup: u64,
    /// Seconds that a request may take before it counts as an error.
    #[arg(long, default_value_t = 60.0)]
    pub timeout: f64,
    /// Tokens to generate for each request.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Prompts, one for each line (plain, or a JSON string); used in turn. Without it, random words.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["words", "num_prompts", "seed"])]
    pub prompts: Option<PathBuf>,
    /// Words of a random prompt.
    #[arg(long, default_value_t = 16)]
    pub words: usize,
    /// Different random prompts, used in turn.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub num_prompts: u64,
    /// Of the random prompts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Asks the server to go on after an end-of-sequence token (`ignore_eos_token` of the native API). A server that
    /// does not know it answers shorter; the report counts such answers.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Further options of each request, as a JSON object, such as '{"do_sample":true,"seed":1}'.
    #[arg(long, value_name = "JSON", value_parser = parse_options)]
    pub parameters: Option<Map<String, Value>>,
    /// Threads that send and receive.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Writes the report to this file too, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

fn parse_options(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

/// What one thread has seen; all times in nanoseconds.
#[derive(Debug, Default)]
pub struct Recorder {
    /// From sending a request to the first event with text.
    pub first_token: Histogram,
    /// Between two events with text; zero if both arrived in one read.
    pub between_tokens: Histogram,
    /// From sending a request to the end of its answer.
    pub end_to_end: Histogram,
    /// Requests answered completely.
    pub requests: u64,
    /// Tokens, as the server counts them.
    pub tokens: u64,
    /// Events with text, of complete answers and of others.
    pub events: u64,
    /// Complete answers with fewer tokens than asked for.
    pub short_answers: u64,
    /// Requests that failed, by kind.
    pub errors: BTreeMap<String, u64>,
}

impl Recorder {
    fn merge(&mut self, other: &Self) {
        self.first_token.merge(&other.first_token);
        self.between_tokens.merge(&other.between_tokens);
        self.end_to_end.merge(&other.end_to_end);
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.events += other.events;
        self.short_answers += other.short_answers;
        for (kind, count) in &other.errors {
            *self.errors.entry(kind.clone()).or_default() += count;
        }
    }
}

/// What all streams share; nothing of it changes but the number of the next request.
struct Plan {
    address: SocketAddr,
    host: String,
    api: Api,
    bodies: Vec<Bytes>,
    max_new_tokens: u32,
    timeout: Duration,
    requests: u64,
    until: Instant,
    next: AtomicU64,
}

impl Plan {
    fn next_body(&self) -> Option<Bytes> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.requests && Instant::now() < self.until)
            .then(|| self.bodies[(number % self.bodies.len() as u64) as usize].clone())
    }
}

/// Runs the load to its end. Blocks; starts threads of its own.
pub fn run(args: &LoadArgs) -> anyhow::Result<Report> {
    anyhow::ensure!(
        args.api != Api::Openai || args.model.is_some(),
        "--api openai: found no --model, expected the name that the server gives its model"
    );
    anyhow::ensure!(
        !args.ignore_eos || args.api != Api::Openai,
        "--ignore-eos: the OpenAI API has no such option; use a copy of the model without end tokens"
    );
    let bodies = bodies(args)?;
    if args.warmup > 0 {
        measure(args, bodies.clone(), args.warmup)?;
    }
    let (recorder, seconds) = measure(args, bodies, args.requests)?;
    Ok(Report::new(args, &recorder, seconds))
}

fn bodies(args: &LoadArgs) -> anyhow::Result<Vec<Bytes>> {
    let prompts = match &args.prompts {
        Some(path) => prompts::from_file(path)?,
        None => prompts::random(args.num_prompts.min(args.requests.max(1)) as usize, args.words, args.seed),
    };
    let mut options = args.parameters.clone().unwrap_or_default();
    if args.ignore_eos {
        options.insert("ignore_eos_token".into(), Value::Bool(true));
    }
    let body = |prompt: &String| args.api.body(prompt, args.max_new_tokens, args.model.as_deref(), &options);
    Ok(prompts.iter().map(body).collect())
}

fn measure(args: &LoadArgs, bodies: Vec<Bytes>, requests: u64) -> anyhow::Result<(Recorder, f64)> {
    let address = std::net::ToSocketAddrs::to_socket_addrs(args.address.as_str())
        .with_context(|| format!("--address {}: expected host:port", args.address))?
        .next()
        .with_context(|| format!("--address {}: the name has no address", args.address))?;
    let start = Instant::now();
    let plan = Arc::new(Plan {
        address,
        host: args.address.clone(),
        api: args.api,
        bodies,
        max_new_tokens: args.max_new_tokens,
        timeout: Duration::from_secs_f64(args.timeout),
        requests,
        until: start + Duration::from_secs_f64(args.duration),
        next: AtomicU64::new(0),
    });
    let threads = args.threads.min(args.streams);
    let handles: Vec<_> = (0..threads)
        .map(|thread| {
            let plan = Arc::clone(&plan);
            let streams = args.streams / threads + u32::from(thread < args.streams % threads);
            std::thread::spawn(move || run_thread(plan, streams))
        })
        .collect();
    let mut total = Recorder::default();
    let mut last = start;
    for handle in handles {
        let (recorder, end) =
            handle.join().map_err(|_| anyhow::anyhow!("a thread of the load generator panicked"))??;
        total.merge(&recorder);
        last = last.max(end);
    }
    Ok((total, (last - start).as_secs_f64()))
}

/// The counters of `streams` streams, and when the last of them ended.
fn run_thread(plan: Arc<Plan>, streams: u32) -> anyhow::Result<(Recorder, Instant)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let recorder = Rc::new(RefCell::new(Recorder::default()));
    let local = tokio::task::LocalSet::new();
    let stream = || Stream { plan: Arc::clone(&plan), recorder: Rc::clone(&recorder), reader: EventReader::default() };
    let tasks: Vec<_> = (0..streams).map(|_| local.spawn_local(stream().run())).collect();
    // Connections are tasks of the set too; they end with it.
    let end = local.block_on(&runtime, async {
        for task in tasks {
            task.await?;
        }
        Ok::<_, tokio::task::JoinError>(Instant::now())
    })?;
    Ok((recorder.take(), end))
}

type Sender = SendRequest<Full<Bytes>>;

/// One of the concurrent streams, with its own connection.
struct Stream {
    plan: Arc<Plan>,
    recorder: Rc<RefCell<Recorder>>,
    reader: EventReader,
}

impl Stream {
    async fn run(mut self) {
        let plan = Arc::clone(&self.plan);
        let mut connection = None;
        while let Some(body) = plan.next_body() {
            let start = Instant::now();
            let answer = tokio::time::timeout(plan.timeout, self.ask(&mut connection, body, start)).await;
            match answer.unwrap_or_else(|_| Err(format!("no complete answer within {} s", plan.timeout.as_secs_f64())))
            {
                Ok(tokens) => {
                    let mut recorder = self.recorder.borrow_mut();
                    recorder.end_to_end.record(nanoseconds(start.elapsed()));
                    recorder.requests += 1;
                    recorder.tokens += tokens;
                    recorder.short_answers += u64::from(tokens < u64::from(plan.max_new_tokens));
                }
                Err(kind) => {
                    connection = None;
                    *self.recorder.borrow_mut().errors.entry(kind).or_default() += 1;
                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                }
            }
        }
    }

    /// Sends one request and reads its answer to the end: its number of tokens, or what went wrong.
    async fn ask(&mut self, connection: &mut Option<Sender>, body: Bytes, start: Instant) -> Result<u64, String> {
        let response = self.send(connection, body).await?;
        let status = response.status();
        if !status.is_success() {
            let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
            return Err(format!("status {}: {}", status.as_u16(), api::error_of(&body)));
        }
        match self.plan.api {
            Api::Generate => {
                let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
                Ok(api::native_tokens(&body)?)
            }
            Api::GenerateStream | Api::Openai => self.read_events(response.into_body(), start).await,
        }
    }

    /// A peer may close a kept connection at any moment: a request that finds it closed goes out once more, on a new one.
    async fn send(&self, connection: &mut Option<Sender>, body: Bytes) -> Result<Response<Incoming>, String> {
        let request = || {
            Request::post(self.plan.api.path())
                .header(HOST, &self.plan.host)
                .header(CONTENT_TYPE, "application/json")
                .body(Full::new(body.clone()))
                .map_err(|error| error.to_string())
        };
        if let Some(mut sender) = connection.take()
            && sender.ready().await.is_ok()
            && let Ok(response) = sender.send_request(request()?).await
        {
            *connection = Some(sender);
            return Ok(response);
        }
        let mut sender = connect(self.plan.address).await.map_err(|error| format!("connecting: {error}"))?;
        sender.ready().await.map_err(|error| format!("connecting: {error}"))?;
        let response = sender.send_request(request()?).await.map_err(|error| format!("sending: {error}"))?;
        *connection = Some(sender);
        Ok(response)
    }

    async fn read_events(&mut self, mut body: Incoming, start: Instant) -> Result<u64, String> {
        let api = self.plan.api;
        let (mut events, mut usage, mut error) = (0, None, None);
        let mut last: Option<Instant> = None;
        self.reader.clear();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| format!("reading: {error}"))?;
            let now = Instant::now();
            let mut recorder = self.recorder.borrow_mut();
            self.reader.feed(frame.data_ref().map_or(&[][..], |data| data), |data| match api::read_event(api, data) {
                Event::Tokens => {
                    match last.replace(now) {
                        Some(before) => recorder.between_tokens.record(nanoseconds(now - before)),
                        None => recorder.first_token.record(nanoseconds(now - start)),
                    }
                    events += 1;
                }
                Event::Other => usage = api::openai_usage(data).or(usage),
                Event::Error(kind) => error = Some(format!("in the stream: {kind}")),
            });
        }
        self.recorder.borrow_mut().events += events;
        if let Some(error) = error {
            return Err(error);
        }
        if api == Api::Openai {
            return usage.or((events > 0).then_some(events)).ok_or_else(|| "a stream without text".into());
        }
        let tokens = api::native_tokens(self.reader.last())?;
        if tokens != events {
            return Err("the number of events differs from `generated_tokens`".into());
        }
        Ok(tokens)
    }
}

async fn connect(address: SocketAddr) -> anyhow::Result<Sender> {
    let socket = tokio::net::TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(socket)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}
