//! Bugs planted on purpose, to prove that the simulation finds them. Without the feature, nothing of this exists.

/// A mistake that the scheduler makes when told to.
#[cfg(feature = "planted-bugs")]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bug {
    /// Frees the blocks of an ended sequence at once, also those that an open step writes.
    FreesOpenBlocks,
    /// Publishes a block as soon as its row is planned.
    PublishesEarly,
    /// Publishes the blocks of prompt chunks that no sample has attended to yet.
    PublishesUnsampled,
    /// Finds a block by its own tokens, whatever stands before them.
    ForgetsParent,
    /// Finds a block of another namespace.
    ForgetsNamespace,
    /// Gives a row to a new sequence in the plan that releases it.
    ReusesRowEarly,
    /// Admits a preempted sequence while rows of its former incarnation are open.
    AdmitsWithOpenRows,
    /// Lets younger sequences take blocks while an elder waits for some.
    ForgetsElder,
    /// Goes on with a sequence that has ended by its end token.
    EmitsAfterEnd,
    /// Applies results of an epoch that is over.
    AcceptsOldEpoch,
    /// Keeps the cached blocks of the shards that died.
    KeepsPoolOnLoss,
    /// Ends a sequence one token early.
    EndsEarly,
    /// Lets others run beside a suspect.
    SuspectHasCompany,
    /// Leaves in the cache what a failed row's sequence has published.
    KeepsFailedBlocks,
    /// Gives blocks from the cache to a sequence that wants the log-probabilities of its prompt.
    HitsDespiteLogprobs,
    /// Fails a sequence at the second death instead of the third.
    FailsInnocent,
}

/// Which bug is planted: none, in anything but the tests of the simulation itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Planted {
    #[cfg(feature = "planted-bugs")]
    pub(crate) bug: Option<Bug>,
}

/// Whether the named bug is planted; `false`, known to the compiler, without the feature.
macro_rules! planted {
    ($planted:expr, $bug:ident) => {{
        #[cfg(feature = "planted-bugs")]
        let is_planted = $planted.bug == Some($crate::planted::Bug::$bug);
        #[cfg(not(feature = "planted-bugs"))]
        let is_planted = {
            let _ = &$planted;
            false
        };
        is_planted
    }};
}
pub(crate) use planted;
