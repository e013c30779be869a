//! What the supervisor is told and what it wants done.

use std::time::Duration;

use text_generation_router::control::{ToLauncher, ToRouter};

use crate::process::Exit;
use crate::watch::Sample;

/// A process.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Who {
    /// A shard.
    Rank {
        /// Its rank.
        rank: u32,
        /// Counts the processes of this rank, from 1.
        incarnation: u32,
    },
    /// The router.
    Router {
        /// Counts its processes, from 1.
        incarnation: u32,
    },
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rank { rank, .. } => write!(f, "rank {rank}"),
            Self::Router { .. } => f.write_str("router"),
        }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Begin.
    Start,
    /// Time passed: comes ten times a second.
    Tick,
    /// A process runs.
    Spawned {
        /// Which.
        who: Who,
        /// Its id.
        process_id: u32,
    },
    /// A process could not even be started.
    NotSpawned {
        /// Which.
        who: Who,
        /// Why.
        error: String,
    },
    /// A process is gone and its output was read to the end.
    Exited {
        /// Which.
        who: Who,
        /// How.
        exit: Exit,
    },
    /// A rank was looked at.
    Sampled {
        /// Which.
        rank: u32,
        /// Of it, which process.
        incarnation: u32,
        /// What was seen.
        sample: Sample,
    },
    /// The router was looked at.
    RouterSampled {
        /// Which process of it.
        incarnation: u32,
        /// That it has used since its start. Absent: unreadable.
        processor_time: Option<Duration>,
    },
    /// The router opened the control socket.
    RouterConnected,
    /// The router spoke.
    RouterSaid(ToLauncher),
    /// A signal asks to end, or Ctrl-C.
    Stop,
}

/// A signal to a child.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Signal {
    /// SIGUSR1: print the stacks of all threads.
    Stacks,
    /// SIGTERM
    Term,
    /// SIGKILL
    Kill,
}

/// How the launcher ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// As asked.
    Stopped,
    /// Something that the launcher could not mend, in words.
    Failed(String),
}

/// How much a line of the log matters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Level {
    /// Worth knowing.
    Info,
    /// Something broke and is being mended.
    Warn,
    /// Someone must act.
    Error,
}

/// What to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// Start a process; answered by `Spawned` or `NotSpawned`.
    Spawn(Who),
    /// Send a signal.
    Signal(Who, Signal),
    /// Send the router a message.
    Tell(ToRouter),
    /// Tell the router that a generation is complete; its rendezvous file has the number in its name.
    Announce {
        /// Its number.
        number: u64,
        /// Rank, process id and incarnation of each, in order of rank.
        ranks: Vec<(u32, u32, u32)>,
    },
    /// Look at the ranks often (while something is awaited) or seldom.
    Poll {
        /// Ten times a second rather than twice.
        often: bool,
    },
    /// Write to the log.
    Log(Level, String),
    /// All children are gone.
    End(Outcome),
}
