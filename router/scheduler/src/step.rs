//! What goes to the shards and what comes back: the values behind `proto/shard.proto`.

use crate::blocks::BlockId;
use crate::rows::RowId;
use crate::sequence::{FinishReason, SequenceId, TokenId};

/// What the shards compute next, as a difference to what they hold. Names no position and no input token of a running
/// sequence, so it can be made before the outcome of the step before is known.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StepPlan {
    /// The shards' current epoch.
    pub epoch: u64,
    /// Counts plans, over all epochs.
    pub step: u64,
    /// Rows to forget after this step's work has run. None of their sequences is admitted again by the same plan.
    pub release: Vec<RowId>,
    /// Sequences that get a row.
    pub admit: Vec<Admission>,
    /// At most one for each row.
    pub work: Vec<Work>,
}

/// Admitting, re-admitting after preemption and replaying after a death are one message.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Admission {
    /// Free until now.
    pub row: RowId,
    /// Whose log it is.
    pub id: SequenceId,
    /// Counts admissions of this sequence, from 1.
    pub incarnation: u32,
    /// Prompt, then everything emitted so far.
    pub token_ids: Vec<TokenId>,
    /// How many of these are the prompt.
    pub num_prompt: usize,
    /// Leading positions already in the cache: whole blocks, the first of the sequence's first row's `new_blocks`.
    pub num_cached: usize,
}

/// What one row computes in a step.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Work {
    /// The sequence's row.
    pub row: RowId,
    /// The sequence.
    pub id: SequenceId,
    /// That of its admission.
    pub incarnation: u32,
    /// How far it may go.
    pub extent: Extent,
    /// To be appended to the sequence's block table; room for the longest outcome of all open steps.
    pub new_blocks: Vec<BlockId>,
}

/// How far a row may go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// Input positions, drafts included: the next `num_known()` of the sequence's ids, then drafts.
    pub num_tokens: usize,
    /// Ids the shard may guess after the known ones, and verify in the same step.
    pub num_drafts: usize,
    /// Whether the known ids reach the end of the log, so that the row yields `1..=num_drafts + 1` new ids.
    pub samples: bool,
}

impl Extent {
    /// Input positions whose ids are in the log.
    pub fn num_known(&self) -> usize {
        self.num_tokens - self.num_drafts
    }

    /// The most ids it yields.
    pub fn max_new(&self) -> usize {
        if self.samples { self.num_drafts + 1 } else { 0 }
    }

    /// The fewest ids it yields.
    pub fn min_new(&self) -> usize {
        usize::from(self.samples)
    }
}

/// Answers one plan: a row for each of its work, in its order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StepResult {
    /// That of the plan.
    pub epoch: u64,
    /// That of the plan.
    pub step: u64,
    /// What each row yielded.
    pub rows: Vec<RowResult>,
}

/// What one row yielded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RowResult {
    /// That of the work.
    pub row: RowId,
    /// That of the work.
    pub incarnation: u32,
    /// The sequence's positions in the cache after the step; without meaning after an error.
    pub computed: usize,
    /// The ids, sampled from finite logits.
    pub tokens: Result<Vec<TokenId>, RowError>,
}

/// The shard cannot go on with this one sequence. Its later rows are answered the same way until it is released.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RowError;

/// The answer does not fit the question; nothing of it was applied. The shards must be restarted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ShardFault;

/// What a client learns.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// A new id of a sequence.
    Token {
        /// Whose.
        id: SequenceId,
        /// The id.
        token: TokenId,
        /// Which row of the result it came from,
        work: usize,
        /// and which of the ids that row yielded.
        index: usize,
    },
    /// The last event of its sequence.
    Finished {
        /// Whose.
        id: SequenceId,
        /// Why.
        reason: FinishReason,
    },
}

/// One row of a step whose result has not arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenRow {
    pub row: RowId,
    pub id: SequenceId,
    pub incarnation: u32,
    pub extent: Extent,
}

impl OpenRow {
    /// Whether the row of the result answers this one, as far as can be told without the sequence.
    pub fn is_answered_by(&self, result: &RowResult) -> bool {
        let yields = self.extent.min_new()..=self.extent.max_new();
        let fits = result.tokens.as_ref().map_or(true, |tokens| yields.contains(&tokens.len()));
        self.row == result.row && self.incarnation == result.incarnation && fits
    }

    /// Positions that a row with these ids has added to the cache.
    pub fn num_computed(&self, tokens: &[TokenId]) -> usize {
        self.extent.num_known() + tokens.len().saturating_sub(1)
    }
}

/// What was asked in a step whose result has not arrived.
#[derive(Debug)]
pub(crate) struct OpenStep {
    pub step: u64,
    pub rows: Vec<OpenRow>,
}
