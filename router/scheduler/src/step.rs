//! What goes to the shards and what comes back: the values behind `proto/shard.proto`.

use std::fmt;

use crate::blocks::BlockId;
use crate::sequence::{FinishReason, SequenceId, TokenId};

/// A place in the shards' table, held by one sequence from its admission to its release.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RowId(pub u32);

/// What the shards compute next, as a difference to what they hold.
///
/// Names no position and no input token of a running sequence, so it can be made before the outcome of the step before
/// is known.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct StepPlan {
    /// The epoch that [`shards_ready`](crate::Scheduler::shards_ready) named.
    pub epoch: u64,
    /// Counts plans, over all epochs.
    pub step: u64,
    /// Rows to forget after this step's work has run. None of them is given out again by the same plan, nor is any of
    /// their sequences admitted by it.
    pub release: Vec<RowId>,
    /// Sequences that the shards do not hold yet; each has its first work in the same plan.
    pub admit: Vec<Admission>,
    /// At most one for each row.
    pub work: Vec<Work>,
}

/// Admitting, re-admitting after preemption and replaying after a death are one message.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Admission {
    /// The lowest that is free; below twice `max_running`.
    pub row: RowId,
    /// Whom the row belongs to until it is released.
    pub id: SequenceId,
    /// Counts the admissions of this sequence, from 1.
    pub incarnation: u32,
    /// Prompt, then everything emitted so far. The receiver's own, to be moved into the message.
    pub token_ids: Vec<TokenId>,
    /// How many of them are the prompt.
    pub num_prompt: usize,
    /// Leading positions already in the cache: whole blocks, fewer than the log, the first of the first work's
    /// `new_blocks`.
    pub num_cached: usize,
}

/// What one row does in one step.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Work {
    /// Where the shards hold the sequence.
    pub row: RowId,
    /// The sequence, for the caller's own tables.
    pub id: SequenceId,
    /// As in the row's admission.
    pub incarnation: u32,
    /// How far it may go.
    pub extent: Extent,
    /// To be appended to the row's block table; room for the longest outcome of all open steps.
    pub new_blocks: Vec<BlockId>,
}

/// How far a row may go in one step.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Extent {
    /// Input positions, drafts included: the next `num_known()` of the sequence's ids, then drafts.
    pub num_tokens: usize,
    /// Ids the shard may guess after the known ones, and verify in the same step.
    pub num_drafts: usize,
    /// Whether the known ids reach the end of the log, so that the row yields `1..=num_drafts + 1` new ids.
    pub samples: bool,
}

impl Extent {
    /// Input positions that are computed exactly.
    pub fn num_known(&self) -> usize {
        self.num_tokens - self.num_drafts
    }

    /// The most ids that the row may yield.
    pub fn max_new(&self) -> usize {
        if self.samples { self.num_drafts + 1 } else { 0 }
    }

    /// The fewest ids that the row may yield.
    pub fn min_new(&self) -> usize {
        usize::from(self.samples)
    }
}

/// Answers one plan.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct StepResult {
    /// As in the plan.
    pub epoch: u64,
    /// As in the plan.
    pub step: u64,
    /// One for each work of the plan, in order.
    pub rows: Vec<RowResult>,
}

/// What one row has done.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct RowResult {
    /// As in the work.
    pub row: RowId,
    /// As in the work.
    pub incarnation: u32,
    /// The row's new length in the cache: what it had, the known ids, and the drafts that were right. Not looked at
    /// where the row failed.
    pub computed: usize,
    /// The new ids; none if the row did not sample. Whoever sampled without an error had finite numbers everywhere
    /// before.
    pub tokens: Result<Vec<TokenId>, RowError>,
}

/// The shard cannot go on with this one sequence. Its later rows are answered the same way until it is released.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RowError;

/// What a commit tells about one sequence.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Event {
    /// The sequence has one more id.
    Token {
        /// The sequence.
        id: SequenceId,
        /// Its new id.
        token: TokenId,
        /// Which of the result's rows yielded it.
        work: usize,
        /// Which of that row's ids it is.
        index: usize,
    },
    /// The last event of a sequence.
    Finished {
        /// The sequence.
        id: SequenceId,
        /// Why it ends.
        reason: FinishReason,
    },
}

/// The answer does not fit the question, and nothing of it was applied. The shards must be restarted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShardFault {
    /// An epoch that was never announced, or one that is over.
    Epoch {
        /// The result's.
        found: u64,
        /// The current one.
        expected: u64,
    },
    /// Not the oldest open step.
    Step {
        /// The result's.
        found: u64,
        /// The oldest open step; `None` if there is none.
        expected: Option<u64>,
    },
    /// Not one row for each work.
    NumRows {
        /// The step answered.
        step: u64,
        /// Rows of the result.
        found: usize,
        /// Works of the plan.
        expected: usize,
    },
    /// Another row or incarnation than planned at this place.
    Row {
        /// The step answered.
        step: u64,
        /// The result's row and incarnation.
        found: (RowId, u32),
        /// The planned row and incarnation.
        expected: (RowId, u32),
    },
    /// Fewer or more ids than the row may yield.
    NumTokens {
        /// The step answered.
        step: u64,
        /// The row.
        row: RowId,
        /// How many ids it yielded.
        found: usize,
        /// The extent that it was given.
        extent: Extent,
    },
    /// The row's length in the cache is not what its work and its ids make it.
    Computed {
        /// The step answered.
        step: u64,
        /// The row.
        row: RowId,
        /// The result's.
        found: usize,
        /// From the lengths before and the ids yielded.
        expected: usize,
    },
}

impl fmt::Display for ShardFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Epoch { found, expected } => write!(f, "a result of epoch {found}, expected epoch {expected}"),
            Self::Step { found, expected: Some(expected) } => {
                write!(f, "a result of step {found}, expected step {expected}")
            }
            Self::Step { found, expected: None } => write!(f, "a result of step {found}, but no step is open"),
            Self::NumRows { step, found, expected } => {
                write!(f, "the result of step {step} has {found} rows, expected {expected}")
            }
            Self::Row { step, found: (row, incarnation), expected: (expected_row, expected_incarnation) } => write!(
                f,
                "the result of step {step} has row {} in incarnation {incarnation}, expected row {} in incarnation \
                 {expected_incarnation}",
                row.0, expected_row.0
            ),
            Self::NumTokens { step, row, found, extent } => write!(
                f,
                "row {} of step {step} yielded {found} ids, expected {} to {}",
                row.0,
                extent.min_new(),
                extent.max_new()
            ),
            Self::Computed { step, row, found, expected } => {
                write!(f, "row {} of step {step} has {found} positions in the cache, expected {expected}", row.0)
            }
        }
    }
}

impl std::error::Error for ShardFault {}

/// What was asked in a step whose result has not arrived.
#[derive(Debug)]
pub(crate) struct OpenStep {
    pub step: u64,
    pub rows: Vec<OpenRow>,
}

/// One work of an open step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenRow {
    pub row: RowId,
    pub id: SequenceId,
    pub incarnation: u32,
    pub extent: Extent,
    /// Where the sequence was among the running ones; where it probably still is.
    pub index: usize,
}
