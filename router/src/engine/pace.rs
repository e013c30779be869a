//! How long steps take, and how much of prompts a step may read so that those who go on are not held up. Pure.

use scheduler::{Extent, StepPlan};

/// What reading prompts may add to a step, as a part of what the step takes without: the time between two tokens is to stay
/// below twice the usual one, with something to spare for a machine that does other things, too. Of this the scheduler makes up
/// to twice as much where many wait to be read.
const SHARE: f64 = 0.5;

/// The weight of the latest step in what is expected of the next one.
const LATEST: f64 = 0.2;

/// So many tokens count as much as a step.
const WHOLE_STEP: f64 = 64.0;

/// Of the largest step, what prompts may always take: in smaller parts they would cost more than they need to.
const LEAST_PART: usize = 32;

/// What steps have taken.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Pace {
    /// Of a step in which nobody reads, in microseconds.
    going_on: Option<f64>,
    /// What a token of a prompt adds to a step, in microseconds.
    token: Option<f64>,
}

impl Pace {
    /// Takes note of what a step took, in microseconds; zero if nobody has measured it.
    pub fn note(&mut self, step: &StepPlan, micros: u64) {
        let reads = |extent: &Extent| extent.num_known() > 1 || !extent.samples;
        let tokens: usize =
            step.work.iter().map(|work| work.extent).filter(reads).map(|extent| extent.num_tokens).sum();
        let (micros, tokens) = (micros as f64, tokens as f64);
        if micros == 0.0 || step.work.is_empty() {
            return;
        }
        if tokens == 0.0 {
            self.going_on = Some(blend(self.going_on, micros, LATEST));
            return;
        }
        // Alone, it takes what any step takes, too.
        let is_alone = step.work.iter().all(|work| reads(&work.extent));
        let rest = if is_alone { Some(0.0) } else { self.going_on };
        if let Some(rest) = rest {
            let each = (micros - rest).max(0.0) / tokens;
            self.token = Some(blend(self.token, each, LATEST * (tokens / WHOLE_STEP).min(1.0)));
        }
    }

    /// How many tokens of prompts the next step may read beside those who go on.
    pub fn prompt_tokens(&self, max_step_tokens: usize) -> usize {
        let (Some(going_on), Some(token)) = (self.going_on, self.token) else { return max_step_tokens };
        let least = (max_step_tokens / LEAST_PART).max(1);
        ((SHARE * going_on / token.max(f64::MIN_POSITIVE)) as usize).clamp(least, max_step_tokens.max(least))
    }
}

fn blend(before: Option<f64>, latest: f64, weight: f64) -> f64 {
    before.map_or(latest, |before| before + weight * (latest - before))
}

#[cfg(test)]
mod tests {
    use scheduler::{RowId, SequenceId, Work};

    use super::*;

    /// A step of so many rows that go on, and of prompts of these lengths.
    fn step(going_on: usize, prompts: &[usize]) -> StepPlan {
        let lengths = std::iter::repeat_n(1, going_on).chain(prompts.iter().copied());
        let work = |(row, num_tokens)| Work {
            row: RowId(row),
            id: SequenceId(row.into()),
            incarnation: 1,
            extent: Extent { num_tokens, num_drafts: 0, samples: true },
            new_blocks: vec![],
        };
        StepPlan { epoch: 1, step: 1, release: vec![], admit: vec![], work: (0..).zip(lengths).map(work).collect() }
    }

    #[test]
    fn nothing_is_limited_before_both_are_known() {
        let mut pace = Pace::default();
        assert_eq!(pace.prompt_tokens(512), 512);
        pace.note(&step(4, &[]), 100_000);
        assert_eq!(pace.prompt_tokens(512), 512);
        let mut pace = Pace::default();
        pace.note(&step(0, &[128]), 256_000);
        pace.note(&step(4, &[128]), 256_000);
        assert_eq!(pace.prompt_tokens(512), 512);
        // Nobody has measured these.
        pace.note(&step(4, &[]), 0);
        assert_eq!(pace.prompt_tokens(512), 512);
    }

    #[test]
    fn a_prompt_adds_a_part_of_what_a_step_takes_without() {
        let mut pace = Pace::default();
        pace.note(&step(16, &[]), 100_000);
        pace.note(&step(16, &[100, 28]), 100_000 + 128 * 1_000);
        assert_eq!(pace.prompt_tokens(512), 50);
        // What is slower later is noticed, and what is faster.
        for _ in 0..60 {
            pace.note(&step(16, &[64]), 100_000 + 64 * 500);
        }
        assert!((95..=100).contains(&pace.prompt_tokens(512)), "{pace:?}");
        for _ in 0..60 {
            pace.note(&step(16, &[]), 50_000);
        }
        assert!((47..=50).contains(&pace.prompt_tokens(512)), "{pace:?}");
    }

    #[test]
    fn what_every_step_with_a_prompt_costs_does_not_make_parts_ever_smaller() {
        let mut pace = Pace::default();
        pace.note(&step(8, &[]), 1_000);
        for _ in 0..200 {
            let tokens = pace.prompt_tokens(4096);
            pace.note(&step(8, &[tokens]), 1_000 + 5_000 + tokens as u64);
        }
        assert_eq!(pace.prompt_tokens(4096), 128);
        // Where it costs less than what is allowed, the sum of both is met.
        let mut pace = Pace::default();
        pace.note(&step(8, &[]), 10_000);
        for _ in 0..200 {
            let tokens = pace.prompt_tokens(4096);
            pace.note(&step(8, &[tokens]), 10_000 + 2_000 + 4 * tokens as u64);
        }
        assert!((700..=800).contains(&pace.prompt_tokens(4096)), "{pace:?}");
    }

    #[test]
    fn steps_that_take_no_time_at_all_are_no_trouble() {
        let mut pace = Pace::default();
        pace.note(&step(1, &[]), 5);
        pace.note(&step(1, &[9]), 1);
        assert_eq!(pace.prompt_tokens(8), 8);
        assert_eq!(Pace { going_on: Some(1.0), token: Some(1e9) }.prompt_tokens(8), 1);
    }
}
