//! Mistakes that can be planted on purpose, to show that the simulation finds them.
//!
//! Without the feature `planted-bugs` nothing can be planted: `Planted` is empty, `Planted::has` is constantly false, and
//! the compiler removes every branch that asks it.

/// One mistake, each of a kind that schedulers have really had.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bug {
    /// Blocks of an ended sequence are given out while open steps may still touch them.
    FreesBlocksOfOpenSteps,
    /// A prompt chunk's blocks are published although nothing has been sampled over them.
    PublishesWithoutSample,
    /// Positions that only open steps compute are published with the committed ones.
    PublishesUncommitted,
    /// A failed row leaves what its incarnation published for others to hit.
    KeepsBlocksOfFailedRow,
    /// Two contents with the same hash are taken for one.
    MatchesByHashAlone,
    /// A block is hit whatever stands before it.
    IgnoresParent,
    /// A block is hit by another tenant or adapter.
    IgnoresNamespace,
    /// An evicted block can still be found under its old content.
    FindsEvictedBlocks,
    /// A hit block stays in the order of eviction, as if nobody held it.
    EvictsHeldBlocks,
    /// The cache survives the shards that held it.
    KeepsCacheOnLoss,
    /// A hit may cover the whole log, so that nothing is left to sample from.
    HitsWholeLog,
    /// Prompt positions whose log-probabilities are wanted are taken from the cache.
    HitsWantedLogprobs,
    /// A sequence under suspicion takes hits where it has to prove itself.
    HitsUnderSuspicion,
    /// A row is given to a new sequence by the plan that releases it.
    ReusesReleasedRow,
    /// A result for another incarnation of the row's sequence is taken.
    IgnoresIncarnation,
    /// A result whose cache length is not what was asked is taken.
    IgnoresComputed,
    /// A result with another number of ids than a row can yield is taken.
    IgnoresNumTokens,
    /// A result of an older epoch is taken for the answer to the oldest open step.
    AcceptsOlderEpoch,
    /// A preempted sequence is admitted again before its rows in flight are committed.
    ReadmitsUnsettled,
    /// A preempted sequence is admitted again by the plan that releases it.
    ReadmitsUnreleased,
    /// Younger sequences take blocks that an elder waits for.
    ForgetsElder,
    /// A preempted sequence queues behind those that never ran.
    RequeuesAtTheBack,
    /// The eldest is preempted instead of the newest.
    PreemptsEldest,
    /// Ids after the end of a sequence are emitted.
    EmitsAfterEnd,
    /// A sequence ends one id too late.
    CountsLengthOffByOne,
    /// A row is planned although the open ones are certain to end the sequence.
    PlansCertainlyDeadRow,
    /// Room is given without counting what open steps may compute.
    ForgetsOpenTokens,
    /// An elder's prompt takes the tokens that younger rows need.
    StarvesYoungest,
    /// A suspect runs among others.
    RunsSuspectsTogether,
    /// Any emitted id clears a suspect.
    ClearsSuspicionEarly,
    /// A third death fails nobody.
    NeverFailsKiller,
    /// A deadline also ends a sequence that has been planned before.
    ExpiresAdmitted,
    /// A sequence that has outgrown the new shards waits for ever.
    KeepsWhatNoLongerFits,
    /// The release of a sequence that ended while a step was open is never sent.
    LosesRelease,
}

/// What was planted, if anything can be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Planted {
    #[cfg(feature = "planted-bugs")]
    pub bug: Option<Bug>,
}

impl Planted {
    #[cfg(feature = "planted-bugs")]
    pub fn has(self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    #[cfg(not(feature = "planted-bugs"))]
    #[inline(always)]
    pub const fn has(self, _: Bug) -> bool {
        false
    }
}
