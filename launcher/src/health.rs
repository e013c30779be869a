//! Looks at a rank again and again: asks it for its health over its socket, and the kernel for its processor time.

use std::path::Path;
use std::time::{Duration, Instant};

use text_generation_router::shards::proto::health_reply::Phase as WirePhase;
use text_generation_router::shards::proto::shard_client::ShardClient;
use text_generation_router::shards::proto::{HealthReply, HealthRequest};
use tokio::sync::{mpsc, watch};
use tonic::transport::{Channel, Endpoint};

use crate::events::Event;
use crate::process::stat;
use crate::watch::{Health, Phase, Sample};

/// An answer later than this is none.
const DEADLINE: Duration = Duration::from_secs(1);

/// Sends samples of a rank until nobody takes them; `interval` says how often.
pub async fn look(
    (rank, incarnation): (u32, u32),
    process_id: u32,
    socket: &Path,
    mut interval: watch::Receiver<Duration>,
    events: mpsc::Sender<Event>,
) {
    let Ok(endpoint) = Endpoint::from_shared(format!("unix:{}", socket.display())) else { return };
    let mut client = ShardClient::new(endpoint.connect_timeout(DEADLINE).connect_lazy());
    loop {
        let start = Instant::now();
        let health = ask(&mut client).await;
        let stat = stat(process_id);
        let sample = Sample {
            health,
            processor_time: stat.as_ref().map(|stat| stat.processor_time),
            state: stat.map(|stat| stat.state),
        };
        if events.send(Event::Sampled { rank, incarnation, sample }).await.is_err() {
            return;
        }
        let rest = interval.borrow_and_update().saturating_sub(start.elapsed());
        // A shorter interval ends a longer one that has begun.
        let _ = tokio::time::timeout(rest, interval.changed()).await;
    }
}

/// Sends the processor time of the router until nobody takes it. The router is asked for an answer by the supervisor, over
/// the control socket.
pub async fn look_at_router(
    incarnation: u32,
    process_id: u32,
    mut interval: watch::Receiver<Duration>,
    events: mpsc::Sender<Event>,
) {
    loop {
        let processor_time = stat(process_id).map(|stat| stat.processor_time);
        if events.send(Event::RouterSampled { incarnation, processor_time }).await.is_err() {
            return;
        }
        let rest = *interval.borrow_and_update();
        let _ = tokio::time::timeout(rest, interval.changed()).await;
    }
}

async fn ask(client: &mut ShardClient<Channel>) -> Option<Health> {
    let answer = tokio::time::timeout(DEADLINE, client.health(HealthRequest {})).await;
    Some(health(answer.ok()?.ok()?.into_inner()))
}

fn health(reply: HealthReply) -> Health {
    Health {
        phase: match reply.phase() {
            WirePhase::Importing => Phase::Importing,
            WirePhase::Loading => Phase::Loading,
            WirePhase::Loaded => Phase::Loaded,
            WirePhase::Joining => Phase::Joining,
            WirePhase::WarmingUp => Phase::WarmingUp,
            WirePhase::Serving => Phase::Serving,
            WirePhase::Failed => Phase::Failed,
        },
        detail: reply.detail,
        done: reply.done,
        total: reply.total,
        epoch: reply.epoch,
        step: reply.step,
        progress: reply.progress,
        busy: reply.busy,
        waits: reply.waits,
    }
}
