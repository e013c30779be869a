//! Shards in this process that really keep a simulated KV cache, and that fail on demand.
//!
//! Every slot of the cache holds a digest of the ids up to it; the next id is a digest of all slots of the context,
//! read through the block table, and of the sampling parameters. So a lost, repeated or changed id, a block handed out
//! twice or a wrong prefix hit changes everything that follows. Every rank computes all of it, as if ids were broadcast.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use scheduler::{Admission, TokenId, Work};
use tokio::sync::{mpsc, watch};

use super::{
    Answer, Answers, Description, Health, Join, Plan, RowAnswer, RowFailure, Sampled, Shard, ShardError, Shards,
    Timings, Warmup,
};
use crate::control::RankAddress;
use crate::request::Sampling;

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
            let (num_rows, step) =
                state.table.as_ref().map_or((0, 0), |table| (table.rows.len() as u32, table.last_step));
            let phase = if state.table.is_some() { "serving" } else { "loaded" };
            let health =
                Health { phase: phase.into(), epoch: state.epoch, step, num_rows, process_id: state.process_id };
            state.is_alive.then_some(health).ok_or_else(gone)
        });
        async move { health }.boxed()
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

enum Ran {
    Answered(Answer),
    Died,
}

/// The shard's rows and its cache.
#[derive(Debug)]
struct Table {
    epoch: u64,
    block_size: usize,
    max_rows: u32,
    ids: Range<TokenId>,
    kv: Vec<u64>,
    rows: HashMap<u32, Held>,
    last_step: u64,
}

#[derive(Debug)]
struct Held {
    sequence: u64,
    incarnation: u32,
    token_ids: Vec<TokenId>,
    /// Of everything but the ids that decides what is drawn.
    key: u64,
    top_n: u32,
    blocks: Vec<u32>,
    num_computed: usize,
    is_broken: bool,
}

impl Table {
    fn new(warmup: Warmup, ids: Range<TokenId>) -> Self {
        let num_slots = u64::from(warmup.num_blocks) * u64::from(warmup.block_size);
        Self {
            epoch: warmup.epoch,
            block_size: warmup.block_size as usize,
            max_rows: 2 * warmup.max_running,
            ids,
            // What was never written is different in every epoch, so that reading it shows.
            kv: (0..num_slots).map(|slot| digest(warmup.epoch, slot)).collect(),
            rows: HashMap::new(),
            last_step: 0,
        }
    }

    /// Does what a plan says; an error if the plan breaks the contract.
    fn run(&mut self, plan: &Plan, poison: Option<TokenId>, killer: Option<TokenId>) -> Result<Ran, String> {
        let step = &plan.step;
        if step.epoch != self.epoch || step.step <= self.last_step {
            return Err(format!(
                "step {} of epoch {} after step {} of {}",
                step.step, step.epoch, self.last_step, self.epoch
            ));
        }
        self.last_step = step.step;
        if plan.sampling.len() != step.admit.len() {
            return Err(format!("{} samplings for {} admissions", plan.sampling.len(), step.admit.len()));
        }
        for (admission, sampling) in step.admit.iter().zip(&plan.sampling) {
            self.admit(admission, sampling)?;
        }
        let mut hash = digest(step.epoch, step.step);
        let mut rows = vec![];
        for work in &step.work {
            let Some(sampled) = self.work(work, poison, killer)? else { return Ok(Ran::Died) };
            let held = &self.rows[&work.row.0];
            hash = digest(digest(hash, work.row.0.into()), held.sequence);
            hash = digest(hash, held.num_computed as u64);
            hash = held.blocks.iter().chain(held.token_ids.last()).fold(hash, |hash, id| digest(hash, u64::from(*id)));
            let (row, incarnation, computed) = (work.row, work.incarnation, held.num_computed as u32);
            rows.push(RowAnswer { row, incarnation, computed, sampled });
        }
        for row in &step.release {
            self.rows.remove(&row.0).ok_or_else(|| format!("row {} is released but not held", row.0))?;
        }
        let (epoch, step) = (step.epoch, step.step);
        Ok(Ran::Answered(Answer { epoch, step, table_digest: hash, rows, timings: Timings::default() }))
    }

    fn admit(&mut self, admission: &Admission, sampling: &Sampling) -> Result<(), String> {
        let Admission { row, id, incarnation, token_ids, num_prompt, num_cached } = admission;
        if row.0 >= self.max_rows || num_prompt > &token_ids.len() || num_cached >= &token_ids.len() {
            return Err(format!("cannot admit {admission:?}"));
        }
        let held = Held {
            sequence: id.0,
            incarnation: *incarnation,
            token_ids: token_ids.clone(),
            key: key(sampling, *num_prompt),
            top_n: sampling.top_n,
            blocks: vec![],
            num_computed: *num_cached,
            is_broken: false,
        };
        match self.rows.insert(row.0, held) {
            None => Ok(()),
            Some(former) => Err(format!("row {} is given to {} and held by {}", row.0, id.0, former.sequence)),
        }
    }

    /// The ids of a row, or its failure; nothing if the process dies of it.
    #[allow(clippy::type_complexity)]
    fn work(
        &mut self,
        work: &Work,
        poison: Option<TokenId>,
        killer: Option<TokenId>,
    ) -> Result<Option<Result<Vec<Sampled>, RowFailure>>, String> {
        let held = self.rows.get_mut(&work.row.0).ok_or_else(|| format!("row {} is not held", work.row.0))?;
        if held.incarnation != work.incarnation {
            return Err(format!("row {} holds {}.{}: {work:?}", work.row.0, held.sequence, held.incarnation));
        }
        held.blocks.extend(work.new_blocks.iter().map(|block| block.0));
        let num_known = work.extent.num_tokens - work.extent.num_drafts;
        let inputs = held.num_computed..held.num_computed + num_known;
        if inputs.end > held.token_ids.len() || inputs.end > held.blocks.len() * self.block_size {
            let (log, blocks) = (held.token_ids.len(), held.blocks.len());
            return Err(format!("no ids or room for {inputs:?}: {log} ids, {blocks} blocks"));
        }
        let computes = |id: Option<TokenId>| id.is_some_and(|id| held.token_ids[inputs.clone()].contains(&id));
        if computes(killer) {
            return Ok(None);
        }
        held.is_broken |= computes(poison);
        if held.is_broken {
            let message = "logits are not finite (poisoned)".into();
            return Ok(Some(Err(RowFailure { kind: "numerical", message })));
        }
        for position in inputs {
            let before = position.checked_sub(1).map_or(1, |before| self.kv[held.slot(before, self.block_size)]);
            let slot = held.slot(position, self.block_size);
            self.kv[slot] = digest(before, held.token_ids[position].into());
        }
        held.num_computed += num_known;
        if work.extent.samples != (held.num_computed == held.token_ids.len()) {
            return Err(format!("a row samples at the end of the log and only there: {work:?}"));
        }
        if !work.extent.samples {
            return Ok(Some(Ok(vec![])));
        }
        let context = (0..held.num_computed).map(|position| self.kv[held.slot(position, self.block_size)]);
        let drawn = context.fold(held.key, digest);
        let id = |drawn: u64| self.ids.start + (drawn % u64::from(self.ids.end - self.ids.start)) as TokenId;
        let logprob = |drawn: u64| -((drawn >> 40) as f32) / (1 << 24) as f32;
        let top = (0..u64::from(held.top_n)).map(|n| (id(drawn.wrapping_add(n)), logprob(drawn) - n as f32)).collect();
        held.token_ids.push(id(drawn));
        Ok(Some(Ok(vec![Sampled { id: id(drawn), logprob: logprob(drawn), top }])))
    }
}

impl Held {
    fn slot(&self, position: usize, block_size: usize) -> usize {
        self.blocks[position / block_size] as usize * block_size + position % block_size
    }
}

fn key(sampling: &Sampling, num_prompt: usize) -> u64 {
    // All that decides what is drawn, whatever is added to it; what is reported beside it does not.
    let drawn = format!("{num_prompt} {:?}", Sampling { top_n: 0, ..sampling.clone() });
    drawn.bytes().map(u64::from).fold(7, digest)
}

/// Mixes two words (the finalizer of SplitMix64: Steele, Lea and Flood 2014).
fn digest(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.rotate_left(31) ^ 0x9E37_79B9_7F4A_7C15;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
