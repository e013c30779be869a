//! One request's id log, how far it is computed, and what open steps may still add to it.

use crate::blocks::{BlockId, BlockTable, ContentId, Namespace};
use crate::rows::RowId;
use crate::step::{Event, Extent, OpenRow};

/// An id of the vocabulary.
pub type TokenId = u32;

/// Given out by the scheduler in order of arrival, so ids compare by age.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SequenceId(pub u64);

/// Milliseconds on the caller's clock.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Millis(pub u64);

/// What is to be generated.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one id.
    pub prompt: Vec<TokenId>,
    /// At least one.
    pub max_new_tokens: usize,
    /// Whatever else its keys and values depend on.
    pub namespace: Namespace,
    /// The latest moment to be admitted for the first time; see `Scheduler::expire`.
    pub deadline: Option<Millis>,
    /// Every position of the prompt has to be computed, so nothing of it may come from the cache.
    pub wants_prompt_logprobs: bool,
    /// An end-of-sequence id is an id like any other.
    pub ignore_eos: bool,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FinishReason {
    /// `max_new_tokens` were generated.
    Length,
    /// The model produced an end-of-sequence token.
    EndOfSequence,
    /// The shard answered a row of this sequence with an error.
    RowError,
    /// Three deaths of the shards in a row while computing this sequence, the last one alone.
    KilledShards,
    /// The shards came back with fewer blocks than this sequence needs.
    NoLongerFits,
    /// It waited for its first admission beyond its deadline.
    DeadlineExceeded,
}

/// The bounds of what the rows in open steps will do to a sequence.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    pub num_rows: usize,
    /// The last step that may read or write the sequence's blocks.
    pub last_step: u64,
    /// The most positions that may be computed.
    num_tokens: usize,
    min_new: usize,
    max_new: usize,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: SequenceId,
    pub namespace: Namespace,
    /// Prompt, then emitted ids: the log from which everything else can be rebuilt.
    pub token_ids: Vec<TokenId>,
    pub num_prompt: usize,
    pub max_new_tokens: usize,
    pub deadline: Option<Millis>,
    wants_prompt_logprobs: bool,
    ignore_eos: bool,
    /// Positions whose keys and values are in `blocks`, by committed steps alone.
    pub num_computed: usize,
    pub blocks: BlockTable,
    /// What the latest incarnation has published.
    pub published: Vec<(BlockId, ContentId)>,
    /// Admissions so far.
    pub incarnation: u32,
    /// Where the shards hold this sequence, if they do.
    pub row: Option<RowId>,
    pub in_flight: InFlight,
    /// Deaths of the shards while computing this sequence, since it was last proven harmless.
    deaths: usize,
    /// The first position that was in flight at one of these deaths.
    unproven_from: usize,
    /// The length of the log once all that was in flight at these deaths has been computed again.
    proven_at: usize,
}

/// Deaths after which a sequence runs alone; one more and it fails.
pub(crate) const SUSPECT_DEATHS: usize = 2;

impl Sequence {
    pub fn new(id: SequenceId, request: Request) -> Self {
        Self {
            id,
            namespace: request.namespace,
            num_prompt: request.prompt.len(),
            token_ids: request.prompt,
            max_new_tokens: request.max_new_tokens,
            deadline: request.deadline,
            wants_prompt_logprobs: request.wants_prompt_logprobs,
            ignore_eos: request.ignore_eos,
            num_computed: 0,
            blocks: BlockTable::default(),
            published: vec![],
            incarnation: 0,
            row: None,
            in_flight: InFlight::default(),
            deaths: 0,
            unproven_from: usize::MAX,
            proven_at: 0,
        }
    }

    /// Positions that may ever be computed, wasted rows included.
    pub fn max_positions(&self) -> usize {
        self.num_prompt + self.max_new_tokens
    }

    /// Whether it may have killed the shards, so that it must run alone.
    pub fn is_suspect(&self) -> bool {
        self.deaths >= SUSPECT_DEATHS
    }

    /// Whether it has died with the shards so often, `tolerated` deaths being fine, that it is to blame.
    pub fn must_fail(&self, tolerated: usize) -> bool {
        self.deaths > tolerated
    }

    /// The order of the queue: suspects first, then by arrival.
    pub fn precedence(&self) -> (bool, SequenceId) {
        (!self.is_suspect(), self.id)
    }

    /// The farthest the next row may go. `None` if the shortest outcome of the open steps ends the sequence, or if after
    /// the longest one the row would touch a position beyond `max_positions`.
    pub fn next_extent(&self, budget: usize, max_drafts: usize) -> Option<Extent> {
        let missing = self.max_positions() - self.token_ids.len();
        if missing <= self.in_flight.min_new || missing < self.in_flight.max_new {
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

    /// Blocks that must be added before a row of this extent may run.
    pub fn num_missing_blocks(&self, extent: Extent, block_size: usize) -> usize {
        let most = self.num_computed + self.in_flight.num_tokens + extent.num_tokens;
        most.div_ceil(block_size).saturating_sub(self.blocks.ids.len())
    }

    pub fn open(&mut self, step: u64, extent: Extent) {
        let open = &mut self.in_flight;
        open.num_rows += 1;
        open.last_step = step;
        open.num_tokens += extent.num_tokens;
        open.min_new += extent.min_new();
        open.max_new += extent.max_new();
    }

    pub fn close(&mut self, extent: Extent) {
        let open = &mut self.in_flight;
        open.num_rows -= 1;
        open.num_tokens -= extent.num_tokens;
        open.min_new -= extent.min_new();
        open.max_new -= extent.max_new();
    }

    /// Whether the row was sent for what the shards hold of this sequence now.
    pub fn holds(&self, open: &OpenRow) -> bool {
        self.row == Some(open.row) && self.incarnation == open.incarnation
    }

    /// Appends what the `work`-th row yielded, up to the first id that ends the sequence. A row sent before the sequence
    /// was preempted still yields its ids, but what it computed is gone.
    pub fn extend(
        &mut self,
        open: &OpenRow,
        work: usize,
        tokens: &[TokenId],
        eos: &[TokenId],
        events: &mut Vec<Event>,
    ) -> Option<FinishReason> {
        let before = self.token_ids.len();
        let mut reason = None;
        for (index, &token) in tokens.iter().enumerate() {
            self.token_ids.push(token);
            events.push(Event::Token { id: self.id, token, work, index });
            reason = if eos.contains(&token) && !self.ignore_eos {
                Some(FinishReason::EndOfSequence)
            } else {
                (self.token_ids.len() == self.max_positions()).then_some(FinishReason::Length)
            };
            if reason.is_some() {
                break;
            }
        }
        if self.holds(open) {
            self.num_computed += open.num_computed(&self.token_ids[before..]);
        }
        if self.token_ids.len() >= self.proven_at {
            (self.deaths, self.unproven_from) = (0, usize::MAX);
        }
        reason
    }

    /// Back to what can be admitted from scratch. The caller takes care of the blocks.
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
            self.deaths += 1;
            self.unproven_from = self.unproven_from.min(self.num_computed);
            self.proven_at = self.proven_at.max(self.token_ids.len() + open.max_new.max(1));
        }
        self.take_blocks();
        self.published.clear();
    }

    /// The ids whose blocks may come from the cache: not the last, and none that it has to prove harmless. None at all
    /// as long as the log-probabilities of the prompt are owed.
    pub fn reusable_ids(&self) -> &[TokenId] {
        let owes_logprobs = self.wants_prompt_logprobs && self.token_ids.len() == self.num_prompt;
        let most = if owes_logprobs { 0 } else { self.token_ids.len() - 1 };
        &self.token_ids[..self.unproven_from.min(most)]
    }

    /// Panics if the bookkeeping contradicts itself.
    pub fn check(&self, block_size: usize) {
        assert!(self.num_computed < self.token_ids.len() && self.token_ids.len() < self.max_positions());
        assert!(self.row.is_some() || self.num_computed == 0 && self.blocks.ids.is_empty());
        let most = self.num_computed + self.in_flight.num_tokens;
        assert!(self.row.is_none() || most <= self.blocks.ids.len() * block_size && most <= self.max_positions());
    }
}
