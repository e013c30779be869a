//! Decides what happens next to the shards and the router: events in, actions out. Pure: no clock, no process, no log.
//!
//! ```text
//! ranks start ─▶ all loaded ─▶ generation n ─▶ router serves ─▶ drain ─▶ end
//!                    ▲                              │
//!                    └── replacement starts ◀─ lost ┘          (too many losses before a step: give up)
//! ```
//!
//! A rank is replaced alone; the others keep their weights and join the next generation. The router is restarted alone
//! too and is told the present generation.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use text_generation_router::control::{CANNOT_SERVE, RankAddress, ToLauncher, ToRouter};

use crate::events::{Action, Event, Level, Outcome, Signal, Who};
use crate::losses::{Losses, back_off};
use crate::process::{Cause, Exit};
use crate::watch::{self, Health, Phase, Sample, Watch};

/// Limits and delays.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Ranks of a generation.
    pub world_size: u32,
    /// A start without progress for this long ends.
    pub startup_stall: Duration,
    /// What running requests are given to finish.
    pub grace: Duration,
    /// Where the router answers, for people.
    pub url: String,
}

/// Serving for this long without a loss is as good as a completed step: there may be nothing to do.
const QUIET_START: Duration = Duration::from_secs(5);
/// Times that the router may ask to join again without a step in between; then all ranks are replaced.
const REJOINS: usize = 3;
/// What a rank is given to print its stacks before it is killed.
const STACKS: Duration = Duration::from_millis(500);
/// The same when a start has stalled.
const STALL_STACKS: Duration = Duration::from_secs(1);
/// What children are given to end after SIGTERM.
const TERM: Duration = Duration::from_secs(1);
/// Progress is told this often, and with every phase.
const TELL_PROGRESS: Duration = Duration::from_secs(5);
/// The most that the time between two ticks counts: a launcher that was stopped itself blames nobody.
const LONGEST_TICK: Duration = Duration::from_secs(1);

/// What is known of one child.
#[derive(Clone, Debug)]
enum Life {
    /// To be started at this time.
    Due(Instant),
    /// Runs, or is just being started.
    Runs,
    /// To be killed at this time, for a reason that was already dealt with.
    Condemned(Instant),
    /// SIGKILL is sent.
    Killed,
    /// Gone, and stays so.
    Gone,
}

#[derive(Clone, Debug)]
struct Rank {
    incarnation: u32,
    process_id: u32,
    life: Life,
    watch: Watch,
    /// Answered after the present generation was abandoned.
    heard: bool,
    told: Option<(Phase, Instant)>,
}

#[derive(Clone, Debug)]
struct Router {
    incarnation: u32,
    life: Life,
    connected: bool,
    /// This process has served.
    served: bool,
    watch: Watch,
    /// A ping is not answered yet.
    owes_pong: bool,
}

impl Router {
    fn new(incarnation: u32, life: Life) -> Self {
        Self { incarnation, life, connected: false, served: false, watch: Watch::default(), owes_pong: false }
    }
}

/// Everything is being ended.
#[derive(Clone, Debug)]
struct Ending {
    outcome: Outcome,
    /// SIGTERM to the router; by then it has had time to tell its clients.
    term_router: Option<Instant>,
    kill: Instant,
    killed: bool,
}

/// Requests are given time to finish; ranks are still replaced.
#[derive(Clone, Debug)]
struct Drain {
    deadline: Instant,
    overdue: bool,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Supervisor {
    policy: Policy,
    ranks: Vec<Rank>,
    router: Option<Router>,
    generation: u64,
    /// The present generation is announced (to the router, if it is there) and not abandoned.
    whole: bool,
    serving: bool,
    serving_since: Option<Instant>,
    /// The present generation has completed a step, or has been ready for one long enough.
    stepped: bool,
    ever_served: bool,
    rejoins: usize,
    rejoin_at: Option<Instant>,
    /// Ranks lost since the present generation was abandoned: further losses of others are part of the same.
    lost: BTreeSet<u32>,
    rank_losses: Losses,
    router_losses: Losses,
    /// Without progress, while not serving.
    stalled: Duration,
    /// The stacks of a stalled start are being printed; then everything ends with this message.
    stall_end: Option<(Instant, String)>,
    last_tick: Option<Instant>,
    drain: Option<Drain>,
    ending: Option<Ending>,
    polls_often: bool,
    actions: Vec<Action>,
}

impl Supervisor {
    /// Nothing is started yet.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            ranks: Vec::new(),
            router: None,
            generation: 0,
            whole: false,
            serving: false,
            serving_since: None,
            stepped: false,
            ever_served: false,
            rejoins: 0,
            rejoin_at: None,
            lost: BTreeSet::new(),
            rank_losses: Losses::default(),
            router_losses: Losses::default(),
            stalled: Duration::ZERO,
            stall_end: None,
            last_tick: None,
            drain: None,
            ending: None,
            polls_often: true,
            actions: Vec::new(),
        }
    }

    /// Takes an event and answers what to do, in order.
    pub fn on(&mut self, now: Instant, event: Event) -> Vec<Action> {
        match event {
            Event::Start => self.start(),
            Event::Tick => self.tick(now),
            Event::Spawned { who, process_id } => self.spawned(who, process_id),
            Event::NotSpawned { who, error } => self.not_spawned(now, who, &error),
            Event::Exited { who, exit } => self.exited(now, who, &exit),
            Event::Sampled { rank, incarnation, sample } => self.sampled(now, (rank, incarnation), sample),
            Event::RouterSampled { incarnation, processor_time } => {
                self.router_sampled(now, incarnation, processor_time);
            }
            Event::RouterConnected => self.router_connected(),
            Event::RouterSaid(message) => self.router_said(now, message),
            Event::Stop => self.stop(now),
        }
        self.advance(now);
        std::mem::take(&mut self.actions)
    }

    fn start(&mut self) {
        for rank in 0..self.policy.world_size {
            self.ranks.push(Rank {
                incarnation: 1,
                process_id: 0,
                life: Life::Runs,
                watch: Watch::default(),
                heard: false,
                told: None,
            });
            self.act(Action::Spawn(Who::Rank { rank, incarnation: 1 }));
        }
    }

    /// What follows from the state and the time alone, after every event.
    fn advance(&mut self, now: Instant) {
        if self.ending.is_some() {
            return self.advance_ending(now);
        }
        self.kill_condemned(now);
        self.spawn_due(now);
        self.announce_if_loaded(now);
        let often = !self.serving;
        if often != self.polls_often {
            self.polls_often = often;
            self.act(Action::Poll { often });
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn log(&mut self, level: Level, text: impl Into<String>) {
        self.act(Action::Log(level, text.into()));
    }

    fn who(&self, rank: u32) -> Who {
        Who::Rank { rank, incarnation: self.ranks[rank as usize].incarnation }
    }

    fn router_who(&self) -> Option<Who> {
        self.router.as_ref().map(|router| Who::Router { incarnation: router.incarnation })
    }

    fn is_current(&self, who: Who) -> bool {
        match who {
            Who::Rank { rank, .. } => (rank as usize) < self.ranks.len() && self.who(rank) == who,
            Who::Router { .. } => self.router_who() == Some(who),
        }
    }

    // Starting and replacing.

    fn spawned(&mut self, who: Who, process_id: u32) {
        self.stalled = Duration::ZERO;
        if let (Who::Rank { rank, .. }, true) = (who, self.is_current(who)) {
            self.ranks[rank as usize].process_id = process_id;
        }
    }

    fn not_spawned(&mut self, now: Instant, who: Who, error: &str) {
        match who {
            Who::Rank { rank, .. } => self.ranks[rank as usize].life = Life::Gone,
            Who::Router { .. } => self.router = None,
        }
        self.give_up(now, format!("{who} could not be started: {error}"));
    }

    fn spawn_due(&mut self, now: Instant) {
        for rank in 0..self.policy.world_size {
            let state = &mut self.ranks[rank as usize];
            if matches!(state.life, Life::Due(at) if at <= now) {
                state.life = Life::Runs;
                let who = self.who(rank);
                self.act(Action::Spawn(who));
            }
        }
        if let Some(router) = &mut self.router
            && matches!(router.life, Life::Due(at) if at <= now)
        {
            router.life = Life::Runs;
            let incarnation = router.incarnation;
            self.act(Action::Spawn(Who::Router { incarnation }));
        }
    }

    fn kill_condemned(&mut self, now: Instant) {
        for rank in 0..self.policy.world_size {
            let state = &mut self.ranks[rank as usize];
            if matches!(state.life, Life::Condemned(at) if at <= now) {
                state.life = Life::Killed;
                let who = self.who(rank);
                self.act(Action::Signal(who, Signal::Kill));
            }
        }
    }

    /// When all ranks have loaded, and answered since the last generation broke, the next one begins.
    fn announce_if_loaded(&mut self, now: Instant) {
        let all_loaded = self.ranks.iter().all(|rank| {
            matches!(rank.life, Life::Runs)
                && rank.heard
                && rank.watch.health().is_some_and(|health| health.phase.is_loaded())
        });
        if self.whole || self.ranks.is_empty() || !all_loaded || self.rejoin_at.is_some_and(|at| at > now) {
            return;
        }
        self.generation += 1;
        self.whole = true;
        self.stepped = false;
        self.rejoin_at = None;
        self.lost.clear();
        self.stalled = Duration::ZERO;
        if self.generation > 1 {
            self.log(Level::Info, format!("all ranks are loaded: generation {} begins", self.generation));
        }
        match &self.router {
            None if self.drain.is_none() => {
                self.router = Some(Router::new(1, Life::Runs));
                self.log(Level::Info, "all ranks are loaded: starting the router");
                self.act(Action::Spawn(Who::Router { incarnation: 1 }));
            }
            None => {}
            Some(_) => self.announce(),
        }
    }

    fn announce(&mut self) {
        if self.whole && self.router.as_ref().is_some_and(|router| router.connected) {
            let ranks =
                (0..).zip(&self.ranks).map(|(rank, state)| (rank, state.process_id, state.incarnation)).collect();
            self.act(Action::Announce { number: self.generation, ranks });
        }
    }

    // Watching.

    fn sampled(&mut self, now: Instant, (rank, incarnation): (u32, u32), sample: Sample) {
        if !self.is_current(Who::Rank { rank, incarnation }) || self.ending.is_some() {
            return;
        }
        let state = &mut self.ranks[rank as usize];
        state.heard |= sample.health.is_some();
        if state.watch.observe(now, sample) {
            self.stalled = Duration::ZERO;
        }
        self.tell_progress(now, rank);
        let running = self.ranks.iter().all(|rank| matches!(rank.life, Life::Runs));
        if running && self.stall_end.is_none() {
            let watches: Vec<&Watch> = self.ranks.iter().map(|rank| &rank.watch).collect();
            let hung = watch::hung(&watches);
            if !hung.is_empty() {
                let hung = hung.into_iter().map(|(rank, why)| (rank as u32, format!("hung: {why}"))).collect();
                self.replace(now, hung);
            }
        }
    }

    /// Pings the router and judges it as a rank that owes nothing but an answer. While it drains it has a deadline, and
    /// its loop may have ended before its last answers are sent.
    fn router_sampled(&mut self, now: Instant, incarnation: u32, processor_time: Option<Duration>) {
        let who = Who::Router { incarnation };
        if !self.is_current(who) || self.ending.is_some() || self.drain.is_some() {
            return;
        }
        let Some(router) = self.router.as_mut().filter(|router| router.connected) else { return };
        let health = (!router.owes_pong).then(|| Health::of(Phase::Serving));
        router.watch.observe(now, Sample { health, processor_time, state: None });
        if let Some((_, why)) = watch::hung(&[&router.watch]).into_iter().next() {
            (router.life, router.connected) = (Life::Killed, false);
            self.log(Level::Warn, format!("router hung: {why}; it is killed and replaced"));
            self.act(Action::Signal(who, Signal::Kill));
        } else if !router.owes_pong {
            router.owes_pong = true;
            self.act(Action::Tell(ToRouter::Ping));
        }
    }

    fn tell_progress(&mut self, now: Instant, rank: u32) {
        if self.serving {
            return;
        }
        let state = &mut self.ranks[rank as usize];
        let Some(health) = state.watch.health() else { return };
        let is_due = match state.told {
            Some((phase, _)) if phase != health.phase => true,
            Some((_, at)) => health.phase == Phase::Loading && now.saturating_duration_since(at) >= TELL_PROGRESS,
            None => true,
        };
        if is_due {
            state.told = Some((health.phase, now));
            let text = format!("rank {rank}: {}", health.describe());
            self.log(Level::Info, text);
        }
    }

    /// Kills ranks, after they have printed their stacks if they can, and has them replaced.
    fn replace(&mut self, now: Instant, ranks: Vec<(u32, String)>) {
        let reasons: Vec<String> = ranks.iter().map(|(rank, why)| format!("rank {rank} {why}")).collect();
        let reason = reasons.join("; ");
        self.log(Level::Warn, format!("{reason}; it is killed and replaced"));
        self.lose(&reason);
        let delay = self.rank_losses.count(now, !self.stepped);
        self.stepped = false;
        for (rank, _) in ranks {
            self.lost.insert(rank);
            let answers = self.ranks[rank as usize].watch.answers();
            self.ranks[rank as usize].life = Life::Condemned(now + if answers { STACKS } else { Duration::ZERO });
            if answers {
                let who = self.who(rank);
                self.act(Action::Signal(who, Signal::Stacks));
            }
        }
        self.rejoin_at = Some(now + delay);
        self.give_up_if_too_many(now, &reason);
    }

    /// The present generation cannot go on.
    fn lose(&mut self, reason: &str) {
        if self.whole && self.router.as_ref().is_some_and(|router| router.connected) {
            self.act(Action::Tell(ToRouter::Lost { number: self.generation, reason: reason.into() }));
        }
        self.abandon();
    }

    fn abandon(&mut self) {
        self.whole = false;
        self.serving = false;
        self.stalled = Duration::ZERO;
        for rank in &mut self.ranks {
            rank.heard = false;
        }
    }

    // Deaths.

    fn exited(&mut self, now: Instant, who: Who, exit: &Exit) {
        if !self.is_current(who) {
            return;
        }
        self.stalled = Duration::ZERO;
        if self.ending.is_some() {
            match who {
                Who::Rank { rank, .. } => self.ranks[rank as usize].life = Life::Gone,
                Who::Router { .. } => self.router = None,
            }
            return;
        }
        match who {
            Who::Rank { rank, .. } => self.rank_exited(now, rank, exit),
            Who::Router { .. } => self.router_exited(now, exit),
        }
    }

    fn rank_exited(&mut self, now: Instant, rank: u32, exit: &Exit) {
        let state = &self.ranks[rank as usize];
        let was_killed = matches!(state.life, Life::Condemned(_) | Life::Killed);
        let was_loaded = state.watch.health().is_some_and(|health| health.phase.is_loaded());
        let delay = if was_killed {
            // Counted when it was condemned.
            self.rejoin_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
        } else {
            let reason = format!("rank {rank} {}", exit.explain());
            self.log(Level::Warn, exit.with_last_lines(&reason));
            // Code 1 before the model is loaded: the shard says itself that it cannot; trying again would say the same.
            if exit.cause == Cause::Code(1) && !was_loaded && !self.ever_served {
                self.ranks[rank as usize].life = Life::Gone;
                let message = exit.last_words(rank).unwrap_or(reason);
                return self.give_up(now, format!("rank {rank} could not load the model: {message}"));
            }
            self.lose(&reason);
            self.count_death(now, rank)
        };
        let state = &mut self.ranks[rank as usize];
        *state = Rank {
            incarnation: state.incarnation + 1,
            process_id: 0,
            life: Life::Due(now + delay),
            watch: Watch::default(),
            heard: false,
            told: None,
        };
        if !was_killed {
            let reason = exit.with_last_lines(&format!("rank {rank} {}", exit.explain()));
            self.give_up_if_too_many(now, &reason);
        }
    }

    /// When one rank dies others may follow because it did: together they count once, until one of them dies again.
    fn count_death(&mut self, now: Instant, rank: u32) -> Duration {
        if !self.lost.is_empty() && self.lost.insert(rank) {
            return Duration::ZERO;
        }
        self.lost = BTreeSet::from([rank]);
        let delay = self.rank_losses.count(now, !self.stepped);
        self.stepped = false;
        delay
    }

    fn give_up_if_too_many(&mut self, now: Instant, reason: &str) {
        if let Some(times) = self.rank_losses.too_many() {
            self.give_up(now, format!("shards were lost {times} before a step was completed; the last: {reason}"));
        }
    }

    fn router_exited(&mut self, now: Instant, exit: &Exit) {
        let reason = format!("the router {}", exit.explain());
        let Some(router) = &mut self.router else { return };
        let served = router.served;
        if exit.cause == Cause::Code(CANNOT_SERVE.into()) && self.drain.is_none() {
            self.router = None;
            let message = exit.last_lines.last().map_or(reason, |line| line.trim_start_matches("error: ").to_owned());
            return self.give_up(now, format!("the router cannot serve: {message}"));
        }
        if let Some(drain) = &self.drain {
            let clean = drain.overdue || exit.cause == Cause::Code(0);
            self.router = None;
            let outcome = if clean {
                Outcome::Stopped
            } else {
                Outcome::Failed(format!("while requests were finishing, {reason}"))
            };
            return self.end(now, outcome);
        }
        self.serving = false;
        self.stepped = false;
        let delay = self.router_losses.count(now, !served);
        let was_killed = matches!(router.life, Life::Killed);
        *router = Router::new(router.incarnation + 1, Life::Due(now + delay));
        if !was_killed {
            self.log(Level::Warn, exit.with_last_lines(&reason));
        }
        if exit.cause == Cause::Code(2) && !self.ever_served {
            self.router = None;
            let message = exit.with_last_lines("the router refused its arguments");
            return self.give_up(now, message);
        }
        if let Some(times) = self.router_losses.too_many() {
            self.router = None;
            let reason = exit.with_last_lines(&reason);
            self.give_up(now, format!("the router was lost {times} before it served; the last time {reason}"));
        }
    }

    // What the router says.

    fn router_connected(&mut self) {
        self.stalled = Duration::ZERO;
        if let Some(router) = &mut self.router {
            router.connected = true;
        }
        self.announce();
    }

    fn router_said(&mut self, now: Instant, message: ToLauncher) {
        if self.ending.is_some() {
            return;
        }
        if message == ToLauncher::Pong {
            if let Some(router) = &mut self.router {
                router.owes_pong = false;
            }
            return;
        }
        self.stalled = Duration::ZERO;
        match message {
            ToLauncher::Serving { number, epoch, num_blocks } if number == self.generation && self.whole => {
                self.serves(now, epoch, num_blocks);
            }
            ToLauncher::Stepped { number } if number == self.generation && self.whole => {
                self.stepped();
            }
            ToLauncher::Fault { number, rank, reason, replace } if number == self.generation && self.whole => {
                self.fault(now, rank, reason, replace);
            }
            ToLauncher::CannotServe { reason } => self.give_up(now, reason),
            // Of a generation that is already abandoned.
            ToLauncher::Serving { .. } | ToLauncher::Stepped { .. } | ToLauncher::Fault { .. } | ToLauncher::Pong => {}
        }
    }

    /// The start was good: what was lost before it no longer counts.
    fn stepped(&mut self) {
        self.stepped = true;
        self.rejoins = 0;
        self.rank_losses.forgive();
    }

    fn serves(&mut self, now: Instant, epoch: u64, num_blocks: u32) {
        self.serving = true;
        self.serving_since = Some(now);
        self.router_losses.forgive();
        if let Some(router) = &mut self.router {
            router.served = true;
        }
        let text = format!("serving: generation {}, epoch {epoch}, {num_blocks} KV-cache blocks", self.generation);
        self.log(Level::Info, text);
        if !self.ever_served {
            self.ever_served = true;
            let url = self.policy.url.clone();
            self.log(Level::Info, format!("Connected: ready at {url}"));
        }
    }

    /// The ranks that do not only wait for another in a collective; all, if all do.
    fn not_waiting(&self) -> Vec<u32> {
        let all = 0..self.policy.world_size;
        let busy: Vec<u32> = all.clone().filter(|rank| !self.ranks[*rank as usize].watch.waits_for_peer()).collect();
        if busy.is_empty() { all.collect() } else { busy }
    }

    fn fault(&mut self, now: Instant, rank: Option<u32>, reason: String, replace: bool) {
        let rank = rank.filter(|rank| *rank < self.policy.world_size);
        self.rejoins += 1;
        if replace || self.rejoins > REJOINS {
            self.rejoins = 0;
            let blamed = rank.filter(|_| replace).map_or_else(|| self.not_waiting(), |rank| vec![rank]);
            let blamed: Vec<u32> =
                blamed.into_iter().filter(|rank| matches!(self.ranks[*rank as usize].life, Life::Runs)).collect();
            return self
                .replace(now, blamed.into_iter().map(|rank| (rank, format!("is at fault: {reason}"))).collect());
        }
        let blamed = rank.map(|rank| format!(" (rank {rank})")).unwrap_or_default();
        self.log(
            Level::Warn,
            format!("generation {} cannot go on{blamed}: {reason}; the ranks join again", self.generation),
        );
        self.abandon();
        self.rejoin_at = Some(now + back_off(self.rejoins - 1));
    }

    // Time.

    fn tick(&mut self, now: Instant) {
        let gap = self.last_tick.map_or(Duration::ZERO, |then| now.saturating_duration_since(then)).min(LONGEST_TICK);
        self.last_tick = Some(now);
        if self.ending.is_some() {
            return;
        }
        if let Some(drain) = &mut self.drain
            && now >= drain.deadline
            && !drain.overdue
        {
            drain.overdue = true;
            self.log(Level::Warn, "the time for running requests is over: the router is killed");
            if let Some(router) = self.router_who() {
                self.act(Action::Signal(router, Signal::Kill));
            }
        }
        if self.serving
            && !self.stepped
            && self.serving_since.is_some_and(|then| now.saturating_duration_since(then) >= QUIET_START)
        {
            self.stepped();
        }
        self.watch_start(now, gap);
    }

    /// Ends a start, or a restart, in which nobody gets anywhere.
    fn watch_start(&mut self, now: Instant, gap: Duration) {
        if let Some((at, message)) = &self.stall_end {
            if now >= *at {
                let message = message.clone();
                self.tell_frozen();
                self.give_up(now, message);
            }
            return;
        }
        let waits = self.ranks.iter().any(|rank| matches!(rank.life, Life::Due(_)))
            || self.router.as_ref().is_some_and(|router| matches!(router.life, Life::Due(_)));
        if self.serving || waits {
            return;
        }
        self.stalled += gap;
        if self.stalled >= self.policy.startup_stall {
            let message = self.describe_stall();
            self.log(Level::Error, format!("{message}; the stacks of the ranks follow"));
            for rank in 0..self.policy.world_size {
                let who = self.who(rank);
                self.act(Action::Signal(who, Signal::Stacks));
            }
            self.stall_end = Some((now + STALL_STACKS, message));
        }
    }

    /// Processes that could not print their stacks.
    fn tell_frozen(&mut self) {
        for rank in 0..self.policy.world_size {
            if let Some(state) = self.ranks[rank as usize].watch.frozen() {
                self.log(Level::Error, format!("rank {rank}: no stack, process state {state}"));
            }
        }
    }

    fn describe_stall(&self) -> String {
        let mut states: Vec<String> = (0..)
            .zip(&self.ranks)
            .map(|(rank, state): (u32, &Rank)| match state.watch.health() {
                None => format!("rank {rank}: started, never answered"),
                Some(health) if state.watch.answers() => format!("rank {rank}: {}", health.describe()),
                Some(health) => format!("rank {rank}: {}, does not answer", health.describe()),
            })
            .collect();
        states.extend(self.router.as_ref().map(|router| {
            format!("router: {}", if router.connected { "waiting for the ranks" } else { "started, not connected" })
        }));
        let limit = self.policy.startup_stall.as_secs_f64();
        format!("no progress for {limit} s (--startup-stall-timeout): {}", states.join(", "))
    }

    // Ending.

    fn stop(&mut self, now: Instant) {
        if let Some(ending) = &mut self.ending {
            ending.kill = now;
            return;
        }
        if let Some(drain) = &mut self.drain {
            drain.overdue = true;
            self.log(Level::Warn, "asked to end a second time: running requests are cut off");
            self.act(Action::Tell(ToRouter::GaveUp { reason: "the server was told to end at once".into() }));
            return self.end_within(now, Outcome::Stopped, (TERM, TERM));
        }
        let router = self.router.as_ref().filter(|router| self.ever_served && matches!(router.life, Life::Runs));
        match router.map(|router| Who::Router { incarnation: router.incarnation }) {
            Some(who) => {
                let seconds = self.policy.grace.as_secs();
                self.log(Level::Info, format!("asked to end: running requests are given {seconds} s to finish"));
                self.act(Action::Signal(who, Signal::Term));
                self.drain = Some(Drain { deadline: now + self.policy.grace + TERM, overdue: false });
            }
            None => {
                self.log(Level::Info, "asked to end");
                self.end(now, Outcome::Stopped);
            }
        }
    }

    fn give_up(&mut self, now: Instant, reason: String) {
        if self.ending.is_some() {
            return;
        }
        if self.router.as_ref().is_some_and(|router| router.connected) {
            self.act(Action::Tell(ToRouter::GaveUp { reason: reason.clone() }));
        }
        self.end(now, Outcome::Failed(reason));
    }

    /// Ends all children: SIGTERM, then SIGKILL. A router that was told to give up ends its streams first.
    fn end(&mut self, now: Instant, outcome: Outcome) {
        let connected = self.router.as_ref().is_some_and(|router| router.connected);
        let gave_up = matches!(outcome, Outcome::Failed(_)) && connected;
        self.end_within(now, outcome, if gave_up { (STACKS, 3 * TERM) } else { (Duration::ZERO, TERM) });
    }

    /// The same; the router is given so long before its SIGTERM, and everyone before SIGKILL.
    fn end_within(&mut self, now: Instant, outcome: Outcome, (term_router, kill): (Duration, Duration)) {
        for rank in 0..self.policy.world_size {
            let who = match self.ranks.get(rank as usize) {
                Some(Rank { life: Life::Due(_) | Life::Gone, .. }) | None => continue,
                Some(_) => self.who(rank),
            };
            self.act(Action::Signal(who, Signal::Term));
        }
        for rank in &mut self.ranks {
            if matches!(rank.life, Life::Due(_)) {
                rank.life = Life::Gone;
            }
        }
        self.router = self.router.take().filter(|router| !matches!(router.life, Life::Due(_)));
        self.ending = Some(Ending { outcome, term_router: Some(now + term_router), kill: now + kill, killed: false });
    }

    fn advance_ending(&mut self, now: Instant) {
        let router = self.router_who();
        let ranks: Vec<Who> = (0..self.policy.world_size)
            .filter(|rank| self.ranks.get(*rank as usize).is_some_and(|state| !matches!(state.life, Life::Gone)))
            .map(|rank| self.who(rank))
            .collect();
        let Some(ending) = &mut self.ending else { return };
        let mut actions = Vec::new();
        if ending.term_router.is_some_and(|at| at <= now) {
            ending.term_router = None;
            actions.extend(router.map(|router| Action::Signal(router, Signal::Term)));
        }
        if ending.kill <= now && !ending.killed {
            ending.killed = true;
            actions.extend(ranks.iter().copied().chain(router).map(|who| Action::Signal(who, Signal::Kill)));
        }
        if ranks.is_empty() && router.is_none() {
            actions.push(Action::End(ending.outcome.clone()));
        }
        self.actions.extend(actions);
    }
}

/// The message of a generation, once the shell has said where its sockets are.
pub fn generation_message(
    number: u64,
    ranks: &[(u32, u32, u32)],
    directory: &crate::run_directory::RunDirectory,
) -> ToRouter {
    let ranks = ranks.iter().map(|&(rank, process_id, incarnation)| RankAddress {
        rank,
        socket: directory.shard_socket(rank, incarnation),
        process_id,
        incarnation,
    });
    ToRouter::Generation { number, ranks: ranks.collect(), rendezvous: directory.rendezvous(number) }
}
