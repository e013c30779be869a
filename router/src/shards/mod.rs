//! The shards as the driver sees them: one trait for a rank, values for what is said to it, and a group of ranks that
//! computes as one.
//!
//! Protobuf types stay in [`grpc`] and [`stub`]. Nothing in here decides what runs.

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use scheduler::{RowId, StepPlan, TokenId};
use tokio::sync::mpsc;

use crate::control::RankAddress;
use crate::request::Sampling;
use crate::request::form::Grammar;

pub mod fake;
mod fake_table;
pub mod group;
pub mod grpc;
mod self_kill;
pub mod stub;
mod terms;

pub use group::{Fault, Group};
pub use self_kill::SelfKill;

/// Generated from `proto/shard.proto`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod proto {
    tonic::include_proto!("text_generation.shard.v1");
}

/// Plans buffered towards one rank. More than any pipeline depth, so that a full buffer means a broken rank.
pub const PLAN_BUFFER: usize = 8;

/// Reaches the ranks of a generation.
pub trait Shards: Send + Sync {
    /// Connects to one rank; its process must exist, it need not have loaded its model.
    fn connect<'a>(&'a self, address: &'a RankAddress) -> BoxFuture<'a, Result<Arc<dyn Shard>, ShardError>>;
}

/// One rank. Every call has a deadline of its own; dropping the stream of answers ends the run on the shard as well.
pub trait Shard: Send + Sync {
    /// How the process is, whatever its step thread does.
    fn health(&self) -> BoxFuture<'_, Result<Health, ShardError>>;
    /// What the router must know of the model.
    fn describe(&self) -> BoxFuture<'_, Result<Description, ShardError>>;
    /// Forms the group of an epoch; returns once all ranks have joined.
    fn join(&self, join: Join) -> BoxFuture<'_, Result<(), ShardError>>;
    /// Measures (`num_blocks` = 0) or allocates the KV cache; the number of blocks that fit, or were allocated.
    fn warmup(&self, warmup: Warmup) -> BoxFuture<'_, Result<u32, ShardError>>;
    /// Makes ready what sequences with a grammar need; why it cannot be used, if it cannot. For rank 0.
    fn prepare(&self, grammar: Grammar) -> BoxFuture<'_, Result<Option<String>, ShardError>>;
    /// Plans in, answers out, in the same order.
    fn run(self: Arc<Self>, plans: mpsc::Receiver<Arc<Plan>>) -> BoxFuture<'static, Result<Answers, ShardError>>;
}

/// The answers of one rank. Ends, or yields an error, when the rank cannot go on.
pub type Answers = BoxStream<'static, Result<Answer, ShardError>>;

/// Why a call to one rank failed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ShardError {
    /// The cache does not fit in the rank's memory.
    #[error("{0}")]
    OutOfMemory(String),
    /// Anything else: the process is gone, is overdue, or refuses.
    #[error("{0}")]
    Failed(String),
}

/// How a rank's process is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Health {
    /// What the process is doing, in one word.
    pub phase: String,
    /// The highest epoch seen.
    pub epoch: u64,
    /// The last completed step.
    pub step: u64,
    /// Rows in its table.
    pub num_rows: u32,
    /// Its process id.
    pub process_id: u32,
}

/// What a rank says about the model. Equal on all ranks, save `rank`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Description {
    /// `config.json`'s `model_type`.
    pub model_type: String,
    /// Rows of the logits.
    pub vocab_size: u32,
    /// Ids that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
    /// The longest sequence that the positions allow.
    pub max_positions: u32,
    /// As computed in.
    pub dtype: String,
    /// `cpu`, `cuda`.
    pub device: String,
    /// Groups of layers whose blocks are counted apart.
    pub num_cache_groups: u32,
    /// Drafted ids per row that can be verified in one step.
    pub max_drafts: u32,
    /// Tensor-parallel ranks.
    pub world_size: u32,
    /// Of the shard's program.
    pub version: String,
}

/// Forms the group of an epoch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Join {
    /// Higher than every epoch that any rank has seen.
    pub epoch: u64,
    /// The rank that is spoken to.
    pub rank: u32,
    /// Ranks in the group.
    pub world_size: u32,
    /// A file that does not exist yet, new for each epoch.
    pub rendezvous: String,
}

/// Sizes or allocates the KV cache.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Warmup {
    /// As joined.
    pub epoch: u64,
    /// Tokens per block.
    pub block_size: u32,
    /// Sequences that run at once.
    pub max_running: u32,
    /// Input tokens of one step.
    pub max_step_tokens: u32,
    /// The longest sequence.
    pub max_total_tokens: u32,
    /// Zero: measure how many fit.
    pub num_blocks: u32,
}

/// A step plan and what the scheduler does not know of the sequences that it admits.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is computed.
    pub step: StepPlan,
    /// What the sequences of `step.admit` ask for, in the same order.
    pub terms: Vec<Terms>,
}

/// What an admitted sequence asks for.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// How its ids are drawn.
    pub sampling: Arc<Sampling>,
    /// From this index on the log-probabilities of its prompt's ids are wanted.
    pub prompt_logprobs_from: Option<u32>,
}

/// What a rank answers to one plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Of the plan.
    pub epoch: u64,
    /// Of the plan.
    pub step: u64,
    /// Of the rank's own table after the step; equal on all ranks.
    pub table_digest: u64,
    /// Rank 0: one for each work of the plan, in order. Other ranks: none.
    pub rows: Vec<RowAnswer>,
    /// How long it took.
    pub timings: Timings,
}

/// How long a step took on the shard, in microseconds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Timings {
    /// The model.
    pub forward_us: u64,
    /// Sampling and reporting.
    pub sample_us: u64,
    /// All of it.
    pub total_us: u64,
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct RowAnswer {
    /// Of the work.
    pub row: RowId,
    /// Of the work.
    pub incarnation: u32,
    /// The row's length in the cache after the step.
    pub computed: u32,
    /// The sampled ids, or why the shard cannot go on with the sequence.
    pub sampled: Result<Vec<Sampled>, RowFailure>,
    /// Of the prompt's ids, where asked for, in order.
    pub prompt: Vec<PromptLogprob>,
}

/// How probable an id of a prompt was after those before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptLogprob {
    /// Natural logarithm, under the raw distribution.
    pub logprob: f32,
    /// The most probable ids and their logprobs, where asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// One sampled id.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// In the vocabulary.
    pub id: TokenId,
    /// Natural logarithm, under the raw distribution.
    pub logprob: f32,
    /// The most probable ids and their logprobs, where asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// The shard cannot go on with one sequence.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RowFailure {
    /// `numerical`, `grammar`, `unsupported` or `unknown`.
    pub kind: &'static str,
    /// In words.
    pub message: String,
}
