//! One request's id log, how far it is computed, and what open steps may still add to it.

use crate::blocks::{BlockTable, Namespace};
use crate::planted::{Bug, Planted};
use crate::step::{Event, Extent, RowId};

/// An id of the model's vocabulary.
pub type TokenId = u32;

/// Given out by the scheduler in order of arrival, so ids compare by age.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SequenceId(pub u64);

/// A time on the caller's clock.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Millis(pub u64);

/// What is to be generated.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Request {
    /// At least one id.
    pub prompt: Vec<TokenId>,
    /// At least one.
    pub max_new_tokens: usize,
    /// Whose cached prefixes it may use.
    pub namespace: Namespace,
    /// The latest moment to be first planned, compared only by [`expire`](crate::Scheduler::expire). Once it has been
    /// planned it has no deadline.
    pub deadline: Option<Millis>,
    /// Goes on after an end-of-sequence id. Benchmarks need a known length.
    pub ignore_eos: bool,
    /// Every prompt position must be computed before the first new id, so none is taken from the cache until then.
    pub wants_prompt_logprobs: bool,
}

/// Why a sequence ends.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum FinishReason {
    /// `max_new_tokens` were generated.
    Length,
    /// The model produced an end-of-sequence id.
    EndOfSequence,
    /// The shard answered a row of this sequence with an error.
    RowError,
    /// Three deaths of the shards while computing this sequence, the last one alone.
    KilledShards,
    /// The shards came back with fewer blocks than this sequence needs.
    NoLongerFits,
    /// It was not planned before its deadline.
    DeadlineExceeded,
}

/// The bounds of what the rows in open steps will do to a sequence.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct InFlight {
    pub num_rows: usize,
    /// The last step that may read or write the sequence's blocks.
    pub last_step: u64,
    /// The most positions that may be computed.
    pub num_tokens: usize,
    pub min_new: usize,
    pub max_new: usize,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: SequenceId,
    pub namespace: Namespace,
    /// Prompt, then emitted ids: the log from which everything else can be rebuilt.
    pub token_ids: Vec<TokenId>,
    pub num_prompt: usize,
    max_new_tokens: usize,
    pub deadline: Option<Millis>,
    ignores_eos: bool,
    wants_prompt_logprobs: bool,
    /// Counts admissions; zero for a sequence that was never planned.
    pub incarnation: u32,
    /// Where the shards hold it; `None` for a sequence that waits.
    pub row: Option<RowId>,
    /// Positions of this incarnation whose keys and values are in `blocks`, by committed steps alone.
    pub num_computed: usize,
    pub blocks: BlockTable,
    pub in_flight: InFlight,
    /// Set by the commit that ends it, which then removes it.
    pub has_ended: bool,
    /// Deaths of the shards while computing this sequence, since it was last proven harmless.
    num_deaths: usize,
    /// The first position that was in flight at one of these deaths.
    unproven_from: usize,
    /// The length of the log once all that was in flight at these deaths has been computed again.
    proven_at: usize,
    planted: Planted,
}

/// Deaths after which a sequence runs alone; one more and it fails.
const SUSPECT_DEATHS: usize = 2;

impl Sequence {
    pub fn new(id: SequenceId, request: Request, planted: Planted) -> Self {
        Self {
            id,
            namespace: request.namespace,
            num_prompt: request.prompt.len(),
            token_ids: request.prompt,
            max_new_tokens: request.max_new_tokens,
            deadline: request.deadline,
            ignores_eos: request.ignore_eos,
            wants_prompt_logprobs: request.wants_prompt_logprobs,
            incarnation: 0,
            row: None,
            num_computed: 0,
            blocks: BlockTable::default(),
            in_flight: InFlight::default(),
            has_ended: false,
            num_deaths: 0,
            unproven_from: usize::MAX,
            proven_at: 0,
            planted,
        }
    }

    /// Positions that may ever be computed, wasted rows included.
    pub fn max_positions(&self) -> usize {
        self.num_prompt + self.max_new_tokens
    }

    /// Whether it was never planned and should have been before `now`.
    pub fn is_overdue(&self, now: Millis) -> bool {
        let may_expire = self.incarnation == 0 || self.planted.has(Bug::ExpiresAdmitted);
        may_expire && self.deadline.is_some_and(|deadline| deadline < now)
    }

    /// Whether it may have killed the shards, so that it must run alone.
    pub fn is_suspect(&self) -> bool {
        self.num_deaths >= SUSPECT_DEATHS
    }

    pub fn must_fail(&self) -> bool {
        self.num_deaths > SUSPECT_DEATHS && !self.planted.has(Bug::NeverFailsKiller)
    }

    /// The order of the queue: suspects first, then by arrival.
    pub fn precedence(&self) -> (bool, SequenceId) {
        (!self.is_suspect(), self.id)
    }

    /// The farthest the next row may go. `None` if the shortest outcome of the open steps ends the sequence, or if after
    /// the longest one the row would touch a position beyond `max_positions`.
    pub fn next_extent(&self, budget: usize, max_drafts: usize) -> Option<Extent> {
        let missing = self.max_positions() - self.token_ids.len();
        let must_end = missing <= self.in_flight.min_new && !self.planted.has(Bug::PlansCertainlyDeadRow);
        if must_end || missing < self.in_flight.max_new {
            return None;
        }
        let known = match self.in_flight.min_new {
            0 => self.token_ids.len() - self.num_computed - self.in_flight.num_tokens,
            _ => 1, // the last id that the open steps will sample, whatever it is
        };
        let num_known = known.min(budget);
        let samples = num_known == known;
        let useful_drafts = missing.saturating_sub(self.in_flight.max_new + 1);
        let num_drafts = if samples { max_drafts.min(useful_drafts).min(budget - num_known) } else { 0 };
        Some(Extent { num_tokens: num_known + num_drafts, num_drafts, samples })
    }

    /// Whether more than its last id is to be computed before it yields another: a prompt, or a log that is read again.
    pub fn has_prompt(&self) -> bool {
        self.in_flight.min_new == 0 && self.token_ids.len() - self.num_computed - self.in_flight.num_tokens > 1
    }

    /// Blocks that must be added before a row of this extent may run.
    pub fn num_missing_blocks(&self, extent: Extent, block_size: usize) -> usize {
        let num_open = if self.planted.has(Bug::ForgetsOpenTokens) { 0 } else { self.in_flight.num_tokens };
        let most = self.num_computed + num_open + extent.num_tokens;
        most.div_ceil(block_size).saturating_sub(self.blocks.ids.len())
    }

    /// Counts a row that is sent.
    pub fn open(&mut self, step: u64, extent: Extent) {
        let open = &mut self.in_flight;
        open.num_rows += 1;
        open.last_step = step;
        open.num_tokens += extent.num_tokens;
        open.min_new += extent.min_new();
        open.max_new += extent.max_new();
    }

    /// Counts a row that is answered.
    pub fn close(&mut self, extent: Extent) {
        let open = &mut self.in_flight;
        open.num_rows -= 1;
        open.num_tokens -= extent.num_tokens;
        open.min_new -= extent.min_new();
        open.max_new -= extent.max_new();
    }

    /// Appends what the result's row `work` yielded, up to the first id that ends the sequence.
    pub fn extend(
        &mut self,
        work: usize,
        tokens: &[TokenId],
        eos: &[TokenId],
        events: &mut Vec<Event>,
    ) -> Option<FinishReason> {
        let limit = self.max_positions() + usize::from(self.planted.has(Bug::CountsLengthOffByOne));
        let mut reason = None;
        for (index, &token) in tokens.iter().enumerate() {
            self.token_ids.push(token);
            events.push(Event::Token { id: self.id, token, work, index });
            reason = if !self.ignores_eos && eos.contains(&token) {
                Some(FinishReason::EndOfSequence)
            } else {
                (self.token_ids.len() == limit).then_some(FinishReason::Length)
            };
            if reason.is_some() && !self.planted.has(Bug::EmitsAfterEnd) {
                break;
            }
        }
        let is_proven = self.token_ids.len() >= self.proven_at;
        if is_proven || self.planted.has(Bug::ClearsSuspicionEarly) && !tokens.is_empty() {
            (self.num_deaths, self.unproven_from) = (0, usize::MAX);
        }
        reason
    }

    /// Back to what can be admitted from scratch. The caller takes care of row and blocks.
    pub fn take_blocks(&mut self) -> BlockTable {
        self.num_computed = 0;
        self.row = None;
        std::mem::take(&mut self.blocks)
    }

    /// The shards died. Whoever was being computed may be the cause, until it has computed again all that was in
    /// flight: a death that it causes at one place strikes again before that.
    pub fn lose_shards(&mut self) {
        let open = std::mem::take(&mut self.in_flight);
        if open.num_rows > 0 {
            self.num_deaths += 1;
            self.unproven_from = self.unproven_from.min(self.num_computed);
            self.proven_at = self.proven_at.max(self.token_ids.len() + open.max_new.max(1));
        }
        self.take_blocks();
    }

    /// The ids whose blocks may come from the cache: not the last, none that it has to prove harmless, and none whose
    /// log-probability is still to be told.
    pub fn reusable_ids(&self) -> &[TokenId] {
        let awaits_logprobs = self.wants_prompt_logprobs && self.token_ids.len() == self.num_prompt;
        if awaits_logprobs && !self.planted.has(Bug::HitsWantedLogprobs) {
            return &[];
        }
        let last = if self.planted.has(Bug::HitsWholeLog) { 0 } else { 1 };
        let unproven_from = if self.planted.has(Bug::HitsUnderSuspicion) { usize::MAX } else { self.unproven_from };
        &self.token_ids[..unproven_from.min(self.token_ids.len() - last)]
    }

    /// Panics if the bookkeeping contradicts itself.
    pub fn check(&self, block_size: usize) {
        assert!(!self.has_ended, "{:?} has ended and is still there", self.id);
        assert!(self.num_computed < self.token_ids.len(), "{:?} has nothing to sample from", self.id);
        assert!(self.token_ids.len() < self.max_positions(), "{:?} is complete and goes on", self.id);
        let most = self.num_computed + self.in_flight.num_tokens;
        if self.row.is_some() {
            assert!(self.incarnation > 0 && most <= self.blocks.ids.len() * block_size, "{:?} has room", self.id);
            assert!(most <= self.max_positions(), "{:?} stays within its limit", self.id);
        } else {
            assert!(self.num_computed == 0 && self.blocks.ids.is_empty(), "{:?} waits and holds blocks", self.id);
        }
    }
}
