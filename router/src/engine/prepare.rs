//! Grammars are made ready by the first rank before a sequence needs them, so that no step waits.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Semaphore;
use tracing::debug;

use crate::request::form::Grammar;
use crate::shards::Shard;

/// Grammars that are made ready at once: each takes a thread of the shard's.
const MAX_AT_ONCE: usize = 4;

/// Grammars that are known to be ready. The shards keep twice as many.
const MAX_READY: usize = 64;

/// The first rank of an epoch, if there is one.
#[derive(Clone, Default)]
pub struct FirstRank(pub(super) Option<Arc<dyn Shard>>);

impl FirstRank {
    /// This one.
    pub fn new(rank: Arc<dyn Shard>) -> Self {
        Self(Some(rank))
    }
}

impl fmt::Debug for FirstRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "FirstRank" } else { "no rank" })
    }
}

/// Whether it is the same connection.
impl PartialEq for FirstRank {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        }
    }
}

/// Remembers what is ready.
#[derive(Debug)]
pub(super) struct Preparer {
    turns: Semaphore,
    ready: Mutex<Ready>,
}

impl Default for Preparer {
    fn default() -> Self {
        Self { turns: Semaphore::new(MAX_AT_ONCE), ready: Mutex::default() }
    }
}

/// Of one epoch; used last stands last.
#[derive(Debug, Default)]
struct Ready {
    epoch: u64,
    grammars: VecDeque<Grammar>,
}

impl Ready {
    fn has(&mut self, grammar: &Grammar, epoch: u64) -> bool {
        if self.epoch != epoch {
            *self = Self { epoch, grammars: VecDeque::new() };
        }
        let Some(at) = self.grammars.iter().position(|one| one == grammar) else { return false };
        let grammar = self.grammars.remove(at).expect("found above");
        self.grammars.push_back(grammar);
        true
    }
}

impl Preparer {
    /// Why the grammar cannot be used, if the shard says that it cannot.
    pub async fn prepare(&self, grammar: &Grammar, epoch: u64, rank: &FirstRank) -> Option<String> {
        let rank = rank.0.as_ref()?;
        if self.ready().has(grammar, epoch) {
            return None;
        }
        let _turn = self.turns.acquire().await.ok()?;
        if self.ready().has(grammar, epoch) {
            return None;
        }
        match rank.prepare(grammar.clone()).await {
            Ok(None) => {
                let mut ready = self.ready();
                if !ready.has(grammar, epoch) {
                    ready.grammars.push_back(grammar.clone());
                    if ready.grammars.len() > MAX_READY {
                        ready.grammars.pop_front();
                    }
                }
                None
            }
            Ok(refused) => refused,
            Err(error) => {
                debug!(%error, "a grammar was not made ready");
                None
            }
        }
    }

    fn ready(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
