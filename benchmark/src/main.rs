//! Measures the server: a load generator, and stand-ins for what stands before and behind the router.

mod api;
mod gap;
mod histogram;
mod lifeline;
mod load;
mod null_server;
mod prompts;
mod report;
mod router_alone;
mod sse;
mod stub_shard;
mod tokenizer;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use text_generation_router::args::version;

use crate::gap::GapArgs;
use crate::lifeline::Lifeline;
use crate::load::LoadArgs;
use crate::null_server::NullServerArgs;
use crate::router_alone::{RouterAlone, RouterArgs};
use crate::stub_shard::StubShardArgs;

/// Measures a text-generation server, or its router alone.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 120)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sends requests in a closed loop and prints latencies and throughput as markdown.
    Load(LoadArgs),
    /// Serves answers made in advance, to find the ceiling of `load` and of the libraries.
    NullServer(NullServerArgs),
    /// Serves the shard's side of the gRPC contract, without a model.
    StubShard {
        /// Unix socket to listen on.
        #[arg(long)]
        socket: PathBuf,
        /// What it claims to be.
        #[command(flatten)]
        shard: StubShardArgs,
        /// How it ends.
        #[command(flatten)]
        lifeline: Lifeline,
    },
    /// Serves the launcher's side of the control socket, for one shard that never dies.
    StubLauncher {
        /// Unix socket to listen on.
        #[arg(long)]
        control_socket: PathBuf,
        /// The shard's Unix socket, told to the router.
        #[arg(long)]
        shard_socket: PathBuf,
        /// How it ends.
        #[command(flatten)]
        lifeline: Lifeline,
    },
    /// Runs a router with a stub shard and a stub launcher, without Python, until it is stopped.
    RouterAlone {
        /// The router and what stands behind it.
        #[command(flatten)]
        router: RouterArgs,
        /// How it ends.
        #[command(flatten)]
        lifeline: Lifeline,
    },
    /// Runs a router with a stub shard and measures how long the shard waits between two steps.
    Gap(GapArgs),
    /// Writes a byte-level BPE tokenizer whose vocabulary is filled up with made-up entries.
    ExtendTokenizer {
        /// The `tokenizer.json` to start from.
        #[arg(long, value_name = "FILE")]
        tokenizer: PathBuf,
        /// Entries of the new vocabulary.
        #[arg(long)]
        vocab_size: u32,
        /// Where to write the new `tokenizer.json`.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
}

fn main() -> ExitCode {
    let matches = Args::command().version(version(option_env!("GIT_COMMIT"))).get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run(args.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Load(args) => load(&args),
        Command::NullServer(args) => null_server::run(&args),
        Command::StubShard { socket, shard, lifeline } => block_on(async {
            tokio::select! {
                result = stub_shard::serve(&socket, shard, Default::default()) => result,
                () = lifeline.ended() => Ok(()),
            }
        }),
        Command::StubLauncher { control_socket, shard_socket, lifeline } => block_on(async {
            tokio::select! {
                result = router_alone::stub_launcher(&control_socket, &shard_socket) => result,
                () = lifeline.ended() => Ok(()),
            }
        }),
        Command::RouterAlone { router, lifeline } => block_on(run_router_alone(router, lifeline)),
        Command::Gap(args) => block_on(gap::run(args)),
        Command::ExtendTokenizer { tokenizer, vocab_size, output } => {
            let text =
                std::fs::read_to_string(&tokenizer).with_context(|| format!("reading {}", tokenizer.display()))?;
            std::fs::write(&output, tokenizer::extend(&text, vocab_size)?)
                .with_context(|| format!("writing {}", output.display()))
        }
    }
}

fn block_on(future: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}

fn load(args: &LoadArgs) -> anyhow::Result<()> {
    let report = load::run(args)?;
    print!("{report}");
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("--json {}", path.display()))?;
    }
    anyhow::ensure!(report.requests() > 0, "no request was answered");
    Ok(())
}

async fn run_router_alone(args: RouterArgs, lifeline: Lifeline) -> anyhow::Result<()> {
    let mut router = RouterAlone::start(&args).await?;
    let process_id = router.process_id().context("the router ended at once")?;
    println!("listening on 127.0.0.1:{} process {process_id} in {}", args.port, router.directory().display());
    tokio::select! {
        error = router.broken() => return Err(error),
        () = lifeline.ended() => {}
    }
    router.stop().await
}
