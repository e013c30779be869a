//! Tells a rank that hangs from one that computes, waits, or has nothing to do. Pure.
//!
//! A rank is judged by what it answers to `Health` and by the processor time it uses. Time is counted from sample to
//! sample and capped, so that a launcher that was itself stopped for a while blames nobody.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What a shard is doing, in the order in which it gets there.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Phase {
    /// Importing its libraries.
    Importing,
    /// Reading weights.
    Loading,
    /// Waiting to be joined.
    Loaded,
    /// Forming a group.
    Joining,
    /// Sizing or allocating the cache.
    WarmingUp,
    /// Computing steps, or ready to.
    Serving,
    /// It could not load the model and ends.
    Failed,
}

impl Phase {
    /// Whether the router may join the rank.
    pub fn is_loaded(self) -> bool {
        self >= Self::Loaded && self != Self::Failed
    }

    fn name(self) -> &'static str {
        match self {
            Self::Importing => "importing libraries",
            Self::Loading => "loading",
            Self::Loaded => "loaded",
            Self::Joining => "joining",
            Self::WarmingUp => "warming up",
            Self::Serving => "serving",
            Self::Failed => "failed",
        }
    }
}

/// An answer to `Health`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Health {
    /// What it is doing.
    pub phase: Phase,
    /// The same in its own words; may be empty.
    pub detail: String,
    /// Of `total`, within the phase.
    pub done: u64,
    /// Zero where unknown.
    pub total: u64,
    /// The highest epoch it has seen.
    pub epoch: u64,
    /// The last completed step.
    pub step: u64,
    /// Rises with every layer computed and every tensor loaded.
    pub progress: u64,
    /// A plan, a join or a warm-up is being worked on.
    pub busy: bool,
    /// It can only go on when another rank has done its part.
    pub waits: bool,
}

impl Health {
    /// A process in this phase that has done nothing yet.
    pub fn of(phase: Phase) -> Self {
        Self {
            phase,
            detail: String::new(),
            done: 0,
            total: 0,
            epoch: 0,
            step: 0,
            progress: 0,
            busy: false,
            waits: false,
        }
    }

    /// For people: `loading 45 % of 13.6 MB`.
    pub fn describe(&self) -> String {
        let phase = self.phase.name();
        match (self.phase, self.total) {
            (Phase::Loading, total) if total > 0 => {
                format!("{phase} {} % of {}", self.done.min(total) * 100 / total, crate::plan::bytes(total))
            }
            (Phase::Failed, _) if !self.detail.is_empty() => format!("{phase}: {}", self.detail),
            _ => phase.to_owned(),
        }
    }

    /// What changes whenever the rank gets anywhere.
    fn position(&self) -> (Phase, u64, u64, u64, u64) {
        (self.phase, self.done, self.epoch, self.step, self.progress)
    }
}

/// One look at a rank.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sample {
    /// Absent: it did not answer in time.
    pub health: Option<Health>,
    /// Processor time used since its start, over all threads. Absent: unreadable.
    pub processor_time: Option<Duration>,
    /// The kernel's letter for what the process does: R runs, S sleeps, T is stopped. Absent: unreadable.
    pub state: Option<char>,
}

/// Without progress and without processor time for this long: hung.
const QUIET_LIMIT: Duration = Duration::from_secs(5);
/// Without progress for this long: hung, whatever processor time it uses.
const STUCK_LIMIT: Duration = Duration::from_secs(60);
/// A rank is given this many times its slow steps.
const STEPS: u32 = 5;
/// The most that the time between two samples counts.
const LONGEST_GAP: Duration = Duration::from_secs(2);
/// Less than this, or a twentieth of the time between two samples, is using no processor: answering `Health` costs some.
const IDLE_TIME: Duration = Duration::from_millis(20);
/// Step times that the slow ones are taken from.
const STEP_TIMES: usize = 256;

/// What is known of one process of a rank.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    last: Option<(Instant, Sample)>,
    health: Option<Health>,
    /// No progress while busy or unanswering.
    stuck: Duration,
    /// The end of `stuck` in which no processor time was used.
    quiet: Duration,
    /// The last answers failed to come.
    unanswered: Duration,
    step_started: Option<Instant>,
    step_times: VecDeque<Duration>,
}

impl Watch {
    /// Takes a sample. Answers whether the rank got anywhere since the last one.
    pub fn observe(&mut self, now: Instant, sample: Sample) -> bool {
        let gap = self.last.as_ref().map_or(Duration::ZERO, |(then, _)| now.saturating_duration_since(*then));
        let gap = gap.min(LONGEST_GAP);
        let moved = match (&sample.health, &self.health) {
            (Some(new), Some(old)) => new.position() != old.position(),
            (Some(_), None) => true,
            (None, _) => false,
        };
        let was_waiting = self.is_waiting();
        self.time_steps(now, &sample);
        let uses_processor = self.uses_processor(&sample, gap);
        if let Some(health) = &sample.health {
            self.health = Some(health.clone());
            self.unanswered = Duration::ZERO;
        } else {
            self.unanswered += gap;
        }
        if moved || !was_waiting || !self.is_waiting() {
            (self.stuck, self.quiet) = (Duration::ZERO, Duration::ZERO);
        } else {
            self.stuck += gap;
            self.quiet = if uses_processor { Duration::ZERO } else { self.quiet + gap };
        }
        self.last = Some((now, sample));
        moved
    }

    /// The last answer.
    pub fn health(&self) -> Option<&Health> {
        self.health.as_ref()
    }

    /// Whether the last sample was answered.
    pub fn answers(&self) -> bool {
        self.last.as_ref().is_some_and(|(_, sample)| sample.health.is_some())
    }

    /// Whether it said last that it waits for another rank, and still answers.
    pub fn waits_for_peer(&self) -> bool {
        self.answers() && self.health.as_ref().is_some_and(|health| health.waits)
    }

    /// The state of a process that cannot do anything, not even print its stacks.
    pub fn frozen(&self) -> Option<&'static str> {
        match self.last.as_ref()?.1.state? {
            'T' => Some("T (stopped)"),
            't' => Some("t (stopped by a debugger)"),
            'D' => Some("D (waits for the kernel, for example for a disk)"),
            _ => None,
        }
    }

    /// Busy, or not answering: something is owed. Before it has loaded, a rank owes nothing (a disk may be slow, and
    /// imports hold Python's lock); a start without progress has a limit of its own.
    fn is_waiting(&self) -> bool {
        let Some(health) = &self.health else { return false };
        health.phase.is_loaded() && (health.busy || self.unanswered > Duration::ZERO)
    }

    fn uses_processor(&self, sample: &Sample, gap: Duration) -> bool {
        let before = self.last.as_ref().and_then(|(_, last)| last.processor_time);
        match (before, sample.processor_time) {
            (Some(before), Some(now)) => now.saturating_sub(before) > IDLE_TIME.max(gap / 20),
            _ => false,
        }
    }

    fn time_steps(&mut self, now: Instant, sample: &Sample) {
        let Some(new) = &sample.health else { return };
        let steps = self.health.as_ref().map_or(0, |old| new.step.saturating_sub(old.step));
        if let (Some(start), 1..) = (self.step_started, steps) {
            if self.step_times.len() == STEP_TIMES {
                self.step_times.pop_front();
            }
            let steps = u32::try_from(steps).unwrap_or(u32::MAX);
            self.step_times.push_back(now.saturating_duration_since(start) / steps);
        }
        if !new.busy {
            self.step_started = None;
        } else if steps > 0 || self.step_started.is_none() {
            self.step_started = Some(now);
        }
    }

    /// The 99th percentile of the step times seen.
    fn slow_step(&self) -> Duration {
        let mut times: Vec<Duration> = self.step_times.iter().copied().collect();
        times.sort_unstable();
        times.get((times.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
    }

    fn is_overdue(&self) -> bool {
        let slow = self.slow_step() * STEPS;
        self.quiet >= QUIET_LIMIT.max(slow) || self.stuck >= STUCK_LIMIT.max(slow)
    }

    fn complaint(&self) -> String {
        let doing = self.health.as_ref().map_or("starting", |health| health.phase.name());
        let processor = if self.quiet >= self.stuck { ", using no processor time" } else { "" };
        if self.answers() {
            format!("no progress for {:.1} s while {doing}{processor}", self.stuck.as_secs_f64())
        } else {
            format!("no answer for {:.1} s while {doing}{processor}", self.unanswered.as_secs_f64())
        }
    }
}

/// Who hangs, of all ranks of a group, and why it is thought so.
///
/// A rank that waits for another in a collective looks as hung as the one it waits for. So those that do not even answer
/// are blamed first, and those that answer only if no other rank could still be computing. Of these, those that say that
/// they wait for another are blamed only if all do.
pub fn hung(ranks: &[&Watch]) -> Vec<(usize, String)> {
    let overdue: Vec<usize> = (0..ranks.len()).filter(|rank| ranks[*rank].is_overdue()).collect();
    let silent: Vec<usize> = overdue.iter().copied().filter(|rank| !ranks[*rank].answers()).collect();
    let at_work: Vec<usize> = overdue.iter().copied().filter(|rank| !ranks[*rank].waits_for_peer()).collect();
    let others_work = (0..ranks.len()).any(|rank| !overdue.contains(&rank) && ranks[rank].is_waiting());
    let blamed = match (silent.is_empty(), others_work) {
        (false, _) => silent,
        (true, true) => Vec::new(),
        (true, false) if at_work.is_empty() => overdue,
        (true, false) => at_work,
    };
    blamed.into_iter().map(|rank| (rank, ranks[rank].complaint())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a rank does between two samples, half a second apart.
    #[derive(Clone, Copy)]
    enum Does {
        Nothing,
        Steps,
        Layers,
        /// Busy, without progress, using the processor.
        Computes,
        /// Busy, without progress, using none; says so.
        Waits,
        /// The same, and does not say that it waits for a peer.
        Hangs,
        /// Stopped: no answer, no processor time.
        Stopped,
        /// Holds Python's lock: no answer, but processor time.
        Locked,
    }
    use Does::{Computes, Hangs, Layers, Locked, Nothing, Steps, Stopped, Waits};

    const GAP: Duration = Duration::from_millis(500);

    struct World {
        now: Instant,
        ranks: Vec<(Watch, Health, Duration)>,
    }

    impl World {
        fn new(ranks: usize) -> Self {
            let health = Health { epoch: 1, ..Health::of(Phase::Serving) };
            let mut world =
                Self { now: Instant::now(), ranks: vec![(Watch::default(), health, Duration::ZERO); ranks] };
            world.run(GAP, &vec![Nothing; ranks]);
            world
        }

        /// Lets time pass; answers who was found hung first, and after how long.
        fn run(&mut self, time: Duration, does: &[Does]) -> Option<(Duration, Vec<usize>)> {
            for tick in 1..=(time.as_millis() / GAP.as_millis()) as u32 {
                self.now += GAP;
                for ((watch, health, used), does) in self.ranks.iter_mut().zip(does) {
                    health.busy = !matches!(does, Nothing);
                    health.waits = matches!(does, Waits);
                    match does {
                        Steps => (health.step, health.progress) = (health.step + 1, health.progress + 6),
                        Layers => health.progress += 1,
                        _ => {}
                    }
                    if matches!(does, Steps | Layers | Computes | Locked) {
                        *used += GAP;
                    }
                    let answer = (!matches!(does, Stopped | Locked)).then(|| health.clone());
                    watch.observe(self.now, Sample { health: answer, processor_time: Some(*used), state: None });
                }
                let watches: Vec<&Watch> = self.ranks.iter().map(|(watch, ..)| watch).collect();
                let blamed = hung(&watches);
                if !blamed.is_empty() {
                    return Some((tick * GAP, blamed.into_iter().map(|(rank, _)| rank).collect()));
                }
            }
            None
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_rank_that_works_waits_for_work_or_computes_for_long_is_not_hung() {
        for does in [vec![Nothing], vec![Steps], vec![Layers], vec![Steps, Steps], vec![Nothing, Nothing]] {
            assert_eq!(World::new(does.len()).run(HOUR, &does), None);
        }
        assert_eq!(World::new(1).run(Duration::from_secs(59), &[Computes]), None);
    }

    #[test]
    fn a_stopped_rank_is_blamed_within_seconds_and_its_waiting_peer_is_not() {
        for (does, expected) in [
            (vec![Stopped], vec![0]),
            (vec![Waits, Stopped], vec![1]),
            (vec![Stopped, Waits], vec![0]),
            (vec![Nothing, Stopped], vec![1]),
            (vec![Waits, Waits, Stopped], vec![2]),
        ] {
            let (after, blamed) = World::new(does.len()).run(HOUR, &does).unwrap();
            assert_eq!(blamed, expected);
            assert!(after <= Duration::from_secs(7), "{after:?}");
        }
    }

    #[test]
    fn a_stop_of_a_second_is_only_a_stall() {
        let mut world = World::new(2);
        world.run(GAP * 4, &[Steps, Steps]);
        assert_eq!(world.run(GAP * 2, &[Waits, Stopped]), None);
        assert_eq!(world.run(HOUR, &[Steps, Steps]), None);
    }

    #[test]
    fn a_rank_that_waits_for_one_that_computes_is_not_blamed() {
        assert_eq!(World::new(2).run(Duration::from_secs(59), &[Waits, Computes]), None);
        assert_eq!(World::new(2).run(Duration::from_secs(59), &[Waits, Locked]), None);
        assert_eq!(
            World::new(2).run(HOUR, &[Waits, Layers]),
            None,
            "a collective may take as long as its slowest rank"
        );
    }

    #[test]
    fn of_ranks_that_answer_those_that_wait_for_a_peer_are_not_blamed() {
        for (does, expected) in
            [(vec![Waits, Hangs], vec![1]), (vec![Hangs, Waits, Waits], vec![0]), (vec![Hangs, Hangs], vec![0, 1])]
        {
            assert_eq!(World::new(does.len()).run(HOUR, &does).unwrap().1, expected);
        }
    }

    #[test]
    fn a_process_that_cannot_print_its_stacks_is_known_by_its_state() {
        for (state, expected) in [(Some('T'), Some("T (stopped)")), (Some('S'), None), (Some('R'), None), (None, None)]
        {
            let mut watch = Watch::default();
            watch.observe(Instant::now(), Sample { state, ..Sample::default() });
            assert_eq!(watch.frozen(), expected);
        }
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_all_blamed() {
        let (after, blamed) = World::new(2).run(HOUR, &[Waits, Waits]).unwrap();
        assert_eq!(blamed, [0, 1]);
        assert!(after <= Duration::from_secs(6), "{after:?}");
    }

    #[test]
    fn a_rank_that_burns_time_without_progress_is_blamed_after_a_minute() {
        let (after, blamed) = World::new(1).run(HOUR, &[Computes]).unwrap();
        assert_eq!(blamed, [0]);
        assert!(after <= Duration::from_secs(62), "{after:?}");
        assert_eq!(World::new(1).run(HOUR, &[Locked]).unwrap().1, [0]);
    }

    #[test]
    fn who_computes_slow_steps_is_given_five_of_them() {
        let mut world = World::new(1);
        for _ in 0..4 {
            assert_eq!(world.run(GAP * 8, &[Computes]), None);
            assert_eq!(world.run(GAP, &[Steps]), None);
        }
        let (after, _) = world.run(HOUR, &[Waits]).unwrap();
        assert!(after >= Duration::from_secs(20) && after < Duration::from_secs(30), "{after:?}");
    }

    #[test]
    fn a_launcher_that_was_stopped_itself_blames_nobody() {
        let mut world = World::new(1);
        world.run(GAP * 2, &[Waits]);
        world.now += HOUR;
        assert_eq!(world.run(GAP * 2, &[Waits]), None);
    }

    #[test]
    fn a_rank_that_loads_slowly_is_not_judged_here() {
        let mut world = World::new(1);
        world.ranks[0].1.phase = Phase::Loading;
        world.run(GAP, &[Waits]);
        assert_eq!(world.run(HOUR, &[Stopped]), None);
    }

    #[test]
    fn progress_is_described_for_people() {
        let mut health = World::new(1).ranks.remove(0).1;
        assert_eq!(health.describe(), "serving");
        (health.phase, health.done, health.total) = (Phase::Loading, 6_120_000, 13_600_000);
        assert_eq!(health.describe(), "loading 45 % of 13.6 MB");
    }
}
