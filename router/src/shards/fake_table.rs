//! What a fake rank computes: rows, a cache of digests, and ids that depend on all of it.

use std::collections::HashMap;
use std::ops::Range;

use scheduler::{Admission, TokenId, Work};

use super::{Answer, Plan, PromptLogprob, RowAnswer, RowFailure, Sampled, Terms, Timings, Warmup};
use crate::request::Sampling;

/// What became of a plan.
pub(super) enum Ran {
    Answered(Answer),
    Died,
}

/// The shard's rows and its cache.
#[derive(Debug)]
pub(super) struct Table {
    epoch: u64,
    block_size: usize,
    max_rows: u32,
    ids: Range<TokenId>,
    kv: Vec<u64>,
    rows: HashMap<u32, Held>,
    last_step: u64,
}

#[derive(Debug)]
struct Held {
    sequence: u64,
    incarnation: u32,
    token_ids: Vec<TokenId>,
    /// Of everything but the ids that decides what is drawn.
    key: u64,
    top_n: u32,
    /// The places of the prompt's ids whose log-probabilities are wanted.
    prompt_wanted: Range<usize>,
    blocks: Vec<u32>,
    num_computed: usize,
    is_broken: bool,
}

/// What a row has yielded.
type Yielded = (Result<Vec<Sampled>, RowFailure>, Vec<PromptLogprob>);

impl Table {
    /// Rows in use.
    pub fn num_rows(&self) -> u32 {
        self.rows.len() as u32
    }

    /// The last that was computed.
    pub fn last_step(&self) -> u64 {
        self.last_step
    }

    pub fn new(warmup: Warmup, ids: Range<TokenId>) -> Self {
        let num_slots = u64::from(warmup.num_blocks) * u64::from(warmup.block_size);
        Self {
            epoch: warmup.epoch,
            block_size: warmup.block_size as usize,
            max_rows: 2 * warmup.max_running,
            ids,
            // What was never written is different in every epoch, so that reading it shows.
            kv: (0..num_slots).map(|slot| digest(warmup.epoch, slot)).collect(),
            rows: HashMap::new(),
            last_step: 0,
        }
    }

    /// Does what a plan says; an error if the plan breaks the contract.
    pub fn run(&mut self, plan: &Plan, poison: Option<TokenId>, killer: Option<TokenId>) -> Result<Ran, String> {
        let step = &plan.step;
        if step.epoch != self.epoch || step.step <= self.last_step {
            return Err(format!(
                "step {} of epoch {} after step {} of {}",
                step.step, step.epoch, self.last_step, self.epoch
            ));
        }
        self.last_step = step.step;
        if plan.terms.len() != step.admit.len() {
            return Err(format!("{} terms for {} admissions", plan.terms.len(), step.admit.len()));
        }
        for (admission, terms) in step.admit.iter().zip(&plan.terms) {
            self.admit(admission, terms)?;
        }
        let mut hash = digest(step.epoch, step.step);
        let mut rows = vec![];
        for work in &step.work {
            let Some((sampled, prompt)) = self.work(work, poison, killer)? else { return Ok(Ran::Died) };
            let held = &self.rows[&work.row.0];
            hash = digest(digest(hash, work.row.0.into()), held.sequence);
            hash = digest(hash, held.num_computed as u64);
            hash = held.blocks.iter().chain(held.token_ids.last()).fold(hash, |hash, id| digest(hash, u64::from(*id)));
            let (row, incarnation, computed) = (work.row, work.incarnation, held.num_computed as u32);
            rows.push(RowAnswer { row, incarnation, computed, sampled, prompt });
        }
        for row in &step.release {
            self.rows.remove(&row.0).ok_or_else(|| format!("row {} is released but not held", row.0))?;
        }
        let (epoch, step) = (step.epoch, step.step);
        Ok(Ran::Answered(Answer { epoch, step, table_digest: hash, rows, timings: Timings::default() }))
    }

    fn admit(&mut self, admission: &Admission, Terms { sampling, prompt_logprobs_from }: &Terms) -> Result<(), String> {
        let Admission { row, id, incarnation, token_ids, num_prompt, num_cached } = admission;
        if row.0 >= self.max_rows || num_prompt > &token_ids.len() || num_cached >= &token_ids.len() {
            return Err(format!("cannot admit {admission:?}"));
        }
        let held = Held {
            sequence: id.0,
            incarnation: *incarnation,
            token_ids: token_ids.clone(),
            key: key(sampling, *num_prompt),
            top_n: sampling.top_n,
            prompt_wanted: prompt_logprobs_from.map_or(0..0, |from| from as usize..*num_prompt),
            blocks: vec![],
            num_computed: *num_cached,
            is_broken: false,
        };
        match self.rows.insert(row.0, held) {
            None => Ok(()),
            Some(former) => Err(format!("row {} is given to {} and held by {}", row.0, id.0, former.sequence)),
        }
    }

    /// The ids of a row, or its failure; nothing if the process dies of it.
    fn work(
        &mut self,
        work: &Work,
        poison: Option<TokenId>,
        killer: Option<TokenId>,
    ) -> Result<Option<Yielded>, String> {
        let held = self.rows.get_mut(&work.row.0).ok_or_else(|| format!("row {} is not held", work.row.0))?;
        if held.incarnation != work.incarnation {
            return Err(format!("row {} holds {}.{}: {work:?}", work.row.0, held.sequence, held.incarnation));
        }
        held.blocks.extend(work.new_blocks.iter().map(|block| block.0));
        let num_known = work.extent.num_tokens - work.extent.num_drafts;
        let inputs = held.num_computed..held.num_computed + num_known;
        if inputs.end > held.token_ids.len() || inputs.end > held.blocks.len() * self.block_size {
            let (log, blocks) = (held.token_ids.len(), held.blocks.len());
            return Err(format!("no ids or room for {inputs:?}: {log} ids, {blocks} blocks"));
        }
        let computes = |id: Option<TokenId>| id.is_some_and(|id| held.token_ids[inputs.clone()].contains(&id));
        if computes(killer) {
            return Ok(None);
        }
        held.is_broken |= computes(poison);
        if held.is_broken {
            let message = "logits are not finite (poisoned)".into();
            return Ok(Some((Err(RowFailure { kind: "numerical", message }), vec![])));
        }
        let mut prompt = vec![];
        for position in inputs {
            let before = position.checked_sub(1).map_or(1, |before| self.kv[held.slot(before, self.block_size)]);
            let slot = held.slot(position, self.block_size);
            self.kv[slot] = digest(before, held.token_ids[position].into());
            if held.prompt_wanted.contains(&(position + 1)) {
                let drawn = digest(self.kv[slot], held.token_ids[position + 1].into());
                let top = (0..held.top_n).map(|n| (n, logprob(drawn) - n as f32)).collect();
                prompt.push(PromptLogprob { logprob: logprob(drawn), top });
            }
        }
        held.num_computed += num_known;
        if work.extent.samples != (held.num_computed == held.token_ids.len()) {
            return Err(format!("a row samples at the end of the log and only there: {work:?}"));
        }
        if !work.extent.samples {
            return Ok(Some((Ok(vec![]), prompt)));
        }
        let context = (0..held.num_computed).map(|position| self.kv[held.slot(position, self.block_size)]);
        let drawn = context.fold(held.key, digest);
        let id = |drawn: u64| self.ids.start + (drawn % u64::from(self.ids.end - self.ids.start)) as TokenId;
        let top = (0..u64::from(held.top_n)).map(|n| (id(drawn.wrapping_add(n)), logprob(drawn) - n as f32)).collect();
        held.token_ids.push(id(drawn));
        Ok(Some((Ok(vec![Sampled { id: id(drawn), logprob: logprob(drawn), top }]), prompt)))
    }
}

impl Held {
    fn slot(&self, position: usize, block_size: usize) -> usize {
        self.blocks[position / block_size] as usize * block_size + position % block_size
    }
}

fn logprob(drawn: u64) -> f32 {
    -((drawn >> 40) as f32) / (1 << 24) as f32
}

fn key(sampling: &Sampling, num_prompt: usize) -> u64 {
    // All that decides what is drawn, whatever is added to it; what is reported beside it does not.
    let drawn = format!("{num_prompt} {:?}", Sampling { top_n: 0, ..sampling.clone() });
    drawn.bytes().map(u64::from).fold(7, digest)
}

/// Mixes two words (the finalizer of SplitMix64: Steele, Lea and Flood 2014).
fn digest(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.rotate_left(31) ^ 0x9E37_79B9_7F4A_7C15;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
