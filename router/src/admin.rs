//! `GET /state` on a Unix socket in the run directory: what the loop and the ranks hold, as tests and operators want it.
//!
//! ```json
//! {
//!   "ready": true, "epoch": 2, "generation": 1, "steps": 345,
//!   "blocks": {"total": 512, "free": 480, "cached": 30, "pinned": 2},
//!   "permits": {"total": 128, "free": 127},
//!   "queue": 0, "running": 1,
//!   "ranks": [{"rank": 0, "process_id": 4711, "incarnation": 0, "generation": 1, "phase": "serving", "step": 345,
//!              "live_rows": 1}]
//! }
//! ```
//!
//! `blocks`: `free` ones hold nothing, `cached` ones hold prefixes that nobody uses, `pinned` ones belong to sequences;
//! together they are all. `steps` counts completed ones, over all epochs. A rank that does not answer within a second
//! has the phase `unreachable` and no `live_rows` and `step`. The socket has no authentication: its directory has.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use crate::control::RankAddress;
use crate::engine::{Engine, Observer};
use crate::shards::Shard;

/// How long a rank may take to say how it is.
const HEALTH_DEADLINE: Duration = Duration::from_secs(1);

/// The answer.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct EngineState {
    /// Whether requests are served.
    pub ready: bool,
    /// The shards' epoch.
    pub epoch: u64,
    /// The launcher's generation.
    pub generation: u64,
    /// Completed steps.
    pub steps: u64,
    /// Of the KV cache.
    pub blocks: Blocks,
    /// Of requests.
    pub permits: Permits,
    /// Sequences that wait.
    pub queue: usize,
    /// Sequences that run.
    pub running: usize,
    /// In order.
    pub ranks: Vec<RankState>,
}

/// KV-cache blocks: `total` is the sum of the others.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Blocks {
    /// All.
    pub total: usize,
    /// Hold nothing.
    pub free: usize,
    /// Hold prefixes that nobody uses now.
    pub cached: usize,
    /// Belong to sequences, or to open steps.
    pub pinned: usize,
}

/// Rights to generate a sequence.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Permits {
    /// All.
    pub total: usize,
    /// Not taken.
    pub free: usize,
}

/// One shard process.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RankState {
    /// The rank.
    pub rank: u32,
    /// As the launcher named it.
    pub process_id: u32,
    /// Counts the processes of this rank.
    pub incarnation: u32,
    /// As the launcher named it.
    pub generation: u64,
    /// What it does, in one word; `unreachable` if it does not say.
    pub phase: String,
    /// Its last completed step.
    pub step: Option<u64>,
    /// Rows in its table.
    pub live_rows: Option<u32>,
}

/// Listens, for the owner alone. The socket of a router that was killed is replaced; that of one that lives is not.
pub fn bind(socket: &Path) -> io::Result<UnixListener> {
    let is_abandoned = std::os::unix::net::UnixStream::connect(socket)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_abandoned {
        std::fs::remove_file(socket)?;
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers until the future is dropped.
pub fn serve(listener: UnixListener, engine: Engine, observer: Observer) -> BoxFuture<'static, io::Result<()>> {
    let routes = Router::new().route("/state", get(state)).with_state((engine, observer));
    async { axum::serve(listener, routes).await }.boxed()
}

async fn state(State((engine, observer)): State<(Engine, Observer)>) -> Response {
    match read(&engine, &observer).await {
        Some(state) => Json(state).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the engine has ended").into_response(),
    }
}

/// What the engine and its ranks hold; nothing if it has ended.
pub async fn read(engine: &Engine, observer: &Observer) -> Option<EngineState> {
    let snapshot = observer.snapshot().await?;
    let (stats, status) = (snapshot.stats, snapshot.status);
    let generation = status.generation;
    let ranks = snapshot.ranks.into_iter().map(|(address, shard)| rank_state(address, shard, generation));
    Some(EngineState {
        ready: status.is_ready,
        epoch: status.epoch,
        generation,
        steps: snapshot.num_steps,
        blocks: Blocks {
            total: stats.num_blocks as usize,
            free: stats.num_free,
            cached: stats.num_cached,
            pinned: stats.num_pinned,
        },
        permits: Permits { total: engine.num_permits(), free: engine.num_free_permits() },
        queue: stats.num_waiting,
        running: stats.num_running,
        ranks: futures::future::join_all(ranks).await,
    })
}

async fn rank_state(address: RankAddress, shard: Option<Arc<dyn Shard>>, generation: u64) -> RankState {
    let asked = async { shard?.health().await.ok() };
    let health = tokio::time::timeout(HEALTH_DEADLINE, asked).await.ok().flatten();
    let RankAddress { rank, process_id, incarnation, .. } = address;
    let (step, live_rows) = health.as_ref().map(|health| (health.step, health.num_rows)).unzip();
    let phase = health.map_or("unreachable".into(), |health| health.phase);
    RankState { rank, process_id, incarnation, generation, phase, step, live_rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_of_a_router_that_was_killed_is_replaced_and_that_of_a_living_one_is_not() {
        let socket = std::env::temp_dir().join(format!("admin-{}", std::process::id()));
        let killed = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        drop(killed); // leaves the file behind, as SIGKILL does
        let living = bind(&socket).unwrap();
        assert_eq!(bind(&socket).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(living);
        std::fs::remove_file(&socket).unwrap();
    }
}
