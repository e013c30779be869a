//! What can be served: the operator's wishes, the model's facts and the memory's blocks, brought together. Pure.

use std::sync::Arc;

use scheduler::Limits;

use super::ModelFacts;
use crate::args::{Args, DEFAULT_BLOCK_SIZE};
use crate::shards::{Description, Warmup};

/// What the operator asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wishes {
    /// Longest prompt.
    pub max_input_tokens: Option<usize>,
    /// Longest sequence.
    pub max_total_tokens: Option<usize>,
    /// Input tokens of one step.
    pub max_step_tokens: Option<usize>,
    /// Tokens in the KV cache.
    pub max_cached_tokens: Option<usize>,
    /// Sequences that run at once.
    pub max_running: Option<usize>,
    /// Sequences that wait or run.
    pub max_concurrent: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Steps in flight.
    pub max_open_steps: usize,
}

impl Default for Wishes {
    /// What the command line gives without flags.
    fn default() -> Self {
        Self {
            max_input_tokens: None,
            max_total_tokens: None,
            max_step_tokens: None,
            max_cached_tokens: None,
            max_running: None,
            max_concurrent: 128,
            block_size: DEFAULT_BLOCK_SIZE,
            max_open_steps: 2,
        }
    }
}

impl From<&Args> for Wishes {
    fn from(args: &Args) -> Self {
        Self {
            max_input_tokens: args.limits.max_input_tokens,
            max_total_tokens: args.limits.max_total_tokens,
            max_step_tokens: args.batch.max_batch_prefill_tokens,
            max_cached_tokens: args.batch.max_batch_total_tokens,
            max_running: args.batch.max_batch_size,
            max_concurrent: args.limits.max_concurrent_requests,
            block_size: args.batch.block_size,
            max_open_steps: args.pipeline_depth.into(),
        }
    }
}

/// What was asked for cannot be served by this model in this memory.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct CannotServe(pub String);

/// Bounds that hold before the blocks are counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bounds {
    /// Sequences that run at once.
    pub max_running: usize,
    /// Input tokens of one step.
    pub max_step_tokens: usize,
    /// The longest sequence, if blocks suffice.
    pub max_total_tokens: usize,
    /// Blocks that could ever be used at once.
    pub max_blocks: u32,
}

/// Tokens of a step by default, where the device is not a CPU and where it is.
const STEP_TOKENS: usize = 4096;
const STEP_TOKENS_CPU: usize = 512;

/// Judges the wishes by what the model says of itself.
pub fn bounds(wishes: &Wishes, model: &Description) -> Result<Bounds, CannotServe> {
    let positions = model.max_positions as usize;
    let facts = [
        ("max_positions", model.max_positions, positions >= 2, "at least 2, one for the prompt and one for the answer"),
        ("vocab_size", model.vocab_size, model.vocab_size > 0, "at least 1"),
        ("num_cache_groups", model.num_cache_groups, model.num_cache_groups == 1, "1"),
    ];
    if let Some((name, found, _, expected)) = facts.into_iter().find(|(_, _, is_fine, _)| !is_fine) {
        return Err(CannotServe(format!(
            "the shards describe a model that cannot be served: {name} is {found}, expected {expected}; use another model"
        )));
    }
    if let Some(asked) = wishes.max_total_tokens.filter(|asked| *asked > positions) {
        let advice = format!("use --max-total-tokens {positions} or less");
        return Err(CannotServe(format!(
            "--max-total-tokens {asked} exceeds the model's {positions} positions; {advice}"
        )));
    }
    if let Some(asked) = wishes.max_input_tokens.filter(|asked| *asked >= positions) {
        let most = positions - 1;
        return Err(CannotServe(format!(
            "--max-input-tokens {asked} and a token of the answer exceed the model's {positions} positions; use \
             --max-input-tokens {most} or less"
        )));
    }
    let default = positions.min(if model.device == "cpu" { STEP_TOKENS_CPU } else { STEP_TOKENS });
    let max_running = match (wishes.max_running, wishes.max_step_tokens) {
        (Some(asked), _) => asked,
        (None, Some(step_tokens)) => wishes.max_concurrent.min(step_tokens),
        (None, None) => wishes.max_concurrent,
    };
    let max_total_tokens = wishes.max_total_tokens.unwrap_or(positions);
    let blocks_used = max_running.saturating_mul(max_total_tokens.div_ceil(wishes.block_size));
    let blocks_allowed = wishes.max_cached_tokens.map_or(usize::MAX, |tokens| tokens / wishes.block_size);
    Ok(Bounds {
        max_running,
        max_step_tokens: wishes.max_step_tokens.unwrap_or(default.max(max_running)),
        max_total_tokens,
        max_blocks: u32::try_from(blocks_used.min(blocks_allowed)).unwrap_or(u32::MAX),
    })
}

impl Bounds {
    /// The question to the shards: how many blocks fit, or allocate so many.
    pub fn warmup(&self, epoch: u64, block_size: usize, num_blocks: u32) -> Warmup {
        Warmup {
            epoch,
            block_size: block_size as u32,
            max_running: self.max_running as u32,
            max_step_tokens: self.max_step_tokens as u32,
            max_total_tokens: self.max_total_tokens as u32,
            num_blocks,
        }
    }
}

/// What is told to clients and to the scheduler, now that the number of blocks is agreed.
#[derive(Clone, Debug)]
pub struct Agreed {
    /// For the scheduler.
    pub limits: Limits,
    /// For clients.
    pub facts: Arc<ModelFacts>,
}

/// Judges the wishes by the blocks that the ranks agreed on. After a restart with fewer blocks nothing is refused that
/// can be served shorter: sequences that no longer fit end on their own.
pub fn agree(wishes: &Wishes, model: &Description, num_blocks: u32, is_restart: bool) -> Result<Agreed, CannotServe> {
    let bounds = bounds(wishes, model)?;
    let block_size = wishes.block_size;
    let cached = num_blocks as usize * block_size;
    let asked = wishes.max_total_tokens.into_iter().chain(wishes.max_input_tokens.map(|input| input + 1)).max();
    let max_total_tokens = bounds.max_total_tokens.min(cached);
    if max_total_tokens < 2 {
        let advice = "give the shards more memory, or lower --max-batch-prefill-tokens";
        return Err(CannotServe(format!(
            "no room for the KV cache: {num_blocks} blocks of {block_size} tokens; {advice}"
        )));
    }
    if let Some(asked) = asked.filter(|asked| *asked > max_total_tokens && !is_restart) {
        return Err(CannotServe(format!(
            "the KV cache holds {num_blocks} blocks of {block_size} tokens, so one sequence has at most {max_total_tokens} \
             tokens; {asked} were asked for; use --max-total-tokens {max_total_tokens} --max-input-tokens {} or less, or \
             give more memory",
            max_total_tokens - 1
        )));
    }
    let limits = Limits {
        max_step_tokens: bounds.max_step_tokens,
        max_running: bounds.max_running,
        max_open_steps: wishes.max_open_steps,
        // The router asks for none yet, whatever the shards could verify.
        max_drafts: 0,
        block_size,
        num_blocks,
        eos: model.eos_token_ids.clone(),
    };
    let facts = ModelFacts {
        model_type: model.model_type.clone(),
        dtype: model.dtype.clone(),
        device: model.device.clone(),
        vocab_size: model.vocab_size,
        eos_token_ids: model.eos_token_ids.clone(),
        max_input_tokens: wishes.max_input_tokens.unwrap_or(usize::MAX).min(max_total_tokens - 1),
        max_total_tokens,
        num_blocks,
        block_size,
        world_size: model.world_size,
    };
    Ok(Agreed { limits, facts: Arc::new(facts) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(max_positions: u32, device: &str) -> Description {
        let device = device.into();
        Description { max_positions, device, vocab_size: 10, num_cache_groups: 1, ..Default::default() }
    }

    #[test]
    fn the_step_budget_follows_device_positions_and_running_sequences() {
        let check = |max_positions, device, max_running, expected| {
            let bounds = bounds(&Wishes { max_running, ..Wishes::default() }, &model(max_positions, device)).unwrap();
            assert_eq!(bounds.max_step_tokens, expected, "{max_positions} {device} {max_running:?}");
        };
        check(2048, "cpu", None, 512);
        check(300, "cpu", None, 300);
        check(64, "cpu", None, 128);
        check(2048, "cpu", Some(1000), 1000);
        check(32768, "cuda", None, 4096);
        check(2048, "cuda", None, 2048);
    }

    #[test]
    fn a_small_step_budget_lowers_the_number_of_running_sequences() {
        let bounds = bounds(&Wishes { max_step_tokens: Some(8), ..Wishes::default() }, &model(64, "cpu")).unwrap();
        assert_eq!((bounds.max_running, bounds.max_step_tokens, bounds.max_blocks), (8, 8, 8 * 4));
    }

    #[test]
    fn the_longest_sequence_follows_positions_and_blocks() {
        let check = |num_blocks, total, input| {
            let facts = agree(&Wishes::default(), &model(2048, "cpu"), num_blocks, false).unwrap().facts;
            assert_eq!((facts.max_total_tokens, facts.max_input_tokens), (total, input), "{num_blocks}");
        };
        check(1000, 2048, 2047);
        check(10, 160, 159);
        check(1, 16, 15);
    }

    #[test]
    fn a_model_that_cannot_be_served_is_refused_by_the_field_that_is_wrong() {
        let good = model(64, "cpu");
        for (model, expected) in [
            (Description { max_positions: 1, ..good.clone() }, "max_positions is 1, expected at least 2"),
            (Description { vocab_size: 0, ..good.clone() }, "vocab_size is 0, expected at least 1"),
            (Description { num_cache_groups: 2, ..good.clone() }, "num_cache_groups is 2, expected 1;"),
        ] {
            let CannotServe(reason) = bounds(&Wishes::default(), &model).unwrap_err();
            assert!(reason.contains(expected) && !reason.contains("Description"), "{reason}");
        }
        let asked = Wishes { max_input_tokens: Some(64), ..Wishes::default() };
        let CannotServe(reason) = bounds(&asked, &good).unwrap_err();
        assert!(reason.contains("--max-input-tokens 64") && reason.contains("use --max-input-tokens 63"), "{reason}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_largest_values_that_do() {
        let asked = Wishes { max_total_tokens: Some(1000), ..Wishes::default() };
        let CannotServe(reason) = agree(&asked, &model(2048, "cpu"), 10, false).unwrap_err();
        assert!(reason.contains("1000 were asked for; use --max-total-tokens 160 --max-input-tokens 159"), "{reason}");
        assert_eq!(agree(&asked, &model(2048, "cpu"), 10, true).unwrap().facts.max_total_tokens, 160);
        let CannotServe(reason) = agree(&asked, &model(512, "cpu"), 1000, false).unwrap_err();
        assert!(reason.contains("512 positions; use --max-total-tokens 512"), "{reason}");
        let CannotServe(reason) = agree(&Wishes::default(), &model(512, "cpu"), 0, true).unwrap_err();
        assert!(reason.contains("0 blocks"), "{reason}");
    }
}
