//! What the launcher and the router tell each other, as lines of JSON over the control socket in the run directory.
//!
//! The launcher listens, the router connects, at start and again after it was restarted. Only the launcher spawns and
//! kills; the router only reports what it sees. A *generation* is a set of shard processes, one for each rank.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tracing::warn;

/// The router's exit code when starting it again cannot help: the tokenizer cannot be read, or nothing can be served.
/// As EX_CONFIG of sysexits.h.
pub const CANNOT_SERVE: u8 = 78;

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
    /// Are you there? The next one comes when this is answered.
    Ping,
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
    /// The answer to `Ping`, from the loop that does the work.
    Pong,
    /// The shards' limits do not fit the machine; nothing can be served.
    CannotServe {
        /// In words, for people: what, found, expected, what to do.
        reason: String,
    },
}

/// Messages that may wait, either way.
const BUFFER: usize = 64;

/// The longest line that is read: thousands of ranks.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// How long the launcher may take to accept.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// The router's end of the control socket.
#[derive(Debug)]
pub struct Link {
    /// From the launcher; closed when the launcher is gone.
    pub incoming: mpsc::Receiver<ToRouter>,
    /// To the launcher.
    pub outgoing: mpsc::Sender<ToLauncher>,
}

/// The launcher's end of a link within one process.
#[derive(Debug)]
pub struct LauncherLink {
    /// To the router.
    pub outgoing: mpsc::Sender<ToRouter>,
    /// From the router; closed when the router has ended.
    pub incoming: mpsc::Receiver<ToLauncher>,
}

impl Link {
    /// A link without a socket, for tests.
    pub fn pair() -> (Self, LauncherLink) {
        let (to_router, from_launcher) = mpsc::channel(BUFFER);
        let (to_launcher, from_router) = mpsc::channel(BUFFER);
        let link = Self { incoming: from_launcher, outgoing: to_launcher };
        (link, LauncherLink { outgoing: to_router, incoming: from_router })
    }

    /// Connects to the launcher's socket.
    pub async fn connect(socket: &Path) -> io::Result<Self> {
        let stream = tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(socket)).await??;
        let (reader, writer) = stream.into_split();
        let (link, LauncherLink { outgoing, incoming }) = Self::pair();
        tokio::spawn(read_lines(reader, outgoing));
        tokio::spawn(write_lines(writer, incoming));
        Ok(link)
    }
}

/// Ends, and with it the channel, at the end of the stream or at the first line that is not understood: launcher and
/// router are of one version, so such a line means that something else speaks.
async fn read_lines(reader: OwnedReadHalf, messages: mpsc::Sender<ToRouter>) {
    let mut reader = BufReader::new(tokio::io::AsyncReadExt::take(reader, MAX_LINE_BYTES));
    let mut line = String::new();
    loop {
        line.clear();
        reader.get_mut().set_limit(MAX_LINE_BYTES);
        match reader.read_line(&mut line).await {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => return warn!(%error, "the control socket broke"),
        }
        let message = match serde_json::from_str(&line) {
            Ok(message) => message,
            Err(error) => {
                return warn!(%error, line = line.trim(), "the launcher said something that is not understood");
            }
        };
        if messages.send(message).await.is_err() {
            return;
        }
    }
}

async fn write_lines(mut writer: OwnedWriteHalf, mut messages: mpsc::Receiver<ToLauncher>) {
    while let Some(message) = messages.recv().await {
        let mut line = serde_json::to_vec(&message).expect("a message without maps is always JSON");
        line.push(b'\n');
        if let Err(error) = writer.write_all(&line).await {
            return warn!(%error, "the launcher does not hear");
        }
    }
}
