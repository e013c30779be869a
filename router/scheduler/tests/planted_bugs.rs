//! Bugs planted on purpose: a simulation that misses one of them proves nothing about its kind.
#![allow(missing_docs)]

#[path = "simulation/shard.rs"]
mod shard;
#[path = "simulation/world.rs"]
#[allow(dead_code)]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use scheduler::{Bug, Scheduler};
use world::World;

/// As many as `tests/simulation.rs` runs.
const MAX_SCHEDULES: u64 = 10_000;

const BUGS: [Bug; 34] = [
    Bug::FreesBlocksOfOpenSteps,
    Bug::PublishesWithoutSample,
    Bug::PublishesUncommitted,
    Bug::KeepsBlocksOfFailedRow,
    Bug::MatchesByHashAlone,
    Bug::IgnoresParent,
    Bug::IgnoresNamespace,
    Bug::FindsEvictedBlocks,
    Bug::EvictsHeldBlocks,
    Bug::KeepsCacheOnLoss,
    Bug::HitsWholeLog,
    Bug::HitsWantedLogprobs,
    Bug::HitsUnderSuspicion,
    Bug::ReusesReleasedRow,
    Bug::IgnoresIncarnation,
    Bug::IgnoresComputed,
    Bug::IgnoresNumTokens,
    Bug::AcceptsOlderEpoch,
    Bug::ReadmitsUnsettled,
    Bug::ReadmitsUnreleased,
    Bug::ForgetsElder,
    Bug::RequeuesAtTheBack,
    Bug::PreemptsEldest,
    Bug::EmitsAfterEnd,
    Bug::CountsLengthOffByOne,
    Bug::PlansCertainlyDeadRow,
    Bug::ForgetsOpenTokens,
    Bug::StarvesYoungest,
    Bug::RunsSuspectsTogether,
    Bug::ClearsSuspicionEarly,
    Bug::NeverFailsKiller,
    Bug::ExpiresAdmitted,
    Bug::KeepsWhatNoLongerFits,
    Bug::LosesRelease,
];

/// The first seed whose schedule fails, if one does.
fn first_failure(prepare: &dyn Fn(&mut Scheduler)) -> Option<u64> {
    (0..MAX_SCHEDULES).find(|seed| {
        let mut world = World::new(*seed, None, prepare);
        catch_unwind(AssertUnwindSafe(|| world.run())).is_err()
    })
}

#[test]
fn every_planted_bug_is_found_and_nothing_where_there_is_none() {
    for seed in 0..500 {
        World::new(seed, None, &|_| {}).run();
    }
    std::panic::set_hook(Box::new(|_| {})); // the failures are wanted
    let found: Vec<_> = BUGS.iter().map(|bug| (bug, first_failure(&|s: &mut Scheduler| s.plant(*bug)))).collect();
    let _ = std::panic::take_hook();
    for (bug, seed) in &found {
        println!("{bug:?}: {}", seed.map_or("not found".into(), |seed| format!("after {} schedules", seed + 1)));
    }
    assert!(found.iter().all(|(_, seed)| seed.is_some()), "a planted bug was not found");
}
