//! Continuous batching: every step continues all running sequences, then spends what is left of the token budget on
//! prompts, in order of arrival, splitting the last one if it does not fit.
//!
//! Steps are planned ahead of the results of those before them. Until a step is committed it is counted with the most
//! that it may do; blocks that an open step may touch stay with the sequence, or `retired` if it has left the shards.

mod planning;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use planning::Draft;

use crate::blocks::{BlockPool, BlockTable};
use crate::planted::{Bug, Planted};
use crate::sequence::{FinishReason, Millis, Request, Sequence, SequenceId, TokenId};
use crate::step::{Event, OpenRow, OpenStep, RowError, RowId, RowResult, ShardFault, StepPlan, StepResult};

/// What the shards of one epoch can do.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// Input tokens of one step, over all sequences, drafts included. At least `max_running * (1 + max_drafts)`, so that
    /// every running sequence can go on in every step.
    pub max_step_tokens: usize,
    /// Sequences that the shards hold at once, besides those that the next plan releases.
    pub max_running: usize,
    /// Steps sent before the result of the first of them is known.
    pub max_open_steps: usize,
    /// Ids that a row may guess and verify in one step.
    pub max_drafts: usize,
    /// Positions of one block.
    pub block_size: usize,
    /// Blocks of the KV cache.
    pub num_blocks: u32,
    /// Ids that end a sequence.
    pub eos: Vec<TokenId>,
}

impl Limits {
    /// The longest sequence that can run.
    pub fn num_positions(&self) -> usize {
        self.num_blocks as usize * self.block_size
    }
}

/// Why a request was not queued.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rejected {
    /// No shards were ever ready, so nobody knows what fits.
    NotReady,
    /// There is nothing to continue.
    EmptyPrompt,
    /// `max_new_tokens` is zero.
    NothingToGenerate,
    /// The prompt plus `max_new_tokens` can never fit in the cache.
    TooLong {
        /// Prompt plus `max_new_tokens`.
        tokens: usize,
        /// The longest sequence that can run.
        limit: usize,
    },
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReady => write!(f, "no shards were ready yet"),
            Self::EmptyPrompt => write!(f, "the prompt is empty"),
            Self::NothingToGenerate => write!(f, "max_new_tokens is 0, expected at least 1"),
            Self::TooLong { tokens, limit } => {
                write!(f, "prompt and max_new_tokens make {tokens} tokens, the cache holds {limit}")
            }
        }
    }
}

impl std::error::Error for Rejected {}

/// Counts for probes, metrics and tests. Blocks: free + cached + pinned = all.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Sequences in the queue, preempted ones included.
    pub num_waiting: usize,
    /// Sequences that hold a row.
    pub num_running: usize,
    /// Steps sent and not answered.
    pub num_open_steps: usize,
    /// Blocks of the cache.
    pub num_blocks: u32,
    /// Blocks that hold nothing of use: never published, evicted or withdrawn.
    pub num_free: usize,
    /// Published blocks that nobody holds.
    pub num_cached: usize,
    /// Blocks held by sequences, or by open steps of sequences that have left.
    pub num_pinned: usize,
    /// Positions of one block.
    pub block_size: usize,
    /// The latest epoch in which shards were ready; zero before the first.
    pub epoch: u64,
    /// The last step planned.
    pub step: u64,
}

/// A sequence's leftovers while open steps may still touch them.
#[derive(Debug)]
struct Retired {
    blocks: BlockTable,
    last_step: u64,
    /// The row's length in the cache, by committed steps; `None` after a row error.
    num_computed: Option<usize>,
    /// Whether its open rows may still kill the shards.
    is_suspect: bool,
}

/// Decides what every step computes. See the crate's documentation.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    epoch: u64,
    /// The last step planned.
    step: u64,
    /// Whether the shards of this epoch take plans.
    is_ready: bool,
    pool: BlockPool,
    /// In order of precedence; what returns goes before what never ran.
    waiting: VecDeque<Sequence>,
    /// In order of arrival; the last is preempted first.
    running: Vec<Sequence>,
    /// Sent and not answered, oldest first.
    open: VecDeque<OpenStep>,
    /// By the sequence that had them. It is not admitted again before they are gone.
    retired: BTreeMap<SequenceId, Retired>,
    /// What the shards can forget with the next plan.
    release: Vec<(RowId, SequenceId)>,
    free_rows: BTreeSet<RowId>,
    num_added: u64,
    /// No deadline that can still expire is before it.
    first_deadline: Option<Millis>,
    /// See [`Self::set_prompt_tokens`].
    prompt_tokens: usize,
    /// The head of the queue and how many blocks it found missing, so that it does not look up its prefix in every step.
    too_few_blocks_for: Option<(SequenceId, usize)>,
    planted: Planted,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self::new()
    }
}

impl Scheduler {
    /// A scheduler whose shards are not ready: it plans nothing, and refuses requests until they first are.
    pub fn new() -> Self {
        let planted = Planted::default();
        Self {
            limits: Limits::default(),
            epoch: 0,
            step: 0,
            is_ready: false,
            pool: BlockPool::new(0, 1, planted),
            waiting: VecDeque::new(),
            running: vec![],
            open: VecDeque::new(),
            retired: BTreeMap::new(),
            release: vec![],
            free_rows: BTreeSet::new(),
            num_added: 0,
            first_deadline: None,
            prompt_tokens: usize::MAX,
            too_few_blocks_for: None,
            planted,
        }
    }

    /// Makes a mistake from now on. To be called before anything else.
    #[cfg(feature = "planted-bugs")]
    pub fn plant(&mut self, bug: Bug) {
        self.planted.bug = Some(bug);
    }

    /// New shards, empty, take plans of this epoch. Step numbers go on. They may have another number of blocks than
    /// those before; returns the end of the sequences that no longer fit.
    ///
    /// Panics if the epoch is not higher than every one before, if the shards before were not lost, or if the limits
    /// allow no progress.
    pub fn shards_ready(&mut self, epoch: u64, limits: Limits) -> Vec<Event> {
        assert!(epoch > self.epoch, "epoch {epoch} does not follow epoch {}", self.epoch);
        assert!(!self.is_ready, "shards are lost before others are ready");
        assert!(limits.max_running > 0 && limits.max_open_steps > 0, "nothing could run with {limits:?}");
        let least = limits.max_running * (1 + limits.max_drafts);
        assert!(limits.max_step_tokens >= least, "the youngest would starve: {limits:?}");
        (self.epoch, self.is_ready) = (epoch, true);
        if !(self.planted.has(Bug::KeepsCacheOnLoss) && self.limits == limits) {
            self.pool = BlockPool::new(limits.num_blocks, limits.block_size, self.planted);
        }
        self.free_rows = (0..2 * limits.max_running as u32).map(RowId).collect();
        self.too_few_blocks_for = None;
        let num_positions = limits.num_positions();
        self.limits = limits;
        let fits = |s: &Sequence| s.max_positions() <= num_positions || self.planted.has(Bug::KeepsWhatNoLongerFits);
        fail(&mut self.waiting, FinishReason::NoLongerFits, |s| !fits(s))
    }

    /// Queues a request. What can never be computed is refused here, and nothing else is.
    pub fn add(&mut self, request: Request) -> Result<SequenceId, Rejected> {
        let tokens = request.prompt.len().saturating_add(request.max_new_tokens);
        let limit = self.limits.num_positions();
        if self.epoch == 0 {
            return Err(Rejected::NotReady);
        }
        if request.prompt.is_empty() {
            return Err(Rejected::EmptyPrompt);
        }
        if request.max_new_tokens == 0 {
            return Err(Rejected::NothingToGenerate);
        }
        if tokens > limit {
            return Err(Rejected::TooLong { tokens, limit });
        }
        let id = SequenceId(self.num_added);
        self.num_added += 1;
        self.first_deadline = self.first_deadline.into_iter().chain(request.deadline).min();
        self.waiting.push_back(Sequence::new(id, request, self.planted));
        Ok(id)
    }

    /// Forgets a sequence; no more events follow for it. Unknown ids are ignored: the sequence may have finished while
    /// the caller decided.
    pub fn abort(&mut self, id: SequenceId) {
        if let Ok(i) = self.running_index(id) {
            let sequence = self.running.remove(i);
            self.retire(sequence);
        } else if let Some(i) = self.waiting_index(id) {
            self.waiting.remove(i);
        }
    }

    /// Ends the sequences that were never planned and whose deadline is before `now`.
    pub fn expire(&mut self, now: Millis) -> Vec<Event> {
        if self.first_deadline.is_none_or(|first| now <= first) {
            return vec![];
        }
        let expired = fail(&mut self.waiting, FinishReason::DeadlineExceeded, |s| s.is_overdue(now));
        let may_expire = self.waiting.iter().filter(|s| s.incarnation == 0);
        self.first_deadline = may_expire.filter_map(|s| s.deadline).min();
        expired
    }

    /// From now on, while at least twice as many sequences go on as have a prompt to be read, a step reads so many tokens of
    /// prompts, at least one, and up to twice as many while at least as many go on. However a prompt is cut, what follows it is
    /// the same.
    pub fn set_prompt_tokens(&mut self, prompt_tokens: usize) {
        self.prompt_tokens = prompt_tokens.max(1);
    }

    /// The next step, or `None` if there is nothing to compute before a result arrives. Every plan has to be sent, in
    /// order, and is answered by one result, also a plan without work.
    pub fn plan(&mut self) -> Option<StepPlan> {
        if !self.is_ready || self.open.len() >= self.limits.max_open_steps {
            return None;
        }
        let mut draft = Draft {
            plan: StepPlan { epoch: self.epoch, step: self.step + 1, release: vec![], admit: vec![], work: vec![] },
            open: Vec::with_capacity(self.running.len()),
            budget: self.limits.max_step_tokens,
            prompt_budget: self.prompt_budget(),
        };
        draft.plan.work.reserve(self.running.len());
        self.make_way_for_suspect();
        if self.continue_running(&mut draft) {
            self.admit_waiting(&mut draft);
        }
        let Draft { mut plan, open, .. } = draft;
        // A release alone is not worth a place in the pipeline while something is computed.
        if plan.work.is_empty() && (self.release.is_empty() || !self.open.is_empty()) {
            if self.planted.has(Bug::LosesRelease) {
                self.free_rows.extend(self.release.drain(..).map(|(row, _)| row));
            }
            return None;
        }
        plan.release.extend(self.release.drain(..).map(|(row, _)| row));
        self.free_rows.extend(&plan.release);
        self.step = plan.step;
        self.open.push_back(OpenStep { step: plan.step, rows: open });
        Some(plan)
    }

    /// Applies the result of the oldest open step. Results of shards that were lost are ignored, and rows of sequences
    /// that ended meanwhile. After an error the shards are not to be trusted: restart them and call `lose_shards`.
    pub fn commit(&mut self, result: &StepResult) -> Result<Vec<Event>, ShardFault> {
        let is_over = result.epoch < self.epoch || result.epoch == self.epoch && !self.is_ready;
        if is_over && !self.planted.has(Bug::AcceptsOlderEpoch) {
            return Ok(vec![]);
        }
        self.verify(result)?;
        let open = self.open.pop_front().expect("verified");
        let mut events = Vec::with_capacity(open.rows.len());
        for (work, (asked, row)) in open.rows.iter().zip(&result.rows).enumerate() {
            self.commit_row(work, asked, row, &mut events);
        }
        if events.iter().any(|event| matches!(event, Event::Finished { .. })) {
            self.remove_ended();
        }
        for (_, retired) in self.retired.extract_if(.., |_, retired| retired.last_step <= open.step) {
            self.pool.release(retired.blocks);
        }
        Ok(events)
    }

    /// The shards are gone, and with them all they had computed: what was running returns to the front of the queue,
    /// in order, with all it has emitted. Returns the end of a sequence that has killed the shards once too often.
    pub fn lose_shards(&mut self) -> Vec<Event> {
        self.is_ready = false;
        self.open.clear();
        if !self.planted.has(Bug::KeepsCacheOnLoss) {
            self.pool = BlockPool::new(self.limits.num_blocks, self.limits.block_size.max(1), self.planted);
        }
        for (_, retired) in std::mem::take(&mut self.retired) {
            self.give_back(retired.blocks);
        }
        self.release.clear();
        self.waiting.extend(std::mem::take(&mut self.running));
        for i in 0..self.waiting.len() {
            let blocks = std::mem::take(&mut self.waiting[i].blocks);
            self.give_back(blocks);
            self.waiting[i].lose_shards();
        }
        self.waiting.make_contiguous().sort_by_key(Sequence::precedence);
        fail(&mut self.waiting, FinishReason::KilledShards, Sequence::must_fail)
    }

    /// Whether nothing waits, runs, or is still to be told to the shards.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.open.is_empty() && self.release.is_empty()
    }

    /// Whether plans are made: shards are ready and were not lost since.
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Counts as of now, at no cost that grows.
    pub fn stats(&self) -> Stats {
        Stats {
            num_waiting: self.waiting.len(),
            num_running: self.running.len(),
            num_open_steps: self.open.len(),
            num_blocks: self.limits.num_blocks,
            num_free: self.pool.num_free() - self.pool.num_cached(),
            num_cached: self.pool.num_cached(),
            num_pinned: self.limits.num_blocks as usize - self.pool.num_free(),
            block_size: self.limits.block_size,
            epoch: self.epoch,
            step: self.step,
        }
    }

    // Committing.

    /// Whether the result answers the oldest open step. Nothing is applied before all of it is known to fit.
    fn verify(&self, result: &StepResult) -> Result<(), ShardFault> {
        let &StepResult { epoch, step, ref rows } = result;
        let open = self.open.front();
        if self.planted.has(Bug::AcceptsOlderEpoch)
            && epoch < self.epoch
            && open.is_some_and(|o| o.rows.len() == rows.len())
        {
            return Ok(());
        }
        if epoch != self.epoch || !self.is_ready {
            return Err(ShardFault::Epoch { found: epoch, expected: self.epoch });
        }
        let Some(open) = open.filter(|open| open.step == step) else {
            return Err(ShardFault::Step { found: step, expected: open.map(|open| open.step) });
        };
        if rows.len() != open.rows.len() {
            return Err(ShardFault::NumRows { step, found: rows.len(), expected: open.rows.len() });
        }
        open.rows.iter().zip(rows).try_for_each(|(asked, row)| self.verify_row(step, asked, row))
    }

    fn verify_row(&self, step: u64, asked: &OpenRow, row: &RowResult) -> Result<(), ShardFault> {
        let &OpenRow { row: expected_row, incarnation, extent, .. } = asked;
        let is_same = row.incarnation == incarnation || self.planted.has(Bug::IgnoresIncarnation);
        if row.row != expected_row || !is_same {
            let (found, expected) = ((row.row, row.incarnation), (expected_row, incarnation));
            return Err(ShardFault::Row { step, found, expected });
        }
        let Ok(tokens) = &row.tokens else { return Ok(()) };
        let is_possible = (extent.min_new()..=extent.max_new()).contains(&tokens.len());
        if !is_possible && !self.planted.has(Bug::IgnoresNumTokens) {
            return Err(ShardFault::NumTokens { step, row: row.row, found: tokens.len(), extent });
        }
        let num_computed = match self.find_running(asked) {
            Some(i) => Some(self.running[i].num_computed),
            None => self.retired.get(&asked.id).and_then(|retired| retired.num_computed),
        };
        let expected = num_computed.map(|n| n + extent.num_known() + tokens.len().saturating_sub(1));
        match expected.filter(|expected| *expected != row.computed) {
            Some(expected) if !self.planted.has(Bug::IgnoresComputed) => {
                Err(ShardFault::Computed { step, row: row.row, found: row.computed, expected })
            }
            _ => Ok(()),
        }
    }

    /// Applies one row. A sequence that it ends is marked, and removed when all rows have been applied.
    fn commit_row(&mut self, work: usize, asked: &OpenRow, row: &RowResult, events: &mut Vec<Event>) {
        let running = self.find_running(asked);
        match (running, self.retired.get_mut(&asked.id), &row.tokens) {
            (Some(i), _, Ok(_)) => self.running[i].num_computed = row.computed,
            (Some(i), _, Err(RowError)) => self.withdraw(i),
            (None, Some(retired), Ok(_)) => {
                retired.num_computed = retired.num_computed.map(|_| row.computed);
            }
            (None, Some(retired), Err(RowError)) => {
                retired.num_computed = None;
                if !self.planted.has(Bug::KeepsBlocksOfFailedRow) {
                    self.pool.withdraw(&retired.blocks);
                }
            }
            (None, None, _) => unreachable!("{:?} has an open row and neither runs nor is retired", asked.id),
        }
        let sequence = match running {
            Some(i) => &mut self.running[i],
            None => match self.waiting_index(asked.id) {
                Some(i) => &mut self.waiting[i], // preempted; what the row computed is gone, what it sampled is not
                None => return,                  // ended
            },
        };
        sequence.close(asked.extent);
        let reason = match &row.tokens {
            Ok(tokens) => sequence.extend(work, tokens, &self.limits.eos, events),
            Err(RowError) => Some(FinishReason::RowError),
        };
        let is_finite = asked.extent.samples && row.tokens.is_ok();
        if running.is_some() && (is_finite || row.tokens.is_ok() && self.planted.has(Bug::PublishesWithoutSample)) {
            // An id that ended the sequence, or came after it, may have been computed; nobody needs its block.
            let mut num_computed = sequence.num_computed.min(sequence.token_ids.len() - 1);
            if self.planted.has(Bug::PublishesUncommitted) {
                num_computed = sequence.token_ids.len().min(sequence.blocks.ids.len() * self.limits.block_size);
            }
            let token_ids = &sequence.token_ids[..num_computed];
            self.pool.publish(&mut sequence.blocks, token_ids, sequence.namespace);
        }
        if let Some(reason) = reason {
            sequence.has_ended = true;
            events.push(Event::Finished { id: sequence.id, reason });
        }
    }

    fn withdraw(&mut self, i: usize) {
        if !self.planted.has(Bug::KeepsBlocksOfFailedRow) {
            self.pool.withdraw(&self.running[i].blocks);
        }
    }

    fn remove_ended(&mut self) {
        let ended: Vec<_> = self.running.extract_if(.., |s| s.has_ended).collect();
        for sequence in ended {
            self.retire(sequence);
        }
        self.waiting.retain(|s| !s.has_ended);
    }

    /// Under the planted bug that keeps the cache, its blocks have to be free at least.
    fn give_back(&mut self, blocks: BlockTable) {
        if self.planted.has(Bug::KeepsCacheOnLoss) {
            self.pool.release(blocks);
        }
    }

    // Finding.

    fn find_running(&self, asked: &OpenRow) -> Option<usize> {
        if self.running.get(asked.index).is_some_and(|s| s.id == asked.id) {
            return Some(asked.index);
        }
        self.running_index(asked.id).ok()
    }

    fn running_index(&self, id: SequenceId) -> Result<usize, usize> {
        self.running.binary_search_by_key(&id, |s| s.id)
    }

    fn waiting_index(&self, id: SequenceId) -> Option<usize> {
        let find = |is_innocent| self.waiting.binary_search_by_key(&(is_innocent, id), Sequence::precedence).ok();
        find(true).or_else(|| find(false))
    }

    // Checking.

    /// Panics if the bookkeeping contradicts itself. For tests, and for debug builds after every call.
    pub fn check(&self) {
        let block_size = self.limits.block_size.max(1);
        let running = self.running.iter().map(|s| (&s.blocks, s.num_computed / block_size));
        let retired = self.retired.values().map(|r| (&r.blocks, r.num_computed.map_or(usize::MAX, |n| n / block_size)));
        self.pool.check(running.chain(retired));
        assert!(self.running.len() <= self.limits.max_running && self.open.len() <= self.limits.max_open_steps);
        assert!(self.running.is_sorted_by_key(|s| s.id), "elders come first");
        assert!(self.waiting.iter().is_sorted_by_key(|s| s.precedence()), "the queue is in order");
        assert!(self.running.len() <= 1 || !self.running.iter().any(Sequence::is_suspect), "a suspect runs alone");
        assert!(self.running.iter().all(|s| s.row.is_some()) && self.waiting.iter().all(|s| s.row.is_none()));
        self.check_rows();
        for sequence in self.running.iter().chain(&self.waiting) {
            sequence.check(block_size);
            let rows = self.open.iter().flat_map(|open| &open.rows).filter(|row| row.id == sequence.id);
            assert_eq!(sequence.in_flight.num_rows, rows.count(), "{:?} has that many rows in flight", sequence.id);
        }
        let first_open = self.open.front().map_or(u64::MAX, |open| open.step);
        assert!(self.retired.values().all(|r| r.last_step >= first_open), "retired blocks wait for open steps only");
    }

    /// Every row is free, held by one running sequence, or about to be released.
    fn check_rows(&self) {
        let held = self.running.iter().filter_map(|s| s.row).chain(self.release.iter().map(|(row, _)| *row));
        let mut rows: Vec<_> = held.chain(self.free_rows.iter().copied()).collect();
        rows.sort_unstable();
        let is_whole = rows.into_iter().eq((0..2 * self.limits.max_running as u32).map(RowId));
        assert!(is_whole || !self.is_ready, "every row is in one place");
    }
}

/// Ends the waiting sequences that are lost.
fn fail(waiting: &mut VecDeque<Sequence>, reason: FinishReason, is_lost: impl Fn(&Sequence) -> bool) -> Vec<Event> {
    let lost = waiting.iter().filter(|s| is_lost(s)).map(|s| Event::Finished { id: s.id, reason }).collect();
    waiting.retain(|s| !is_lost(s));
    lost
}
