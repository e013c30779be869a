//! What the launcher and the router tell each other, as lines of JSON over the control socket in the run directory.
//!
//! The launcher listens, the router connects, at start and again after it was restarted. Only the launcher spawns and
//! kills; the router only reports what it sees. A *generation* is a set of shard processes, one for each rank.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One process of a generation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RankAddress {
    /// The tensor-parallel rank.
    pub rank: u32,
    /// The shard's Unix socket.
    pub socket: PathBuf,
    /// The shard's process id.
    pub process_id: u32,
    /// Counts the processes that served this rank; survivors of a restart keep theirs.
    pub incarnation: u32,
}

/// From the launcher to the router.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToRouter {
    /// All ranks of this generation are loaded; join them. The first message after connecting, and one per restart.
    Generation {
        /// Rises with every restart of any rank.
        number: u64,
        /// In order of rank.
        ranks: Vec<RankAddress>,
        /// A file name, not yet existing, through which the ranks find each other; unique per epoch if the epoch is
        /// appended to it.
        rendezvous: PathBuf,
    },
    /// A rank died or was killed; its replacement is being started. The current generation is to be abandoned.
    Lost {
        /// The generation that broke.
        number: u64,
        /// In words, for people.
        reason: String,
    },
    /// The launcher gives up on the shards and will end: every stream ends with an error.
    GaveUp {
        /// In words, for people.
        reason: String,
    },
}

/// From the router to the launcher.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToLauncher {
    /// The generation has joined and warmed up; requests are served.
    Serving {
        /// The generation that serves.
        number: u64,
        /// The epoch in which it does.
        epoch: u64,
        /// KV-cache blocks agreed between the ranks.
        num_blocks: u32,
    },
    /// A step was completed, the first of this generation: earlier deaths no longer count towards giving up.
    Stepped {
        /// The generation that stepped.
        number: u64,
    },
    /// The generation cannot go on: a stream broke, an answer was overdue or wrong, a join failed.
    Fault {
        /// The generation that broke.
        number: u64,
        /// Who is to blame, if that is known.
        rank: Option<u32>,
        /// In words, for people.
        reason: String,
        /// Whether the launcher must replace the blamed rank (or all, if none is): it will not recover by joining again.
        replace: bool,
    },
    /// The shards' limits do not fit the machine; nothing can be served.
    CannotServe {
        /// In words, for people: what, found, expected, what to do.
        reason: String,
    },
}
