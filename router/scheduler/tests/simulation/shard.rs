//! A shard that really reads a simulated KV cache.
//!
//! Every slot holds a digest of the ids up to it, and the next id is a digest of all slots of the context, read through
//! the block table. So a block that was handed out twice, freed too early or hit for the wrong prefix changes an answer.
//! The rows of one step run in random order, as on a device they run at once.

use std::collections::BTreeMap;

use scheduler::*;

pub const VOCAB: u64 = 256;

/// What a slot holds whose numbers are not finite. It spreads to every later position, and a sample over it fails.
const NOT_FINITE: u64 = u64::MAX;

#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E3779B97F4A7C15);
        digest_one(self.0)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn below_one_of(&mut self, limits: [usize; 3]) -> usize {
        let limit = limits[self.below(3)];
        self.below(limit)
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn digest_one(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
    z ^ (z >> 31)
}

pub fn digest(a: u64, b: u64) -> u64 {
    digest_one(a ^ b.rotate_left(31) ^ 0x9E3779B97F4A7C15)
}

/// What a slot holds after `before`, the slot of the position before it.
pub fn key_value(before: Option<u64>, namespace: Namespace, token: TokenId) -> u64 {
    digest(before.unwrap_or(digest(namespace.0, 1)), token as u64)
}

pub fn next_token(context: impl Iterator<Item = u64>) -> TokenId {
    (context.fold(7, digest) % VOCAB) as TokenId
}

/// What the shard meets when it computes a sequence, known to the test alone.
#[derive(Clone, Copy, Default)]
pub struct Fate {
    pub namespace: Namespace,
    /// The position whose computation kills the shard.
    pub kills_at: Option<usize>,
    /// The position whose computation yields numbers that are not finite. Nobody sees them before a sample does.
    pub fails_at: Option<usize>,
}

pub struct FakeShard {
    block_size: usize,
    kv: Vec<u64>,
    rows: BTreeMap<RowId, Held>,
    last_step: u64,
}

struct Held {
    id: SequenceId,
    incarnation: u32,
    block_size: usize,
    fate: Fate,
    token_ids: Vec<TokenId>,
    table: Vec<BlockId>,
    num_computed: usize,
    is_broken: bool,
}

/// The sequence that killed the shard.
pub struct Died(pub SequenceId);

impl FakeShard {
    pub fn new(limits: &Limits, epoch: u64) -> Self {
        let num_slots = (limits.num_blocks as usize * limits.block_size) as u64;
        Self {
            block_size: limits.block_size,
            kv: (0..num_slots).map(|slot| digest(epoch, slot)).collect(),
            rows: BTreeMap::new(),
            last_step: 0,
        }
    }

    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    pub fn run(
        &mut self,
        plan: &StepPlan,
        fates: impl Fn(SequenceId) -> Fate,
        rng: &mut Rng,
    ) -> Result<StepResult, Died> {
        assert!(plan.step > self.last_step, "plans arrive in order");
        self.last_step = plan.step;
        for a in &plan.admit {
            assert!(a.num_prompt <= a.token_ids.len() && a.num_cached < a.token_ids.len());
            assert_eq!(a.num_cached % self.block_size, 0);
            let held = Held {
                id: a.id,
                incarnation: a.incarnation,
                block_size: self.block_size,
                fate: fates(a.id),
                token_ids: a.token_ids.clone(),
                table: vec![],
                num_computed: a.num_cached,
                is_broken: false,
            };
            assert!(self.rows.insert(a.row, held).is_none(), "{:?} is admitted to a row in use", a.id);
        }
        let unanswered =
            |w: &Work| RowResult { row: w.row, incarnation: w.incarnation, computed: 0, tokens: Err(RowError) };
        let mut results: Vec<_> = plan.work.iter().map(unanswered).collect();
        let mut order: Vec<_> = (0..plan.work.len()).collect();
        (1..order.len()).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
        for i in order {
            results[i].tokens = self.run_row(&plan.work[i], rng)?;
            results[i].computed = self.rows[&plan.work[i].row].num_computed;
        }
        for row in &plan.release {
            assert!(self.rows.remove(row).is_some(), "{row:?} released but not held");
        }
        Ok(StepResult { epoch: plan.epoch, step: plan.step, rows: results })
    }

    fn run_row(&mut self, row: &Work, rng: &mut Rng) -> Result<Result<Vec<TokenId>, RowError>, Died> {
        let Extent { num_tokens, num_drafts, samples } = row.extent;
        let num_known = row.extent.num_known();
        let num_drafts_found = num_drafts - rng.below(num_drafts + 1) * rng.below(2);
        let held = self.rows.get_mut(&row.row).expect("a row of an admitted sequence");
        assert_eq!((held.id, held.incarnation), (row.id, row.incarnation), "the row is another's");
        held.table.extend(&row.new_blocks);
        let first = held.num_computed;
        let touched = first..first + num_known + num_drafts_found;
        if held.fate.kills_at.is_some_and(|p| touched.contains(&p)) {
            return Err(Died(row.id));
        }
        if held.is_broken {
            return Ok(Err(RowError));
        }
        assert!(num_known > 0, "a row computes something to sample from");
        assert!(first + num_tokens <= held.table.len() * self.block_size, "a row has room for the most it may do");
        for p in first..first + num_known {
            held.write(&mut self.kv, p, held.token_ids[p]);
        }
        held.num_computed += num_known;
        assert_eq!(samples, held.num_computed == held.token_ids.len(), "samples at the end of the log and only there");
        let tokens = if samples { held.sample(&mut self.kv, num_drafts_found, rng) } else { Ok(vec![]) };
        held.is_broken = tokens.is_err();
        Ok(tokens)
    }
}

impl Held {
    fn slot(&self, p: usize) -> usize {
        self.table[p / self.block_size].0 as usize * self.block_size + p % self.block_size
    }

    fn write(&self, kv: &mut [u64], p: usize, token: TokenId) {
        let before = p.checked_sub(1).map(|p| kv[self.slot(p)]);
        let is_finite = before != Some(NOT_FINITE) && self.fate.fails_at != Some(p);
        kv[self.slot(p)] = if is_finite { key_value(before, self.fate.namespace, token) } else { NOT_FINITE };
    }

    /// Guesses, some of them wrong, and yields the ids up to the first wrong guess and the right one in its place.
    fn sample(&mut self, kv: &mut [u64], num_drafts: usize, rng: &mut Rng) -> Result<Vec<TokenId>, RowError> {
        let end = self.num_computed + num_drafts;
        let mut yielded = vec![];
        loop {
            if kv[self.slot(self.num_computed - 1)] == NOT_FINITE {
                return Err(RowError);
            }
            let token = next_token((0..self.num_computed).map(|p| kv[self.slot(p)]));
            yielded.push(token);
            self.token_ids.push(token);
            if self.num_computed == end {
                return Ok(yielded);
            }
            let draft = if rng.one_in(3) { (token + 1) % VOCAB as TokenId } else { token };
            self.write(kv, self.num_computed, draft);
            if draft != token {
                // What follows a wrong guess has been written too.
                (self.num_computed + 1..end).for_each(|p| self.write(kv, p, 0));
                return Ok(yielded);
            }
            self.num_computed += 1;
        }
    }
}
