//! What the next step computes: who goes on, who makes way, who is admitted, and how much of prompts is read.

use super::{Retired, Scheduler};
use crate::planted::Bug;
use crate::sequence::Sequence;
use crate::step::{Admission, Extent, OpenRow, StepPlan, Work};

/// A plan in the making.
pub(super) struct Draft {
    pub(super) plan: StepPlan,
    pub(super) open: Vec<OpenRow>,
    /// Input tokens not yet given out.
    pub(super) budget: usize,
    /// Of these, what prompts may take.
    pub(super) prompt_budget: usize,
}

impl Scheduler {
    /// A suspect runs alone. Those found innocent before it step back behind it; their blocks stay cached.
    pub(super) fn make_way_for_suspect(&mut self) {
        let suspect_waits = self.waiting.front().is_some_and(Sequence::is_suspect);
        if suspect_waits
            && !self.running.iter().any(Sequence::is_suspect)
            && !self.planted.has(Bug::RunsSuspectsTogether)
        {
            while !self.running.is_empty() {
                self.preempt_newest();
            }
        }
    }

    /// Tokens of prompts that the next step may read. Where more are to be read than go on, they would wait for longer than what
    /// they read holds up the others; where at least half as many, up to twice as much is read as for the sake of a few.
    pub(super) fn prompt_budget(&self) -> usize {
        let going_on = self.running.iter().filter(|sequence| !sequence.has_prompt()).count();
        let admissible = self.waiting.len().min(self.limits.max_running - self.running.len());
        let reading = self.running.len() - going_on + admissible;
        if reading > going_on {
            return usize::MAX;
        }
        if 2 * reading <= going_on {
            self.prompt_tokens
        } else {
            self.prompt_tokens.saturating_mul(2 * reading) / going_on
        }
    }

    /// Returns whether there were blocks for all. Once somebody must wait for blocks, nobody younger may take any.
    pub(super) fn continue_running(&mut self, draft: &mut Draft) -> bool {
        let (mut i, mut may_grow) = (0, true);
        while i < self.running.len() && draft.budget > 0 {
            // An elder's prompt leaves the younger ones what a sampling row needs.
            let num_younger = self.running.len() - i - 1;
            let is_fair = !self.planted.has(Bug::StarvesYoungest);
            let reserved = if is_fair { num_younger * (1 + self.limits.max_drafts) } else { 0 };
            let budget = if self.running[i].has_prompt() {
                draft.prompt_budget.min(draft.budget - reserved)
            } else {
                draft.budget - reserved
            };
            if budget == 0 {
                i += 1;
                continue;
            }
            if let Some(extent) = self.running[i].next_extent(budget, self.limits.max_drafts) {
                let num_missing = self.running[i].num_missing_blocks(extent, self.limits.block_size);
                let may_take = may_grow || self.planted.has(Bug::ForgetsElder);
                let has_room = may_take && self.make_room(i, num_missing);
                may_grow = may_grow && has_room;
                if has_room || num_missing == 0 && i < self.running.len() {
                    self.push_work(i, extent, num_missing, draft);
                }
            }
            i += 1;
        }
        may_grow
    }

    /// Whether `running[i]` may take so many blocks now. Preempts the newest, at last itself, as long as there will be
    /// too few; what open steps hold back is worth waiting for.
    fn make_room(&mut self, i: usize, num_missing: usize) -> bool {
        while num_missing > self.pool.num_free() {
            let num_retired: usize = self.retired.values().map(|retired| retired.blocks.ids.len()).sum();
            if num_missing <= self.pool.num_free() + num_retired || i >= self.running.len() {
                return false;
            }
            self.preempt_newest();
        }
        i < self.running.len()
    }

    pub(super) fn admit_waiting(&mut self, draft: &mut Draft) {
        while draft.budget.min(draft.prompt_budget) > 0
            && self.running.len() < self.limits.max_running
            && self.may_admit_next()
        {
            let mut sequence = self.waiting.pop_front().expect("may_admit_next has seen it");
            let num_free = self.pool.num_free();
            sequence.blocks = self.pool.acquire_prefix(sequence.reusable_ids(), sequence.namespace);
            sequence.num_computed = sequence.blocks.ids.len() * self.limits.block_size;
            let budget = draft.budget.min(draft.prompt_budget);
            let extent = sequence.next_extent(budget, self.limits.max_drafts).expect("nothing of it is in flight");
            let num_missing = sequence.num_missing_blocks(extent, self.limits.block_size);
            if num_missing > self.pool.num_free() {
                self.too_few_blocks_for = Some((sequence.id, num_missing + num_free - self.pool.num_free()));
                self.pool.release(sequence.take_blocks());
                self.waiting.push_front(sequence);
                return;
            }
            let row = self.free_rows.pop_first().expect("twice max_running rows suffice");
            sequence.row = Some(row);
            sequence.incarnation += 1;
            draft.plan.admit.push(Admission {
                row,
                id: sequence.id,
                incarnation: sequence.incarnation,
                token_ids: sequence.token_ids.clone(),
                num_prompt: sequence.num_prompt,
                num_cached: sequence.num_computed,
            });
            let i = self.running.partition_point(|s| s.id < sequence.id);
            self.running.insert(i, sequence);
            self.push_work(i, extent, num_missing, draft);
        }
    }

    fn may_admit_next(&self) -> bool {
        let Some(next) = self.waiting.front() else { return false };
        // After a preemption: its log is complete, and its release goes out with a plan before.
        let is_settled = next.in_flight.num_rows == 0 || self.planted.has(Bug::ReadmitsUnsettled);
        let is_released =
            self.release.iter().all(|(_, id)| *id != next.id) || self.planted.has(Bug::ReadmitsUnreleased);
        let is_alone = self.running.is_empty() && self.open.is_empty();
        let is_among_suspects =
            self.running.iter().any(Sequence::is_suspect) || self.retired.values().any(|retired| retired.is_suspect);
        let may_mix = !next.is_suspect() && !is_among_suspects;
        let may_run = is_alone || may_mix || self.planted.has(Bug::RunsSuspectsTogether);
        let lacks_blocks =
            self.too_few_blocks_for.is_some_and(|(id, needed)| id == next.id && self.pool.num_free() < needed);
        is_settled && is_released && may_run && !lacks_blocks
    }

    /// Adds work for `running[i]`, for which there are blocks.
    fn push_work(&mut self, i: usize, extent: Extent, num_missing: usize, draft: &mut Draft) {
        let sequence = &mut self.running[i];
        let row = sequence.row.expect("a running sequence has a row");
        // The first row of an incarnation brings its hit blocks.
        let is_first = draft.plan.admit.last().is_some_and(|admission| admission.row == row);
        let num_sent = if is_first { 0 } else { sequence.blocks.ids.len() };
        self.pool.grow(&mut sequence.blocks, num_missing);
        if sequence.has_prompt() {
            draft.prompt_budget = draft.prompt_budget.saturating_sub(extent.num_tokens);
        }
        sequence.open(draft.plan.step, extent);
        draft.budget -= extent.num_tokens;
        let Sequence { id, incarnation, .. } = *sequence;
        draft.open.push(OpenRow { row, id, incarnation, extent, index: i });
        let new_blocks = sequence.blocks.ids[num_sent..].to_vec();
        draft.plan.work.push(Work { row, id, incarnation, extent, new_blocks });
    }

    fn preempt_newest(&mut self) {
        let sequence = match self.planted.has(Bug::PreemptsEldest) {
            true => self.running.remove(0),
            false => self.running.pop().expect("only called while something runs"),
        };
        let sequence = self.retire(sequence);
        let i = self.waiting.partition_point(|s| s.precedence() < sequence.precedence());
        let i = if self.planted.has(Bug::RequeuesAtTheBack) { self.waiting.len() } else { i };
        self.waiting.insert(i, sequence);
    }

    /// The shards may forget an admitted sequence; its blocks are freed once no open step can touch them.
    pub(super) fn retire(&mut self, mut sequence: Sequence) -> Sequence {
        let row = sequence.row.expect("a running sequence has a row");
        self.release.push((row, sequence.id));
        if self.planted.has(Bug::ReusesReleasedRow) {
            self.free_rows.insert(row);
        }
        let num_computed = Some(sequence.num_computed);
        let mut blocks = sequence.take_blocks();
        if sequence.in_flight.num_rows == 0 || self.planted.has(Bug::FreesBlocksOfOpenSteps) {
            self.pool.release(std::mem::take(&mut blocks));
        }
        if sequence.in_flight.num_rows > 0 {
            let last_step = sequence.in_flight.last_step;
            let is_suspect = sequence.is_suspect();
            self.retired.insert(sequence.id, Retired { blocks, last_step, num_computed, is_suspect });
        }
        sequence
    }
}
