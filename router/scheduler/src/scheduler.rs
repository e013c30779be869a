//! Continuous batching: every step continues all running sequences, then spends what is left of the token budget on
//! prompts, in order of arrival, splitting the last one if it does not fit.
//!
//! Steps are planned ahead of the results of those before them. Until a step is committed it is counted with the most
//! that it may do; blocks that an open step may touch stay with the sequence, or `retired` if it has ended.

use std::collections::VecDeque;

use crate::blocks::{BlockId, BlockPool, BlockTable, ContentId};
use crate::planted::{Planted, planted};
use crate::rows::{RowId, Rows};
use crate::sequence::{FinishReason, Millis, Request, SUSPECT_DEATHS, Sequence, SequenceId, TokenId};
use crate::step::{
    Admission, Event, Extent, OpenRow, OpenStep, RowError, RowResult, ShardFault, StepPlan, StepResult, Work,
};

/// What the shards can do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Input tokens of one step, over all sequences, drafts included. At least one row's worth for each that may run.
    pub max_step_tokens: usize,
    /// Sequences that hold a row.
    pub max_running: usize,
    /// Steps sent before the result of the first of them is known.
    pub max_open_steps: usize,
    /// Ids that a row may guess and verify in a step.
    pub max_drafts: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Blocks of the cache.
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
    /// There were no shards yet, so no limits are known.
    NotReady,
    /// A sequence needs something to begin with.
    EmptyPrompt,
    /// `max_new_tokens` is zero.
    NothingToGenerate,
    /// The prompt plus `max_new_tokens` can never fit in the cache.
    TooLong {
        /// Prompt and new ones.
        tokens: usize,
        /// Positions of the whole cache.
        limit: usize,
    },
}

/// What an operator wants to see. Blocks: free + cached + pinned = all.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Sequences without a row.
    pub num_waiting: usize,
    /// Sequences with a row.
    pub num_running: usize,
    /// Steps without a result.
    pub num_open_steps: usize,
    /// Blocks of the cache.
    pub num_blocks: u32,
    /// Blocks that hold nothing of use.
    pub num_free: usize,
    /// Blocks that nobody holds and that can be hit.
    pub num_cached: usize,
    /// Blocks held by a sequence or an open step.
    pub num_pinned: usize,
    /// Positions per block.
    pub block_size: usize,
    /// The current epoch.
    pub epoch: u64,
    /// Plans made.
    pub step: u64,
}

/// The state machine; see the crate's documentation.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    epoch: u64,
    /// The last step planned.
    step: u64,
    /// Whether the shards of this epoch take plans.
    is_ready: bool,
    pool: BlockPool,
    rows: Rows,
    /// In order of precedence; what returns goes before what never ran.
    waiting: VecDeque<Sequence>,
    /// In order of arrival; the last is preempted first.
    running: Vec<Sequence>,
    /// Sent and not answered, oldest first.
    open: VecDeque<OpenStep>,
    /// What ended or preempted sequences leave behind until the last of their rows is committed.
    retired: Vec<Retired>,
    /// What the shards can forget with the next plan.
    release: Vec<(RowId, SequenceId)>,
    num_added: u64,
    planted: Planted,
}

/// The blocks of an incarnation that is over, while an open step may still touch them.
#[derive(Debug)]
struct Retired {
    id: SequenceId,
    last_step: u64,
    blocks: BlockTable,
    /// To be withdrawn if one of its open rows fails after all.
    published: Vec<(BlockId, ContentId)>,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self::new()
    }
}

impl Scheduler {
    /// A scheduler without shards: until `shards_ready`, nothing is queued or planned.
    pub fn new() -> Self {
        let limits = Limits {
            max_step_tokens: 1,
            max_running: 1,
            max_open_steps: 1,
            max_drafts: 0,
            block_size: 1,
            num_blocks: 0,
            eos: vec![],
        };
        let planted = Planted::default();
        Self {
            epoch: 0,
            step: 0,
            is_ready: false,
            pool: BlockPool::new(0, 1, planted),
            rows: Rows::default(),
            limits,
            waiting: VecDeque::new(),
            running: vec![],
            open: VecDeque::new(),
            retired: vec![],
            release: vec![],
            num_added: 0,
            planted,
        }
    }

    /// Makes the scheduler wrong in one way, so that a test can show that it is found.
    #[cfg(feature = "planted-bugs")]
    pub fn plant(&mut self, bug: crate::Bug) {
        self.planted.bug = Some(bug);
    }

    /// Queues a request. What can never be computed is refused here, and nothing else is.
    pub fn add(&mut self, request: Request) -> Result<SequenceId, Rejected> {
        let tokens = request.prompt.len().saturating_add(request.max_new_tokens);
        if self.epoch == 0 {
            return Err(Rejected::NotReady);
        }
        if request.prompt.is_empty() {
            return Err(Rejected::EmptyPrompt);
        }
        if request.max_new_tokens == 0 {
            return Err(Rejected::NothingToGenerate);
        }
        if tokens > self.limits.num_positions() {
            return Err(Rejected::TooLong { tokens, limit: self.limits.num_positions() });
        }
        let id = SequenceId(self.num_added);
        self.num_added += 1;
        self.waiting.push_back(Sequence::new(id, request));
        Ok(id)
    }

    /// Forgets a sequence; no more events follow for it. Unknown ids are ignored: the sequence may have finished while
    /// the caller decided.
    pub fn abort(&mut self, id: SequenceId) {
        if let Ok(i) = self.running_index(id) {
            let mut sequence = self.running.remove(i);
            self.retire(&mut sequence);
        } else {
            self.waiting.retain(|s| s.id != id);
        }
    }

    /// Ends the sequences that still wait for their first admission although their deadline has come.
    pub fn expire(&mut self, now: Millis) -> Vec<Event> {
        let is_late = |s: &Sequence| s.incarnation == 0 && s.deadline.is_some_and(|deadline| deadline <= now);
        self.fail(FinishReason::DeadlineExceeded, is_late)
    }

    /// The next step, or `None` if there is nothing to compute before a result arrives. Every plan has to be sent, in
    /// order, and is answered by one result, also a plan without rows.
    pub fn plan(&mut self) -> Option<StepPlan> {
        if !self.is_ready || self.open.len() == self.limits.max_open_steps {
            return None;
        }
        let (epoch, step) = (self.epoch, self.step + 1);
        let mut plan = StepPlan { epoch, step, release: vec![], admit: vec![], work: vec![] };
        let mut budget = self.limits.max_step_tokens;
        self.make_way_for_suspect();
        if self.continue_running(&mut plan, &mut budget) {
            self.admit_waiting(&mut plan, &mut budget);
        }
        // A release alone is not worth a place in the pipeline while something is computed.
        if plan.work.is_empty() && (self.release.is_empty() || !self.open.is_empty()) {
            return None;
        }
        for (row, _) in self.release.drain(..) {
            plan.release.push(row);
            if !planted!(self.planted, ReusesRowEarly) {
                self.rows.put_back(row);
            }
        }
        self.step = step;
        let open =
            |work: &Work| OpenRow { row: work.row, id: work.id, incarnation: work.incarnation, extent: work.extent };
        self.open.push_back(OpenStep { step, rows: plan.work.iter().map(open).collect() });
        Some(plan)
    }

    /// Applies the result of the oldest open step. Results of an older epoch are ignored, and rows of sequences that
    /// ended meanwhile. After an error the shards are not to be trusted: restart them and call `lose_shards`.
    pub fn commit(&mut self, result: &StepResult) -> Result<Vec<Event>, ShardFault> {
        let mut events = vec![];
        let is_late = result.epoch < self.epoch || !self.is_ready;
        if is_late && !planted!(self.planted, AcceptsOldEpoch) {
            return Ok(events);
        }
        if !self.open.front().is_some_and(|open| self.is_answered(open, result)) {
            return Err(ShardFault);
        }
        let open = self.open.pop_front().expect("looked at above");
        events.reserve(open.rows.len());
        for (work, (asked, row)) in open.rows.iter().zip(&result.rows).enumerate() {
            self.commit_row(asked, work, &row.tokens, &mut events);
        }
        for retired in self.retired.extract_if(.., |retired| retired.last_step <= open.step) {
            self.pool.release(retired.blocks);
        }
        Ok(events)
    }

    /// Whether the result answers all that was asked, and nothing else.
    fn is_answered(&self, open: &OpenStep, result: &StepResult) -> bool {
        result.epoch == self.epoch
            && open.step == result.step
            && open.rows.len() == result.rows.len()
            && open
                .rows
                .iter()
                .zip(&result.rows)
                .all(|(asked, row)| asked.is_answered_by(row) && self.has_computed_what_it_says(asked, row))
    }

    fn has_computed_what_it_says(&self, asked: &OpenRow, row: &RowResult) -> bool {
        let (Ok(i), Ok(tokens)) = (self.running_index(asked.id), &row.tokens) else { return true };
        let sequence = &self.running[i];
        !sequence.holds(asked) || row.computed == sequence.num_computed + asked.num_computed(tokens)
    }

    /// The shards are gone, and with them all they had computed: what was running returns to the front of the queue,
    /// in order, with all it has emitted. Returns the end of a sequence that has killed the shards once too often.
    pub fn lose_shards(&mut self) -> Vec<Event> {
        self.is_ready = false;
        self.open.clear();
        self.retired.clear();
        self.release.clear();
        self.rows = Rows::default();
        if !planted!(self.planted, KeepsPoolOnLoss) {
            self.pool = BlockPool::new(self.limits.num_blocks, self.limits.block_size, self.planted);
        }
        self.waiting.extend(self.running.drain(..));
        self.waiting.iter_mut().for_each(Sequence::lose_shards);
        self.waiting.make_contiguous().sort_by_key(Sequence::precedence);
        let tolerated = if planted!(self.planted, FailsInnocent) { SUSPECT_DEATHS - 1 } else { SUSPECT_DEATHS };
        self.fail(FinishReason::KilledShards, |s| s.must_fail(tolerated))
    }

    /// New shards, empty, take plans of this epoch, which is higher than any before; step numbers go on. They may have
    /// another number of blocks than those before; returns the end of the sequences that no longer fit.
    pub fn shards_ready(&mut self, epoch: u64, limits: Limits) -> Vec<Event> {
        assert!(!self.is_ready && epoch > self.epoch, "shards are lost before others are ready");
        assert!(limits.max_running > 0 && limits.max_open_steps > 0);
        assert!(limits.max_step_tokens >= limits.max_running * (1 + limits.max_drafts), "or the youngest starve");
        self.epoch = epoch;
        self.is_ready = true;
        if !planted!(self.planted, KeepsPoolOnLoss) || self.pool.num_blocks() != limits.num_blocks as usize {
            self.pool = BlockPool::new(limits.num_blocks, limits.block_size, self.planted);
        }
        self.limits = limits;
        let num_positions = self.limits.num_positions();
        self.fail(FinishReason::NoLongerFits, |s| s.max_positions() > num_positions)
    }

    /// Whether nothing is queued, running, open or to be released.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.open.is_empty() && self.release.is_empty()
    }

    /// What an operator wants to see.
    pub fn stats(&self) -> Stats {
        let (num_free, num_cached) = (self.pool.num_free(), self.pool.num_cached());
        Stats {
            num_waiting: self.waiting.len(),
            num_running: self.running.len(),
            num_open_steps: self.open.len(),
            num_blocks: self.limits.num_blocks,
            num_free: num_free - num_cached,
            num_cached,
            num_pinned: self.pool.num_blocks() - num_free,
            block_size: self.limits.block_size,
            epoch: self.epoch,
            step: self.step,
        }
    }

    /// A suspect runs alone. Those found innocent before it step back behind it; their blocks stay cached.
    fn make_way_for_suspect(&mut self) {
        let suspect_waits =
            self.waiting.front().is_some_and(Sequence::is_suspect) && !planted!(self.planted, SuspectHasCompany);
        while suspect_waits && !self.running.iter().any(Sequence::is_suspect) && !self.running.is_empty() {
            self.preempt_newest();
        }
    }

    /// Returns whether there were blocks for all. Once somebody must wait for blocks, nobody younger may take any.
    fn continue_running(&mut self, plan: &mut StepPlan, budget: &mut usize) -> bool {
        let (mut i, mut may_grow) = (0, true);
        while i < self.running.len() && *budget > 0 {
            if let Some(extent) = self.running[i].next_extent(*budget, self.limits.max_drafts) {
                let num_missing = self.running[i].num_missing_blocks(extent, self.limits.block_size);
                let forgets = planted!(self.planted, ForgetsElder);
                may_grow = (may_grow || forgets) && self.make_room(i, num_missing);
                if may_grow || num_missing == 0 && i < self.running.len() {
                    let num_sent = self.running[i].blocks.ids.len();
                    self.push_work(i, num_sent, extent, plan, budget);
                }
            }
            i += 1;
        }
        may_grow
    }

    /// Whether `running[i]` may take so many blocks now. Preempts the newest, at last itself, as long as there will be
    /// too few; what open steps hold back is worth waiting for.
    fn make_room(&mut self, i: usize, num_missing: usize) -> bool {
        while num_missing > self.pool.num_free() + self.num_retired_blocks() && i < self.running.len() {
            self.preempt_newest();
        }
        num_missing <= self.pool.num_free() && i < self.running.len()
    }

    fn admit_waiting(&mut self, plan: &mut StepPlan, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.limits.max_running && self.may_admit_next() {
            let mut sequence = self.waiting.pop_front().expect("may_admit_next has seen it");
            let mut reusable = sequence.reusable_ids();
            if planted!(self.planted, HitsDespiteLogprobs) {
                reusable = &sequence.token_ids[..sequence.token_ids.len() - 1];
            }
            sequence.blocks = self.pool.acquire_prefix(reusable, sequence.namespace);
            sequence.num_computed = sequence.blocks.ids.len() * self.limits.block_size;
            let extent = sequence.next_extent(*budget, self.limits.max_drafts).expect("nothing of it is in flight");
            if sequence.num_missing_blocks(extent, self.limits.block_size) > self.pool.num_free() {
                self.pool.release(sequence.take_blocks());
                self.waiting.push_front(sequence);
                return;
            }
            let row = self.rows.take();
            sequence.row = Some(row);
            sequence.incarnation += 1;
            sequence.published.clear();
            plan.admit.push(Admission {
                row,
                id: sequence.id,
                incarnation: sequence.incarnation,
                token_ids: sequence.token_ids.clone(),
                num_prompt: sequence.num_prompt,
                num_cached: sequence.num_computed,
            });
            let i = self.running.partition_point(|s| s.id < sequence.id);
            self.running.insert(i, sequence);
            self.push_work(i, 0, extent, plan, budget);
        }
    }

    fn may_admit_next(&self) -> bool {
        let Some(next) = self.waiting.front() else { return false };
        // After a preemption: its log is complete, and its release goes out with a plan before.
        let is_released = !self.release.iter().any(|(_, id)| *id == next.id);
        let is_settled = is_released && (next.in_flight.num_rows == 0 || planted!(self.planted, AdmitsWithOpenRows));
        let is_alone = self.running.is_empty() && self.open.is_empty();
        let may_have_company = !next.is_suspect() && !self.running.iter().any(Sequence::is_suspect)
            || planted!(self.planted, SuspectHasCompany);
        is_settled && (is_alone || may_have_company)
    }

    /// Adds work for `running[i]`, for which there are blocks. The shards know the first `num_sent` of its blocks.
    fn push_work(&mut self, i: usize, num_sent: usize, extent: Extent, plan: &mut StepPlan, budget: &mut usize) {
        let sequence = &mut self.running[i];
        let num_missing = sequence.num_missing_blocks(extent, self.limits.block_size);
        self.pool.grow(&mut sequence.blocks, num_missing);
        sequence.open(plan.step, extent);
        *budget -= extent.num_tokens;
        if planted!(self.planted, PublishesEarly) {
            let Sequence { blocks, token_ids, num_computed, namespace, .. } = sequence;
            let most = (*num_computed + extent.num_known()).min(token_ids.len());
            self.pool.publish(blocks, token_ids, most, *namespace);
        }
        plan.work.push(Work {
            row: sequence.row.expect("what runs has a row"),
            id: sequence.id,
            incarnation: sequence.incarnation,
            extent,
            new_blocks: sequence.blocks.ids[num_sent..].to_vec(),
        });
    }

    fn commit_row(
        &mut self,
        asked: &OpenRow,
        work: usize,
        tokens: &Result<Vec<TokenId>, RowError>,
        events: &mut Vec<Event>,
    ) {
        let id = asked.id;
        if tokens.is_err() && !planted!(self.planted, KeepsFailedBlocks) {
            self.withdraw(id);
        }
        let sequence = match self.running_index_near(work, id) {
            Ok(i) => Some(&mut self.running[i]),
            Err(_) => self.waiting.iter_mut().find(|s| s.id == id), // preempted
        };
        let Some(sequence) = sequence else { return };
        sequence.close(asked.extent);
        let mut reason = match tokens {
            Ok(tokens) => sequence.extend(asked, work, tokens, &self.limits.eos, events),
            Err(RowError) => Some(FinishReason::RowError),
        };
        // What a prompt chunk computed is shared only once a finite sample has attended to it.
        if tokens.is_ok() && (asked.extent.samples || planted!(self.planted, PublishesUnsampled)) {
            let Sequence { blocks, token_ids, num_computed, namespace, published, .. } = sequence;
            published.extend(self.pool.publish(blocks, token_ids, *num_computed, *namespace));
        }
        if planted!(self.planted, EmitsAfterEnd) && reason == Some(FinishReason::EndOfSequence) {
            reason = None;
        }
        if planted!(self.planted, EndsEarly) && sequence.token_ids.len() + 1 == sequence.max_positions() {
            reason = reason.or(Some(FinishReason::Length));
        }
        if let Some(reason) = reason {
            events.push(Event::Finished { id, reason });
            self.abort(id);
        }
    }

    /// What the incarnation of a failed row has published is not to be trusted, whether or not it has ended meanwhile.
    fn withdraw(&mut self, id: SequenceId) {
        if let Ok(i) = self.running_index(id) {
            self.pool.withdraw(&self.running[i].published);
        }
        for retired in self.retired.iter().filter(|retired| retired.id == id) {
            self.pool.withdraw(&retired.published);
        }
    }

    fn preempt_newest(&mut self) {
        let mut sequence = self.running.pop().expect("only called while something runs");
        self.retire(&mut sequence);
        self.requeue(sequence);
    }

    /// The shards may forget an admitted sequence; its blocks are freed once no open step can touch them.
    fn retire(&mut self, sequence: &mut Sequence) {
        let row = sequence.row.expect("what runs has a row");
        self.release.push((row, sequence.id));
        if planted!(self.planted, ReusesRowEarly) {
            self.rows.put_back(row);
        }
        let blocks = sequence.take_blocks();
        match sequence.in_flight.num_rows {
            0 => self.pool.release(blocks),
            _ if planted!(self.planted, FreesOpenBlocks) => self.pool.release(blocks),
            _ => self.retired.push(Retired {
                id: sequence.id,
                last_step: sequence.in_flight.last_step,
                blocks,
                published: std::mem::take(&mut sequence.published),
            }),
        }
    }

    fn requeue(&mut self, sequence: Sequence) {
        let i = self.waiting.partition_point(|s| s.precedence() < sequence.precedence());
        self.waiting.insert(i, sequence);
    }

    /// Ends the waiting sequences that `is_lost`.
    fn fail(&mut self, reason: FinishReason, is_lost: impl Fn(&Sequence) -> bool) -> Vec<Event> {
        let lost = self.waiting.iter().filter(|s| is_lost(s)).map(|s| Event::Finished { id: s.id, reason }).collect();
        self.waiting.retain(|s| !is_lost(s));
        lost
    }

    fn running_index(&self, id: SequenceId) -> Result<usize, usize> {
        self.running.binary_search_by_key(&id, |s| s.id)
    }

    /// Like `running_index`. Most steps have work for all that runs, in the same order, so a look at `guess` is enough.
    fn running_index_near(&self, guess: usize, id: SequenceId) -> Result<usize, usize> {
        if self.running.get(guess).is_some_and(|s| s.id == id) { Ok(guess) } else { self.running_index(id) }
    }

    fn num_retired_blocks(&self) -> usize {
        self.retired.iter().map(|retired| retired.blocks.ids.len()).sum()
    }

    /// Panics if the bookkeeping contradicts itself. For tests, and for debug builds after every call.
    pub fn check(&self) {
        let tables = self.running.iter().map(|s| &s.blocks).chain(self.retired.iter().map(|retired| &retired.blocks));
        self.pool.check(tables);
        assert!(self.running.len() <= self.limits.max_running && self.open.len() <= self.limits.max_open_steps);
        assert!(self.running.is_sorted_by_key(|s| s.id) && self.waiting.iter().is_sorted_by_key(|s| s.precedence()));
        assert!(self.running.len() <= 1 || !self.running.iter().any(Sequence::is_suspect));
        assert!(self.running.iter().all(|s| s.row.is_some()) && self.waiting.iter().all(|s| s.row.is_none()));
        let num_releasing = if planted!(self.planted, ReusesRowEarly) { 0 } else { self.release.len() };
        assert_eq!(self.rows.num_taken(), self.running.len() + num_releasing);
        assert!(self.rows.num_taken() <= 2 * self.limits.max_running);
        for sequence in self.running.iter().chain(&self.waiting) {
            sequence.check(self.limits.block_size);
            let rows = self.open.iter().flat_map(|open| &open.rows).filter(|row| row.id == sequence.id);
            assert_eq!(sequence.in_flight.num_rows, rows.count(), "{:?}", sequence.id);
        }
        let first_open = self.open.front().map_or(u64::MAX, |open| open.step);
        assert!(self.retired.iter().all(|retired| retired.last_step >= first_open));
    }
}
