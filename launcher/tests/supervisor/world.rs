//! A supervisor and its time, and events and actions in a few words.

use std::time::{Duration, Instant};

use text_generation_launcher::events::{Action, Event, Outcome, Signal, Who};
use text_generation_launcher::process::{Cause, Exit};
use text_generation_launcher::supervisor::{Policy, Supervisor};
use text_generation_launcher::watch::{Health, Phase, Sample};
use text_generation_router::control::{ToLauncher, ToRouter};

pub const SIGKILL: Cause = Cause::Signal(9);

pub fn rank(rank: u32, incarnation: u32) -> Who {
    Who::Rank { rank, incarnation }
}

pub fn router(incarnation: u32) -> Who {
    Who::Router { incarnation }
}

pub fn name(who: Who) -> String {
    match who {
        Who::Rank { rank, incarnation } => format!("rank {rank}.{incarnation}"),
        Who::Router { incarnation } => format!("router.{incarnation}"),
    }
}

/// An action in a few words; lines of the log are left out.
pub fn words(action: Action) -> Option<String> {
    Some(match action {
        Action::Spawn(who) => format!("spawn {}", name(who)),
        Action::Signal(who, Signal::Stacks) => format!("stacks {}", name(who)),
        Action::Signal(who, Signal::Term) => format!("term {}", name(who)),
        Action::Signal(who, Signal::Kill) => format!("kill {}", name(who)),
        Action::Tell(ToRouter::Lost { number, .. }) => format!("lost {number}"),
        Action::Tell(ToRouter::GaveUp { .. }) => "gave up".into(),
        Action::Announce { number, ranks } => {
            let ranks: Vec<String> =
                ranks.iter().map(|(rank, _, incarnation)| format!("{rank}.{incarnation}")).collect();
            format!("generation {number}: {}", ranks.join(" "))
        }
        Action::End(Outcome::Stopped) => "end".into(),
        Action::End(Outcome::Failed(reason)) => format!("fail: {}", reason.lines().next().unwrap()),
        Action::Tell(ToRouter::Ping) => "ping".into(),
        Action::Tell(ToRouter::Generation { .. }) | Action::Poll { .. } | Action::Log(..) => return None,
    })
}

/// A supervisor and its time.
pub struct World {
    pub supervisor: Supervisor,
    pub now: Instant,
    world_size: u32,
    pub logged: Vec<String>,
}

impl World {
    /// Everything is spawned, nothing has answered.
    pub fn new(world_size: u32) -> Self {
        let policy = Policy {
            world_size,
            startup_stall: Duration::from_secs(120),
            grace: Duration::from_secs(90),
            url: "http://localhost".into(),
        };
        let mut world =
            Self { supervisor: Supervisor::new(policy), now: Instant::now(), world_size, logged: Vec::new() };
        let spawned = world.on(Event::Start);
        assert_eq!(spawned, (0..world_size).map(|rank| format!("spawn rank {rank}.1")).collect::<Vec<_>>());
        world
    }

    /// Serving, not a step completed.
    pub fn serving(world_size: u32) -> Self {
        let mut world = Self::new(world_size);
        let mut actions = Vec::new();
        for number in 0..world_size {
            actions = world.loaded(number, 1);
        }
        assert_eq!(actions, ["spawn router.1"]);
        let generation = world.on(Event::RouterConnected);
        assert!(generation[0].starts_with("generation 1: 0.1"), "{generation:?}");
        world.says(serving(1));
        world
    }

    /// Serving, and steps were completed.
    pub fn stepping(world_size: u32) -> Self {
        let mut world = Self::serving(world_size);
        world.says(ToLauncher::Stepped { number: 1 });
        world
    }

    pub fn on(&mut self, event: Event) -> Vec<String> {
        let mut found = Vec::new();
        for action in self.supervisor.on(self.now, event) {
            if let Action::Log(_, text) = &action {
                self.logged.push(text.clone());
            }
            found.extend(words(action));
        }
        found
    }

    pub fn sees(
        &mut self,
        (rank, incarnation): (u32, u32),
        health: Option<Health>,
        processor_time: Duration,
    ) -> Vec<String> {
        let sample = Sample { health, processor_time: Some(processor_time), state: None };
        self.on(Event::Sampled { rank, incarnation, sample })
    }

    pub fn loaded(&mut self, rank: u32, incarnation: u32) -> Vec<String> {
        self.sees((rank, incarnation), Some(health(Phase::Loaded, 0)), Duration::ZERO)
    }

    pub fn dies(&mut self, who: Who, cause: Cause) -> Vec<String> {
        self.on(Event::Exited { who, exit: Exit { cause, last_lines: vec!["the last line".into()] } })
    }

    pub fn says(&mut self, message: ToLauncher) -> Vec<String> {
        self.on(Event::RouterSaid(message))
    }

    /// Lets time pass in ticks; answers what came of it.
    pub fn wait(&mut self, seconds: f64) -> Vec<String> {
        let mut found = Vec::new();
        for _ in 0..(seconds * 10.0).round() as u32 {
            self.now += Duration::from_millis(100);
            found.extend(self.on(Event::Tick));
        }
        found
    }

    /// All ranks answer that they are idle and loaded.
    pub fn all_answer(&mut self, incarnations: &[u32]) -> Vec<String> {
        (0..self.world_size).zip(incarnations).flat_map(|(rank, incarnation)| self.loaded(rank, *incarnation)).collect()
    }

    /// Everyone who was told to ends; answers how the launcher ends.
    pub fn everyone_ends(&mut self, whos: &[Who]) -> Vec<String> {
        whos.iter().flat_map(|who| self.dies(*who, Cause::Code(0))).filter(|action| is_end(action)).collect()
    }
}

pub fn is_end(action: &str) -> bool {
    action == "end" || action.starts_with("fail")
}

pub fn health(phase: Phase, progress: u64) -> Health {
    Health { progress, ..Health::of(phase) }
}

pub fn serving(number: u64) -> ToLauncher {
    ToLauncher::Serving { number, epoch: number, num_blocks: 8 }
}

pub fn fault(number: u64, rank: Option<u32>, replace: bool) -> ToLauncher {
    ToLauncher::Fault { number, rank, reason: "a stream broke".into(), replace }
}
