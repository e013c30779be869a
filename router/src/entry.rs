//! The router process: reads its arguments, ties the parts together and ends with a meaningful code. It stands in the library,
//! where it is compiled once for the program and all tests.

use std::io::Read;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::CommandFactory;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::args::{Args, KeyFileError};
use crate::chat::ChatTemplate;
use crate::chat::files::{self, FilesError, Overrides};
use crate::control::{CANNOT_SERVE, Link};
use crate::engine::{Config, Driver, Ended};
use crate::http::auth::ApiKeys;
use crate::shards::grpc::GrpcShards;
use crate::telemetry::metrics::Exporter;
use crate::telemetry::traces::Traces;
use crate::text::tokenizer::{Tokenizer, TokenizerError};
use crate::{admin, http, telemetry};

/// How long answers may take to reach their clients after the last sequence has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// All of it. `commit` is what the program was built from, where that is known.
pub fn main(commit: Option<&'static str>) -> ExitCode {
    let commit = commit.filter(|commit| !commit.is_empty());
    let args = Args::parse_with(commit);
    if let Err(contradiction) = args.validate() {
        Args::command().error(clap::error::ErrorKind::ValueValidation, contradiction).exit();
    }
    if args.check {
        return match Inputs::read(&args) {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if let Err(errno) = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL) {
        eprintln!("error: cannot ask to be killed with the parent: {errno}");
    }
    let unlimited = raise_file_limit();
    if args.exit_with_stdin {
        std::thread::spawn(exit_with_stdin);
    }
    if let Err(error) = telemetry::tracing::init(&args.log_level, args.json_output) {
        Args::command().error(clap::error::ErrorKind::ValueValidation, error).exit();
    }
    if let Err(errno) = unlimited {
        warn!("the limit of open files cannot be raised: {errno}");
    }
    let json_output = args.json_output;
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            if json_output {
                error!("{error:#}");
            } else {
                eprintln!("error: {error:#}");
            }
            let is_hopeless = error.is::<TokenizerError>() || error.is::<FilesError>() || error.is::<KeyFileError>();
            if is_hopeless { ExitCode::from(CANNOT_SERVE) } else { ExitCode::FAILURE }
        }
    }
}

/// Every connection is an open file: as many as may be had.
fn raise_file_limit() -> nix::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
}

/// Standard input is the launcher's lifeline: when it closes, the launcher is gone, and nobody wants an answer.
fn exit_with_stdin() {
    let mut stdin = std::io::stdin().lock();
    let mut byte = [0; 64];
    while stdin.read(&mut byte).is_ok_and(|read| read > 0) {}
    eprintln!("error: standard input was closed; ending");
    std::process::exit(1);
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let code = runtime.block_on(serve(args));
    // Blocking threads that still tokenize are not waited for.
    runtime.shutdown_background();
    code
}

/// What is read before anything is started. `--check` reads it too, and ends.
struct Inputs {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    api_keys: ApiKeys,
}

impl Inputs {
    fn read(args: &Args) -> anyhow::Result<Self> {
        // What the operator named first: it is sooner read than a tokenizer.
        let api_keys = ApiKeys::new(args.api_keys()?.into_iter().map(String::into_bytes));
        let (chat_template, tokenizer_config) = (args.chat_template.clone(), args.tokenizer_config_path.clone());
        let template = files::read(&args.tokenizer_name, &Overrides { chat_template, tokenizer_config })?;
        let tokenizer = Tokenizer::from_file(&args.tokenizer_name.join("tokenizer.json"))?;
        Ok(Self { tokenizer, template, api_keys })
    }
}

async fn serve(args: Args) -> anyhow::Result<ExitCode> {
    let stopped = stop_signal()?;
    let Inputs { tokenizer, template, api_keys } = Inputs::read(&args)?;
    let tokenizer = Arc::new(tokenizer);
    if template.is_empty() {
        warn!("the model has no chat template: requests to /v1/chat/completions will be refused");
    } else if let Some(flaw) = template.flaw() {
        warn!("the model's chat template {flaw}: requests to /v1/chat/completions will be refused");
    } else {
        info!(?template, "chat templates");
    }
    let address = args.address();
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let link = Link::connect(&args.control_socket)
        .await
        .with_context(|| format!("cannot connect to the launcher at {}", args.control_socket.display()))?;
    let metrics = Exporter::default();
    metrics.install();
    tokio::spawn(metrics.clone().upkeep());
    let (driver, engine, observer) =
        Driver::new(Config::from(&args), Arc::new(GrpcShards), link, Arc::clone(&tokenizer));
    if let Some(socket) = &args.admin_socket {
        let listener = admin::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        tokio::spawn(admin::serve(listener, engine.clone(), observer));
    }
    let driver = tokio::spawn(driver.run(until(stopped.clone())));
    let (engine_ended, ended) = watch::channel(false);
    let traces = match &args.otlp_endpoint {
        Some(endpoint) => Traces::to(endpoint, &args.otlp_service_name).map_err(anyhow::Error::msg)?,
        None => Traces::default(),
    };
    let parts = HttpParts { metrics, template, api_keys, traces: traces.clone() };
    let config = http_config(args, parts);
    let http = tokio::spawn(http::serve(listener, config, engine, tokenizer, until(ended)));
    let ended = driver.await.context("the engine broke")?;
    info!(?ended, "the engine has ended");
    engine_ended.send_replace(true);
    match tokio::time::timeout(LAST_WORDS, http).await {
        Ok(served) => served.context("the HTTP server broke")?.context("the HTTP server failed")?,
        Err(_) => info!("some clients did not read their last answer in time"),
    }
    // It waits for a thread of its own, and for the network.
    tokio::task::spawn_blocking(move || traces.flush()).await.context("sending traces broke")?;
    Ok(match ended {
        Ended::Drained | Ended::CutOff { .. } => ExitCode::SUCCESS,
        Ended::LauncherGone { .. } => ExitCode::FAILURE,
        Ended::CannotServe { .. } => ExitCode::from(CANNOT_SERVE),
    })
}

/// What the HTTP server is given beside settings.
struct HttpParts {
    metrics: Exporter,
    template: ChatTemplate,
    api_keys: ApiKeys,
    traces: Traces,
}

fn http_config(args: Args, parts: HttpParts) -> http::Config {
    let HttpParts { metrics, template, api_keys, traces } = parts;
    http::Config {
        model_id: args.model_id,
        revision: args.revision,
        commit: args.commit,
        compute_type: args.compute_type,
        max_concurrent_requests: args.limits.max_concurrent_requests,
        max_best_of: args.limits.max_best_of,
        max_client_batch_size: args.limits.max_client_batch_size,
        max_stop_sequences: args.limits.max_stop_sequences,
        max_top_n_tokens: args.limits.max_top_n_tokens,
        has_grammars: !args.limits.disable_grammar_support,
        validation_workers: args.validation_workers,
        payload_limit: args.limits.payload_limit,
        cors_allow_origin: args.cors_allow_origin,
        deadlines: http::Deadlines::default(),
        metrics,
        traces,
        template,
        api_keys,
    }
}

/// Becomes true with SIGTERM or SIGINT. Further ones change nothing: Ctrl-C reaches launcher and router alike, and the
/// launcher passes it on.
fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        sender.send_replace(true);
        // Keeps the value readable, and the handlers in place.
        sender.closed().await;
    });
    Ok(receiver)
}

async fn until(mut flag: watch::Receiver<bool>) {
    // A sender that is gone will never say no.
    let _ = flag.wait_for(|is_set| *is_set).await;
}
