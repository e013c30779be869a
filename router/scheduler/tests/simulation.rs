//! Random schedules of arrivals, cancels, late stops, deadlines, stalls, deaths, row errors and corrupt answers, against a
//! shard that reads a simulated KV cache. A failure prints its trace and its seed:
//!
//! ```text
//! cargo test -p scheduler --test simulation                 10,000 schedules
//! FIRST=0 COUNT=1000000 cargo test -p scheduler …           more of them
//! FIRST=17 COUNT=1 TRACE=1 cargo test -p scheduler …        one of them, every plan and event printed
//! ```
#![allow(missing_docs)]

#[path = "simulation/shard.rs"]
mod shard;
#[path = "simulation/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use world::{Counts, World};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

fn run(seed: u64, trace: bool) -> World {
    let mut world = World::new(seed, trace.then(Vec::new), &|_| {});
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    if outcome.is_err() && !trace {
        eprintln!("seed {seed} failed after {} events; once more, with its trace:", world.counts.events);
        run(seed, true);
    }
    if outcome.is_err() {
        world.trace.iter().flatten().for_each(|line| println!("{line}"));
        panic!("repeat with: FIRST={seed} COUNT=1 TRACE=1 cargo test -p scheduler --test simulation -- --nocapture");
    }
    world
}

#[test]
fn every_schedule_gives_every_client_what_it_would_get_alone() {
    let (first, count, traced) = (setting("FIRST", 0), setting("COUNT", 10_000), setting("TRACE", 0) > 0);
    let (start, mut total, mut digest) = (Instant::now(), Counts::default(), 0);
    for seed in first..first + count {
        let world = run(seed, traced);
        total.add(&world.counts);
        digest = shard::digest(digest, world.digest);
        if traced {
            world.trace.iter().flatten().for_each(|line| println!("{line}"));
        }
    }
    println!("seeds {first}..{}, trace hash {digest:016x}, in {:?}: {total:#?}", first + count, start.elapsed());
    if count >= 1_000 {
        total.assert_everything_happened();
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..200 {
        let (a, b) = (run(seed, true), run(seed, true));
        assert_eq!(a.digest, b.digest, "seed {seed}");
        assert!(a.trace == b.trace, "seed {seed}");
        assert_ne!(a.digest, run(seed + 1, false).digest, "seeds {seed} and {}", seed + 1);
    }
}
