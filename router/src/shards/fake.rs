//! Shards in this process that really keep a simulated KV cache, and that fail on demand.
//!
//! Every slot of the cache holds a digest of the ids up to it; the next id is a digest of all slots of the context,
//! read through the block table, and of the sampling parameters. So a lost, repeated or changed id, a block handed out
//! twice or a wrong prefix hit changes everything that follows. Every rank computes all of it, as if ids were broadcast.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use scheduler::TokenId;
use tokio::sync::{mpsc, watch};

use super::fake_table::{Ran, Table};
use super::{Answer, Answers, Description, Health, Join, Plan, Shard, ShardError, Shards, Warmup};
use crate::control::RankAddress;
use crate::request::form::Grammar;

/// The one regular expression that these shards do not take.
pub const REFUSED_REGEX: &str = "refused by the shard";

/// What the fake shards pretend to be.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// Tensor-parallel ranks.
    pub world_size: u32,
    /// Rows of the logits.
    pub vocab_size: u32,
    /// The ids that are drawn from.
    pub ids: Range<TokenId>,
    /// Ids that end a sequence; those in `ids` are drawn like any other.
    pub eos_token_ids: Vec<TokenId>,
    /// The longest sequence.
    pub max_positions: u32,
    /// KV-cache blocks that fit in the memory of a rank.
    pub num_blocks: u32,
    /// How long a step takes.
    pub step_time: Duration,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            world_size: 1,
            vocab_size: 4096,
            ids: 3..4096,
            eos_token_ids: vec![2],
            max_positions: 2048,
            num_blocks: 512,
            step_time: Duration::from_millis(1),
        }
    }
}

/// How an answer is spoilt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Corruption {
    /// The rank's table differs from those of the others.
    Digest,
    /// The answer is one to another step.
    Step,
    /// The answer is one of an earlier epoch.
    Epoch,
    /// The last row is missing.
    RowCount,
    /// A row that was to sample yields nothing.
    IdCount,
}

/// The fake ranks, and the handle for what befalls them. Clones are the same ranks.
#[derive(Clone, Debug)]
pub struct FakeShards {
    ranks: Arc<Vec<Arc<FakeRank>>>,
}

impl FakeShards {
    /// Ranks that are alive and loaded.
    pub fn new(options: FakeOptions) -> Self {
        let ranks = (0..options.world_size).map(|rank| Arc::new(FakeRank::new(rank, options.clone())));
        Self { ranks: Arc::new(ranks.collect()) }
    }

    /// The ranks as a launcher would name them.
    pub fn addresses(&self) -> Vec<RankAddress> {
        let address = |rank: &Arc<FakeRank>| {
            let (process_id, incarnation) = rank.with(|state| (state.process_id, state.incarnation));
            RankAddress { rank: rank.rank, socket: format!("fake-{}", rank.rank).into(), process_id, incarnation }
        };
        self.ranks.iter().map(address).collect()
    }

    /// One rank, as a [`Shard`].
    pub fn rank(&self, rank: u32) -> Arc<FakeRank> {
        Arc::clone(&self.ranks[rank as usize])
    }

    /// Ends the process of a rank: its streams break, and nothing answers until `restart`.
    pub fn die(&self, rank: u32) {
        self.rank(rank).with(RankState::die);
    }

    /// Ends the process of a rank when it starts its `steps`-th step from now.
    pub fn die_after(&self, rank: u32, steps: u64) {
        self.rank(rank).with(|state| state.dies_after = Some(steps));
    }

    /// Replaces the process of a rank, alive or dead: a new one without cache, rows, epoch or stall.
    pub fn restart(&self, rank: u32) {
        self.rank(rank).with(RankState::restart);
    }

    /// A rank takes plans and answers none, until `resume` or `restart`.
    pub fn stall(&self, rank: u32) {
        self.rank(rank).with(|state| state.is_stalled = true);
    }

    /// A stalled rank goes on where it stopped.
    pub fn resume(&self, rank: u32) {
        self.rank(rank).with(|state| state.is_stalled = false);
    }

    /// Spoils the next answer of a rank.
    pub fn corrupt(&self, rank: u32, corruption: Corruption) {
        self.rank(rank).with(|state| state.corruption = Some(corruption));
    }

    /// From now on a step takes so long on every rank.
    pub fn slow(&self, step_time: Duration) {
        self.each(|state| state.step_time = step_time);
    }

    /// From now on a row that computes this id as an input is answered with a numerical error.
    pub fn poison(&self, id: TokenId) {
        self.each(|state| state.poison = Some(id));
    }

    /// From now on a row that computes this id as an input ends the process of rank 0, again and again.
    pub fn kill_at(&self, id: TokenId) {
        self.rank(0).with(|state| state.killer = Some(id));
    }

    /// From now on this many blocks fit in a rank's memory.
    pub fn shrink(&self, num_blocks: u32) {
        self.each(|state| state.num_blocks = num_blocks);
    }

    /// From now on joining fails, this many times.
    pub fn refuse_joins(&self, rank: u32, times: u32) {
        self.rank(rank).with(|state| state.joins_to_refuse = times);
    }

    /// Whether a rank's process is there.
    pub fn is_alive(&self, rank: u32) -> bool {
        self.rank(rank).with(|state| state.is_alive)
    }

    /// Returns when some rank's process has ended.
    pub async fn death(&self) -> u32 {
        let wait = |rank: &Arc<FakeRank>| {
            let rank = Arc::clone(rank);
            async move {
                rank.until(|state| !state.is_alive).await;
                rank.rank
            }
            .boxed()
        };
        futures::future::select_all(self.ranks.iter().map(wait)).await.0
    }

    fn each(&self, change: impl Fn(&mut RankState)) {
        self.ranks.iter().for_each(|rank| rank.with(&change));
    }
}

impl Shards for FakeShards {
    fn connect<'a>(&'a self, address: &'a RankAddress) -> BoxFuture<'a, Result<Arc<dyn Shard>, ShardError>> {
        let rank = self.rank(address.rank);
        let is_there = rank.with(|state| state.is_alive && state.process_id == address.process_id);
        let connected = is_there.then_some(rank as Arc<dyn Shard>).ok_or_else(gone);
        async move { connected }.boxed()
    }
}

fn gone() -> ShardError {
    ShardError::Failed("the process is gone".into())
}

/// One fake rank.
#[derive(Debug)]
pub struct FakeRank {
    rank: u32,
    options: FakeOptions,
    state: Mutex<RankState>,
    /// Counts changes of `state` made through the handle.
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
struct RankState {
    is_alive: bool,
    is_stalled: bool,
    process_id: u32,
    incarnation: u32,
    epoch: u64,
    table: Option<Table>,
    num_blocks: u32,
    step_time: Duration,
    dies_after: Option<u64>,
    corruption: Option<Corruption>,
    poison: Option<TokenId>,
    killer: Option<TokenId>,
    joins_to_refuse: u32,
}

impl RankState {
    fn die(&mut self) {
        self.is_alive = false;
        self.table = None;
        self.dies_after = None;
    }

    fn restart(&mut self) {
        self.die();
        (self.is_alive, self.is_stalled, self.corruption, self.epoch) = (true, false, None, 0);
        self.process_id += 1000;
        self.incarnation += 1;
    }
}

impl FakeRank {
    fn new(rank: u32, options: FakeOptions) -> Self {
        let state = RankState {
            is_alive: true,
            is_stalled: false,
            process_id: 1000 + rank,
            incarnation: 0,
            epoch: 0,
            table: None,
            num_blocks: options.num_blocks,
            step_time: options.step_time,
            dies_after: None,
            corruption: None,
            poison: None,
            killer: None,
            joins_to_refuse: 0,
        };
        Self { rank, options, state: Mutex::new(state), changes: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, RankState> {
        self.state.lock().expect("no test panics while it holds this")
    }

    fn with<T>(&self, change: impl FnOnce(&mut RankState) -> T) -> T {
        let outcome = change(&mut self.lock());
        self.changes.send_modify(|changes| *changes += 1);
        outcome
    }

    async fn until(&self, holds: impl Fn(&RankState) -> bool) {
        let mut changes = self.changes.subscribe();
        while !holds(&self.lock()) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Fails once the process that `life` (process id, epoch) names is gone or has joined another epoch.
    async fn end_of(&self, life: (u32, u64)) -> ShardError {
        self.until(|state| !state.is_alive || (state.process_id, state.epoch) != life).await;
        gone()
    }

    async fn answer(&self, plan: &Plan, life: (u32, u64)) -> Result<Answer, ShardError> {
        let step_time = self.with(|state| state.step_time);
        if !step_time.is_zero() {
            tokio::time::sleep(step_time).await;
        }
        self.until(|state| !state.is_stalled).await;
        self.with(|state| {
            if !state.is_alive || (state.process_id, state.epoch) != life {
                return Err(gone());
            }
            if let Some(steps) = &mut state.dies_after {
                *steps = steps.saturating_sub(1);
                if *steps == 0 {
                    state.die();
                    return Err(gone());
                }
            }
            let (poison, killer) = (state.poison, state.killer);
            let table = state.table.as_mut().ok_or(ShardError::Failed("a plan before Warmup".into()))?;
            let mut answer = match table.run(plan, poison, killer).map_err(ShardError::Failed)? {
                Ran::Answered(answer) => answer,
                Ran::Died => {
                    state.die();
                    return Err(gone());
                }
            };
            if self.rank > 0 {
                answer.rows.clear();
            }
            if let Some(corruption) = state.corruption.take() {
                spoil(&mut answer, corruption);
            }
            Ok(answer)
        })
    }
}

fn spoil(answer: &mut Answer, corruption: Corruption) {
    match corruption {
        Corruption::Digest => answer.table_digest ^= 1,
        Corruption::Step => answer.step += 1,
        Corruption::Epoch => answer.epoch -= 1,
        Corruption::RowCount => drop(answer.rows.pop()),
        Corruption::IdCount => answer.rows.iter_mut().for_each(|row| row.sampled = Ok(vec![])),
    }
}

impl Shard for FakeRank {
    fn health(&self) -> BoxFuture<'_, Result<Health, ShardError>> {
        let health = self.with(|state| {
            let (num_rows, step) = state.table.as_ref().map_or((0, 0), |table| (table.num_rows(), table.last_step()));
            let phase = if state.table.is_some() { "serving" } else { "loaded" };
            let health =
                Health { phase: phase.into(), epoch: state.epoch, step, num_rows, process_id: state.process_id };
            state.is_alive.then_some(health).ok_or_else(gone)
        });
        async move { health }.boxed()
    }

    fn prepare(&self, grammar: Grammar) -> BoxFuture<'_, Result<Option<String>, ShardError>> {
        // It does not generate by grammars: one of them shows what happens if a shard knows better than the router.
        let error = (&*grammar.source == REFUSED_REGEX).then(|| "not here".to_owned());
        std::future::ready(Ok(error)).boxed()
    }

    fn describe(&self) -> BoxFuture<'_, Result<Description, ShardError>> {
        let description = Description {
            model_type: "fake".into(),
            vocab_size: self.options.vocab_size,
            eos_token_ids: self.options.eos_token_ids.clone(),
            max_positions: self.options.max_positions,
            dtype: "float32".into(),
            device: "cpu".into(),
            num_cache_groups: 1,
            max_drafts: 0,
            world_size: self.options.world_size,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        let described = self.with(|state| state.is_alive.then_some(description).ok_or_else(gone));
        async move { described }.boxed()
    }

    fn join(&self, join: Join) -> BoxFuture<'_, Result<(), ShardError>> {
        let joined = self.with(|state| {
            if !state.is_alive {
                return Err(gone());
            }
            if state.joins_to_refuse > 0 {
                state.joins_to_refuse -= 1;
                return Err(ShardError::Failed("told to refuse".into()));
            }
            if join.epoch <= state.epoch || join.world_size != self.options.world_size || join.rank != self.rank {
                let (epoch, rank, world_size) = (state.epoch, self.rank, self.options.world_size);
                let own = format!("seen epoch {epoch}, rank {rank} of {world_size}");
                return Err(ShardError::Failed(format!("cannot join {join:?}: {own}")));
            }
            state.epoch = join.epoch;
            state.table = None;
            Ok(())
        });
        async move { joined }.boxed()
    }

    fn warmup(&self, warmup: Warmup) -> BoxFuture<'_, Result<u32, ShardError>> {
        let warmed_up = self.with(|state| {
            let num_blocks = state.num_blocks;
            match () {
                () if !state.is_alive => Err(gone()),
                () if warmup.epoch != state.epoch => Err(ShardError::Failed("a Warmup of another epoch".into())),
                () if warmup.num_blocks > num_blocks => {
                    Err(ShardError::OutOfMemory(format!("{num_blocks} blocks fit, not {}", warmup.num_blocks)))
                }
                () if warmup.num_blocks == 0 => Ok(num_blocks),
                () => {
                    state.table = Some(Table::new(warmup, self.options.ids.clone()));
                    Ok(warmup.num_blocks)
                }
            }
        });
        async move { warmed_up }.boxed()
    }

    fn run(self: Arc<Self>, plans: mpsc::Receiver<Arc<Plan>>) -> BoxFuture<'static, Result<Answers, ShardError>> {
        let life = self.with(|state| state.is_alive.then_some((state.process_id, state.epoch)));
        async move { Ok(run(self, plans, life.ok_or_else(gone)?)) }.boxed()
    }
}

fn run(rank: Arc<FakeRank>, plans: mpsc::Receiver<Arc<Plan>>, life: (u32, u64)) -> Answers {
    futures::stream::unfold((rank, plans, life), next_answer).boxed()
}

type Running = (Arc<FakeRank>, mpsc::Receiver<Arc<Plan>>, (u32, u64));

async fn next_answer((rank, mut plans, life): Running) -> Option<(Result<Answer, ShardError>, Running)> {
    let answered = async {
        let plan = plans.recv().await?;
        Some(rank.answer(&plan, life).await)
    };
    let answer = tokio::select! {
        biased;
        ended = rank.end_of(life) => Err(ended),
        answer = answered => answer?,
    };
    Some((answer, (rank, plans, life)))
}
