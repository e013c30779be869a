//! Brings the shards of a generation into service: connect, join, describe, size the cache, open the streams.

use std::sync::Arc;
use std::time::Duration;

use futures::TryFutureExt;
use futures::future::{BoxFuture, join_all, try_join_all};
use tracing::{info, warn};

use super::limits::{self, Agreed, CannotServe, Wishes};
use crate::control::RankAddress;
use crate::shards::{Description, Fault, Group, Join, SelfKill, Shard, ShardError, Shards};

/// The shard processes that the launcher started, one for each rank.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Generation {
    pub number: u64,
    pub ranks: Vec<RankAddress>,
    pub rendezvous: std::path::PathBuf,
}

impl Generation {
    /// Of the same processes, a second failure to start is no accident.
    pub fn process_ids(&self) -> Vec<u32> {
        self.ranks.iter().map(|address| address.process_id).collect()
    }
}

/// What is known before.
pub(super) struct Start {
    pub shards: Arc<dyn Shards>,
    pub generation: Generation,
    /// The last epoch of this router.
    pub epoch: u64,
    /// Blocks agreed with an earlier generation.
    pub num_blocks: Option<u32>,
    pub wishes: Wishes,
    pub step_timeout: Duration,
    pub self_kill: SelfKill,
}

/// Shards that take plans.
pub(super) struct Started {
    pub epoch: u64,
    pub agreed: Agreed,
    pub ranks: Vec<Arc<dyn Shard>>,
    pub group: Group,
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    CannotServe(#[from] CannotServe),
}

/// Every call in here has a deadline.
pub(super) async fn start(start: Start) -> Result<Started, StartError> {
    let Start { shards, generation, epoch, num_blocks, wishes, step_timeout, self_kill } = start;
    let is_restart = num_blocks.is_some();
    check_ranks(&generation.ranks)?;
    let ranks = all(generation.ranks.iter().map(|address| shards.connect(address)).collect()).await?;

    let health = all(ranks.iter().map(|shard| shard.health()).collect()).await?;
    let epoch = 1 + health.iter().map(|health| health.epoch).fold(epoch, u64::max);
    let world_size = ranks.len() as u32;
    let rendezvous = format!("{}-{epoch}", generation.rendezvous.display());
    let joins = (0..world_size).map(|rank| Join { epoch, rank, world_size, rendezvous: rendezvous.clone() });
    all(ranks.iter().zip(joins).map(|(shard, join)| shard.join(join)).collect()).await?;

    let descriptions = all(ranks.iter().map(|shard| shard.describe()).collect()).await?;
    let model = agree_on_model(descriptions, world_size)?;
    let bounds = limits::bounds(&wishes, &model)?;
    let warmup = |num_blocks| {
        let warmup = bounds.warmup(epoch, wishes.block_size, num_blocks);
        join_all(ranks.iter().map(|shard| shard.warmup(warmup)).collect::<Vec<_>>())
    };
    let agreed = match num_blocks {
        Some(num_blocks) => num_blocks,
        None => least(warmup(0).await)?.min(bounds.max_blocks),
    };
    limits::agree(&wishes, &model, agreed, is_restart)?;
    let allocated = warmup(agreed).await;
    let num_blocks = match allocated.iter().any(|answer| matches!(answer, Err(ShardError::OutOfMemory(_)))) {
        false => least(allocated)?,
        true => {
            // What fitted once need not fit again. Sequences that are too long for less will end, the others go on.
            let fitting = least(warmup(0).await)?.min(bounds.max_blocks);
            warn!(agreed, fitting, "the agreed number of KV-cache blocks does not fit any more");
            least(warmup(fitting).await)?
        }
    };
    let agreed = limits::agree(&wishes, &model, num_blocks.min(agreed), is_restart)?;
    let group = Group::open(&ranks, epoch, step_timeout, self_kill).await?;
    let Agreed { limits, facts } = &agreed;
    info!(
        generation = generation.number,
        epoch,
        ranks = ranks.len(),
        blocks = limits.num_blocks,
        block_size = limits.block_size,
        max_total_tokens = facts.max_total_tokens,
        max_step_tokens = limits.max_step_tokens,
        max_running = limits.max_running,
        "the shards are ready"
    );
    Ok(Started { epoch, agreed, ranks, group })
}

fn check_ranks(ranks: &[RankAddress]) -> Result<(), CannotServe> {
    let found: Vec<u32> = ranks.iter().map(|address| address.rank).collect();
    let is_complete = !found.is_empty() && found.iter().copied().eq(0..found.len() as u32);
    let reason = || CannotServe(format!("the launcher named ranks {found:?}, expected all from 0 on, in order"));
    is_complete.then_some(()).ok_or_else(reason)
}

/// Waits for the answers of all ranks, in order of rank; the first failure counts.
async fn all<T>(calls: Vec<BoxFuture<'_, Result<T, ShardError>>>) -> Result<Vec<T>, Fault> {
    let calls = calls.into_iter().zip(0..);
    try_join_all(calls.map(|(call, rank)| call.map_err(move |error| Fault::of(rank, error)))).await
}

/// The smallest answer, if all ranks gave one.
fn least(answers: Vec<Result<u32, ShardError>>) -> Result<u32, Fault> {
    let answers = answers.into_iter().zip(0..).map(|(answer, rank)| answer.map_err(|error| Fault::of(rank, error)));
    answers.collect::<Result<Vec<u32>, Fault>>().map(|answers| answers.into_iter().min().unwrap_or(0))
}

/// The ranks hold parts of one model.
fn agree_on_model(descriptions: Vec<Description>, world_size: u32) -> Result<Description, StartError> {
    let mut descriptions = descriptions.into_iter();
    let first = descriptions.next().expect("there is a rank");
    if first.world_size != world_size {
        let reason = format!("the shards are parts of {}, but {world_size} were started", first.world_size);
        return Err(CannotServe(reason).into());
    }
    match descriptions.zip(1..).find(|(other, _)| *other != first) {
        None => Ok(first),
        Some((other, rank)) => {
            let what = difference(&first, &other);
            Err(CannotServe(format!("ranks 0 and {rank} hold different models: {what}; give all the same files"))
                .into())
        }
    }
}

/// The first field that differs, and what it is in each.
fn difference(first: &Description, other: &Description) -> String {
    let fields = |model: &Description| {
        let numbers = [
            ("vocab_size", model.vocab_size),
            ("max_positions", model.max_positions),
            ("num_cache_groups", model.num_cache_groups),
            ("max_drafts", model.max_drafts),
            ("world_size", model.world_size),
        ];
        let texts = [
            ("model_type", &model.model_type),
            ("dtype", &model.dtype),
            ("device", &model.device),
            ("version", &model.version),
        ];
        let eos: Vec<String> = model.eos_token_ids.iter().map(u32::to_string).collect();
        let numbers = numbers.map(|(name, number)| (name, number.to_string()));
        let texts = texts.map(|(name, text)| (name, text.clone()));
        texts.into_iter().chain(numbers).chain([("eos_token_ids", eos.join(" "))])
    };
    let differing = fields(first).zip(fields(other)).find(|((_, first), (_, other))| first != other);
    let ((name, first), (_, other)) = differing.expect("every field is listed");
    format!("{name} is {first:?} on rank 0 and {other:?} there")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_hold_different_models_are_told_apart_by_the_field_that_differs() {
        let model = Description { world_size: 2, vocab_size: 10, ..Description::default() };
        let check = |other: Description, expected: &str| {
            let error = agree_on_model(vec![model.clone(), other], 2).unwrap_err().to_string();
            assert!(error.starts_with("ranks 0 and 1 hold different models: ") && error.contains(expected), "{error}");
        };
        check(Description { vocab_size: 11, ..model.clone() }, "vocab_size is \"10\" on rank 0 and \"11\" there");
        check(Description { max_positions: 1, ..model.clone() }, "max_positions");
        check(Description { num_cache_groups: 1, ..model.clone() }, "num_cache_groups");
        check(Description { max_drafts: 1, ..model.clone() }, "max_drafts");
        check(Description { world_size: 1, ..model.clone() }, "world_size");
        check(
            Description { model_type: "llama".into(), ..model.clone() },
            "model_type is \"\" on rank 0 and \"llama\"",
        );
        check(Description { dtype: "x".into(), ..model.clone() }, "dtype");
        check(Description { device: "x".into(), ..model.clone() }, "device");
        check(Description { version: "x".into(), ..model.clone() }, "version");
        check(
            Description { eos_token_ids: vec![2, 3], ..model.clone() },
            "eos_token_ids is \"\" on rank 0 and \"2 3\"",
        );
    }
}
