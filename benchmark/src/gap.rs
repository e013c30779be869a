//! The time between two steps with nothing to hide it: how long a shard waits for the router.

use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;

use crate::api::Api;
use crate::load::{self, LoadArgs};
use crate::report::{TIMES_HEAD, Times};
use crate::router_alone::{RouterAlone, RouterArgs};
use crate::stub_shard::observe;

/// Measures the time from a `StepResult` handed to gRPC to the next `StepPlan` decoded, at the stub shard, while all
/// sequences decode greedily. Tell the router after `--` to keep one step in flight, or the time is hidden.
#[derive(Clone, Debug, clap::Args)]
pub struct GapArgs {
    /// Sequences that decode at the same time.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub sequences: u32,
    /// Tokens of each sequence.
    #[arg(long, default_value_t = 512)]
    pub tokens: u32,
    /// Times that every sequence is generated.
    #[arg(long, default_value_t = 4)]
    pub rounds: u64,
    /// Fails if the median is above this many milliseconds.
    #[arg(long, value_name = "MS")]
    pub limit_ms: Option<f64>,
    /// Writes the result to this file too, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// The router and what stands behind it.
    #[command(flatten)]
    pub router: RouterArgs,
}

#[derive(Serialize)]
struct Gap {
    sequences: u32,
    vocab_size: u32,
    step_us: u64,
    gap: Times,
}

/// Starts a router, measures, prints the result and stops the router.
pub async fn run(args: GapArgs) -> anyhow::Result<()> {
    let router = RouterAlone::start(&args.router).await?;
    observe(&router.observed, |observed| observed.min_rows = args.sequences as usize);
    let load_args = LoadArgs {
        address: format!("127.0.0.1:{}", args.router.port),
        api: Api::GenerateStream,
        model: None,
        streams: args.sequences,
        requests: u64::from(args.sequences) * args.rounds,
        duration: 120.0,
        warmup: 0,
        timeout: 120.0,
        max_new_tokens: args.tokens,
        prompts: None,
        words: 16,
        num_prompts: u64::from(args.sequences),
        seed: 0,
        ignore_eos: false,
        parameters: None,
        threads: 1,
        json: None,
    };
    let report = tokio::task::spawn_blocking(move || load::run(&load_args)).await??;
    let gaps = observe(&router.observed, |observed| observed.gaps.clone());
    router.stop().await?;
    anyhow::ensure!(report.failed() == 0, "{} requests failed:\n{report}", report.failed());
    anyhow::ensure!(gaps.count() > 0, "no two steps in turn had {} rows; raise --tokens", args.sequences);
    let gap = Gap {
        sequences: args.sequences,
        vocab_size: args.router.shard.vocab_size,
        step_us: args.router.shard.step_us,
        gap: Times::of(&gaps),
    };
    println!("{TIMES_HEAD}\n{}", gap.gap.row("from a result sent to the next plan decoded"));
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&gap)?)
            .with_context(|| format!("--json {}", path.display()))?;
    }
    let median_ms = gaps.percentile(0.5) as f64 / 1e6;
    if let Some(limit) = args.limit_ms {
        anyhow::ensure!(median_ms <= limit, "the median is {median_ms:.3} ms, expected {limit} ms at most");
    }
    Ok(())
}
