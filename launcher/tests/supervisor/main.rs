//! The supervisor's decisions, as tables of events and what must follow. No process, no clock.
#![allow(clippy::unwrap_used)] // A test file: helpers are not recognized as tests.

mod world;

use std::time::Duration;

use text_generation_launcher::events::{Action, Event, Who};
use text_generation_launcher::process::{Cause, Exit};
use text_generation_launcher::watch::{Health, Phase, Sample};
use text_generation_router::control::ToLauncher;
use world::*;

#[test]
fn the_router_starts_when_every_rank_has_loaded() {
    let mut world = World::new(2);
    assert_eq!(world.loaded(0, 1), [""; 0]);
    assert_eq!(world.sees((1, 1), Some(health(Phase::Loading, 1)), Duration::ZERO), [""; 0]);
    assert_eq!(world.loaded(1, 1), ["spawn router.1"]);
    assert_eq!(world.on(Event::RouterConnected), ["generation 1: 0.1 1.1"]);
    world.says(serving(1));
    assert_eq!(world.logged.last().unwrap(), "Connected: ready at http://localhost");
}

#[test]
fn a_dead_rank_alone_is_replaced_at_once_and_the_next_generation_waits_for_it() {
    let mut world = World::stepping(2);
    assert_eq!(world.dies(rank(1, 1), SIGKILL), ["lost 1", "spawn rank 1.2"]);
    assert_eq!(world.loaded(0, 1), [""; 0]);
    assert_eq!(world.sees((1, 2), Some(health(Phase::Importing, 0)), Duration::ZERO), [""; 0]);
    assert_eq!(world.loaded(1, 2), ["generation 2: 0.1 1.2"]);
    assert!(world.logged.iter().any(|line| line.contains("SIGKILL") && line.contains("the last line")));
}

#[test]
fn a_survivor_must_answer_after_the_loss_before_the_next_generation() {
    let mut world = World::stepping(2);
    world.dies(rank(1, 1), SIGKILL);
    assert_eq!(world.loaded(1, 2), [""; 0], "rank 0 was last heard before the loss");
    assert_eq!(world.loaded(0, 1), ["generation 2: 0.1 1.2"]);
}

#[test]
fn a_second_loss_during_recovery_is_mended_too_and_told_once() {
    let mut world = World::stepping(2);
    world.dies(rank(1, 1), SIGKILL);
    assert_eq!(world.dies(rank(0, 1), SIGKILL), ["spawn rank 0.2"]);
    assert_eq!(world.all_answer(&[2, 2]), ["generation 2: 0.2 1.2"]);
}

#[test]
fn ranks_that_die_together_count_once() {
    let mut world = World::serving(4);
    for number in 0..4 {
        let actions = world.dies(rank(number, 1), SIGKILL);
        assert!(actions.contains(&format!("spawn rank {number}.2")), "{actions:?}");
    }
    assert_eq!(world.all_answer(&[2, 2, 2, 2]), ["generation 2: 0.2 1.2 2.2 3.2"]);
}

#[test]
fn three_losses_within_a_minute_before_a_step_give_up() {
    let mut world = World::new(1);
    assert_eq!(world.dies(rank(0, 1), SIGKILL), ["spawn rank 0.2"]);
    assert_eq!(world.dies(rank(0, 2), SIGKILL), [""; 0]);
    assert_eq!(world.wait(0.3), ["spawn rank 0.3"]);
    let end = world.dies(rank(0, 3), SIGKILL);
    assert_eq!(end.len(), 1);
    assert!(end[0].starts_with("fail: shards were lost 3 times within 60 s before a step was completed; the last: rank 0 was ended by SIGKILL"), "{end:?}");
}

#[test]
fn five_losses_before_a_step_give_up_however_long_they_take() {
    let mut world = World::new(1);
    for incarnation in 1..5 {
        assert_eq!(world.dies(rank(0, incarnation), SIGKILL), [format!("spawn rank 0.{}", incarnation + 1)]);
        world.sees((0, incarnation + 1), Some(health(Phase::Loading, u64::from(incarnation))), Duration::ZERO);
        assert_eq!(world.wait(61.0), [""; 0]);
    }
    assert!(world.dies(rank(0, 5), SIGKILL)[0].contains("shards were lost 5 times"));
}

#[test]
fn losses_after_a_completed_step_only_lengthen_the_back_off() {
    let mut world = World::stepping(1);
    for (incarnation, delay) in (1..).zip([0.0, 0.3, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]) {
        let mut actions = world.dies(rank(0, incarnation), SIGKILL);
        if delay > 0.0 {
            assert_eq!(actions, [format!("lost {incarnation}")]);
            assert_eq!(world.wait(delay - 0.1), [""; 0]);
            actions = world.wait(0.1);
        }
        assert_eq!(actions.last().unwrap(), &format!("spawn rank 0.{}", incarnation + 1));
        let number = u64::from(incarnation) + 1;
        assert_eq!(world.loaded(0, incarnation + 1), [format!("generation {number}: 0.{}", incarnation + 1)]);
        world.says(serving(number));
        world.says(ToLauncher::Stepped { number });
    }
}

#[test]
fn an_idle_server_that_is_hit_now_and_then_goes_on() {
    let mut world = World::serving(1);
    for incarnation in 1..10 {
        world.wait(6.0);
        world.dies(rank(0, incarnation), SIGKILL);
        world.wait(5.0);
        let number = u64::from(incarnation) + 1;
        assert_eq!(world.loaded(0, incarnation + 1), [format!("generation {number}: 0.{}", incarnation + 1)]);
        world.says(serving(number));
    }
}

#[test]
fn giving_up_tells_the_router_first_and_ends_it_after_its_streams() {
    let mut world = World::serving(1);
    world.dies(rank(0, 1), SIGKILL);
    world.dies(rank(0, 2), SIGKILL);
    world.wait(0.3);
    assert_eq!(world.dies(rank(0, 3), SIGKILL), ["gave up"]);
    assert_eq!(world.wait(0.4), [""; 0]);
    assert_eq!(world.wait(0.1), ["term router.1"]);
    assert_eq!(world.wait(2.5), ["kill router.1"]);
    assert!(world.everyone_ends(&[router(1)])[0].starts_with("fail: shards were lost 3 times"));
}

#[test]
fn a_rank_that_says_it_cannot_load_is_not_asked_again() {
    let mut world = World::new(2);
    assert_eq!(world.dies(rank(0, 1), Cause::Code(1)), ["term rank 1.1"]);
    assert_eq!(world.everyone_ends(&[rank(1, 1)]), ["fail: rank 0 could not load the model: the last line"]);
}

#[test]
fn a_rank_that_hangs_prints_its_stacks_is_killed_and_replaced() {
    let mut world = World::stepping(1);
    let busy = Health { busy: true, ..health(Phase::Serving, 7) };
    let mut actions = Vec::new();
    while actions.is_empty() {
        world.wait(0.5);
        actions = world.sees((0, 1), Some(busy.clone()), Duration::ZERO);
    }
    assert_eq!(actions, ["lost 1", "stacks rank 0.1"]);
    assert_eq!(world.wait(0.5), ["kill rank 0.1"]);
    assert_eq!(world.dies(rank(0, 1), SIGKILL), ["spawn rank 0.2"]);
    assert_eq!(world.loaded(0, 2), ["generation 2: 0.2"]);
    assert!(world.logged.iter().any(|line| line.contains("rank 0 hung: no progress for")));
}

#[test]
fn a_rank_that_does_not_even_answer_is_killed_without_stacks() {
    let mut world = World::stepping(2);
    let mut actions = Vec::new();
    while actions.is_empty() {
        world.wait(0.5);
        world.loaded(0, 1);
        actions = world.sees((1, 1), None, Duration::ZERO);
    }
    assert_eq!(actions, ["lost 1", "kill rank 1.1"]);
    assert_eq!(world.dies(rank(1, 1), SIGKILL), ["spawn rank 1.2"]);
}

#[test]
fn a_rank_that_was_stopped_and_goes_on_after_it_was_replaced_is_not_listened_to() {
    let mut world = World::stepping(1);
    world.dies(rank(0, 1), SIGKILL);
    assert_eq!(world.loaded(0, 1), [""; 0]);
    assert_eq!(world.dies(rank(0, 1), Cause::Code(0)), [""; 0]);
    assert_eq!(world.loaded(0, 2), ["generation 2: 0.2"]);
}

#[test]
fn after_a_fault_without_a_culprit_all_ranks_join_again() {
    let mut world = World::stepping(2);
    assert_eq!(world.says(fault(1, None, false)), [""; 0]);
    assert_eq!(world.all_answer(&[1, 1]), ["generation 2: 0.1 1.1"]);
}

#[test]
fn a_fault_that_a_death_caused_counts_with_the_death() {
    let mut world = World::stepping(2);
    world.says(fault(1, Some(1), false));
    assert_eq!(world.loaded(0, 1), [""; 0]);
    assert_eq!(world.dies(rank(1, 1), SIGKILL), ["spawn rank 1.2"]);
    assert_eq!(world.all_answer(&[1, 2]), ["generation 2: 0.1 1.2"]);
}

#[test]
fn faults_without_a_step_in_between_end_in_replacing_all_ranks() {
    let mut world = World::stepping(2);
    for number in 1..=3 {
        assert_eq!(world.says(fault(number, Some(0), false)), [""; 0]);
        let before = world.all_answer(&[1, 1]);
        let after = world.wait(0.6);
        assert_eq!([before, after].concat(), [format!("generation {}: 0.1 1.1", number + 1)]);
    }
    assert_eq!(world.says(fault(4, Some(0), false)), ["lost 4", "stacks rank 0.1", "stacks rank 1.1"]);
    assert_eq!(world.wait(0.5), ["kill rank 0.1", "kill rank 1.1"]);
    assert_eq!(world.dies(rank(0, 1), SIGKILL), ["spawn rank 0.2"]);
    assert_eq!(world.dies(rank(1, 1), SIGKILL), ["spawn rank 1.2"]);
    assert_eq!(world.all_answer(&[2, 2]), ["generation 5: 0.2 1.2"]);
}

#[test]
fn of_a_fault_that_nobody_is_blamed_for_those_are_replaced_that_do_not_wait_for_a_peer() {
    let waits = Health { busy: true, waits: true, ..health(Phase::Serving, 7) };
    let mut world = World::stepping(2);
    world.sees((0, 1), Some(waits.clone()), Duration::ZERO);
    world.sees((1, 1), None, Duration::ZERO);
    assert_eq!(world.says(fault(1, None, true)), ["lost 1", "kill rank 1.1"]);
    assert_eq!(world.dies(rank(1, 1), SIGKILL), ["spawn rank 1.2"]);
    assert_eq!(world.all_answer(&[1, 2]), ["generation 2: 0.1 1.2"]);

    let mut world = World::stepping(2);
    world.sees((0, 1), Some(waits.clone()), Duration::ZERO);
    world.sees((1, 1), Some(waits), Duration::ZERO);
    assert_eq!(world.says(fault(1, None, true)), ["lost 1", "stacks rank 0.1", "stacks rank 1.1"]);
}

#[test]
fn a_rank_that_the_router_wants_replaced_is_killed() {
    let mut world = World::stepping(2);
    assert_eq!(world.says(fault(1, Some(1), true)), ["lost 1", "stacks rank 1.1"]);
    assert_eq!(world.wait(0.5), ["kill rank 1.1"]);
    assert_eq!(world.dies(rank(1, 1), SIGKILL), ["spawn rank 1.2"]);
    assert_eq!(world.all_answer(&[1, 2]), ["generation 2: 0.1 1.2"]);
}

#[test]
fn a_fault_of_a_generation_that_is_already_gone_is_ignored() {
    let mut world = World::stepping(1);
    world.dies(rank(0, 1), SIGKILL);
    assert_eq!(world.says(fault(1, None, true)), [""; 0]);
    world.loaded(0, 2);
    assert_eq!(world.says(fault(1, Some(0), true)), [""; 0]);
}

#[test]
fn a_router_that_dies_is_restarted_and_told_the_present_generation() {
    let mut world = World::stepping(2);
    assert_eq!(world.dies(router(1), SIGKILL), ["spawn router.2"]);
    assert_eq!(world.on(Event::RouterConnected), ["generation 1: 0.1 1.1"]);
    world.says(serving(1));
    assert_eq!(world.dies(router(2), SIGKILL), [""; 0]);
    assert_eq!(world.wait(0.3), ["spawn router.3"]);
}

/// Looks at the first router every half second, for so long.
fn look_at_router(world: &mut World, seconds: u32, mut answers: impl FnMut(u32) -> bool, busy: bool) -> Vec<String> {
    let (mut found, start) = (Vec::new(), world.now);
    for look in 0..2 * seconds {
        world.now += Duration::from_millis(500);
        let processor_time = Some(if busy { world.now - start } else { Duration::ZERO });
        let actions = world.on(Event::RouterSampled { incarnation: 1, processor_time });
        if actions == ["ping"] && answers(look) {
            assert_eq!(world.says(ToLauncher::Pong), [""; 0]);
        }
        found.extend(actions.into_iter().filter(|action| action != "ping"));
    }
    found
}

#[test]
fn a_router_that_no_longer_answers_is_killed_and_replaced_within_seconds() {
    let mut world = World::stepping(2);
    assert_eq!(look_at_router(&mut world, 600, |_| true, false), [""; 0]);
    assert_eq!(look_at_router(&mut world, 5, |_| false, false), [""; 0]);
    assert_eq!(look_at_router(&mut world, 600, |_| false, false), ["kill router.1"]);
    assert!(world.logged.last().unwrap().starts_with("router hung: no answer for 5"), "{:?}", world.logged.last());
    let logged = world.logged.len();
    assert_eq!(world.dies(router(1), SIGKILL), ["spawn router.2"]);
    assert_eq!(world.logged.len(), logged, "why it died is known");
    assert_eq!(world.on(Event::RouterConnected), ["generation 1: 0.1 1.1"]);
}

#[test]
fn a_router_that_is_slow_to_answer_but_works_is_given_a_minute() {
    let mut world = World::stepping(1);
    assert_eq!(look_at_router(&mut world, 59, |_| false, true), [""; 0]);
    assert_eq!(look_at_router(&mut world, 5, |_| false, true), ["kill router.1"]);
}

#[test]
fn a_router_that_drains_is_not_judged() {
    let mut world = World::stepping(1);
    assert_eq!(world.on(Event::Stop), ["term router.1"]);
    assert_eq!(look_at_router(&mut world, 600, |_| false, false), [""; 0]);
}

#[test]
fn a_router_that_dies_during_recovery_is_told_the_next_generation() {
    let mut world = World::stepping(1);
    world.dies(rank(0, 1), SIGKILL);
    world.dies(router(1), SIGKILL);
    assert_eq!(world.on(Event::RouterConnected), [""; 0]);
    assert_eq!(world.loaded(0, 2), ["generation 2: 0.2"]);
}

#[test]
fn a_router_that_never_serves_is_given_up() {
    let mut world = World::new(1);
    world.loaded(0, 1);
    assert_eq!(world.dies(router(1), Cause::Code(1)), ["spawn router.2"]);
    world.dies(router(2), Cause::Code(1));
    world.wait(0.3);
    assert_eq!(world.dies(router(3), Cause::Code(1)), ["term rank 0.1"]);
    let end = world.everyone_ends(&[rank(0, 1)]);
    assert!(end[0].starts_with("fail: the router was lost 3 times within 60 s before it served"), "{end:?}");
}

#[test]
fn a_router_that_refuses_its_arguments_is_not_asked_again() {
    let mut world = World::new(1);
    world.loaded(0, 1);
    assert_eq!(world.dies(router(1), Cause::Code(2)), ["term rank 0.1"]);
    assert!(world.everyone_ends(&[rank(0, 1)])[0].starts_with("fail: the router refused its arguments"));
}

#[test]
fn a_router_that_can_never_work_is_not_started_again() {
    let mut world = World::new(1);
    world.loaded(0, 1);
    let logged = world.logged.len();
    assert_eq!(world.dies(router(1), Cause::Code(78)), ["term rank 0.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1)]), ["fail: the router cannot serve: the last line"]);
    assert_eq!(world.logged.len(), logged, "the end of the launcher says it");
}

#[test]
fn a_router_that_cannot_serve_ends_everything() {
    let mut world = World::new(1);
    world.loaded(0, 1);
    world.on(Event::RouterConnected);
    let reason = "0 blocks fit".to_owned();
    assert_eq!(world.says(ToLauncher::CannotServe { reason }), ["gave up", "term rank 0.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1), router(1)]), ["fail: 0 blocks fit"]);
}

#[test]
fn a_program_that_cannot_be_started_ends_everything() {
    let mut world = World::new(2);
    let actions = world.on(Event::NotSpawned { who: rank(1, 1), error: "no memory".into() });
    assert_eq!(actions, ["term rank 0.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1)]), ["fail: rank 1 could not be started: no memory"]);
}

#[test]
fn a_stop_before_anything_is_served_ends_at_once() {
    let mut world = World::new(2);
    assert_eq!(world.on(Event::Stop), ["term rank 0.1", "term rank 1.1"]);
    assert_eq!(world.wait(1.0), ["kill rank 0.1", "kill rank 1.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1), rank(1, 1)]), ["end"]);
}

#[test]
fn a_stop_drains_the_router_and_then_ends_the_shards() {
    let mut world = World::stepping(2);
    assert_eq!(world.on(Event::Stop), ["term router.1"]);
    assert_eq!(world.wait(60.0), [""; 0]);
    assert_eq!(world.dies(router(1), Cause::Code(0)), ["term rank 0.1", "term rank 1.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1), rank(1, 1)]), ["end"]);
}

#[test]
fn a_drain_that_does_not_end_is_cut_off_after_the_grace() {
    let mut world = World::stepping(1);
    world.on(Event::Stop);
    assert_eq!(world.wait(90.9), [""; 0]);
    assert_eq!(world.wait(0.1), ["kill router.1"]);
    assert_eq!(world.dies(router(1), SIGKILL), ["term rank 0.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1)]), ["end"]);
}

#[test]
fn a_router_that_crashes_while_it_drains_is_a_failure() {
    let mut world = World::stepping(1);
    world.on(Event::Stop);
    assert_eq!(world.dies(router(1), Cause::Signal(11)), ["term rank 0.1"]);
    let end = world.everyone_ends(&[rank(0, 1)]);
    assert!(end[0].starts_with("fail: while requests were finishing, the router was ended by SIGSEGV"), "{end:?}");
}

#[test]
fn a_rank_that_dies_during_a_drain_is_replaced_so_that_no_stream_is_lost() {
    let mut world = World::stepping(2);
    world.on(Event::Stop);
    assert_eq!(world.dies(rank(0, 1), SIGKILL), ["lost 1", "spawn rank 0.2"]);
    assert_eq!(world.all_answer(&[2, 1]), ["generation 2: 0.2 1.1"]);
}

#[test]
fn a_second_stop_ends_the_streams_at_once_and_a_third_kills_everything() {
    let mut world = World::stepping(1);
    world.on(Event::Stop);
    assert_eq!(world.on(Event::Stop), ["gave up", "term rank 0.1"]);
    assert_eq!(world.wait(0.9), [""; 0], "the router tells its clients and ends");
    assert_eq!(world.wait(0.1), ["term router.1", "kill rank 0.1", "kill router.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1), router(1)]), ["end"]);

    let mut world = World::stepping(1);
    world.on(Event::Stop);
    world.on(Event::Stop);
    assert_eq!(world.on(Event::Stop), ["kill rank 0.1", "kill router.1"]);
    assert_eq!(world.everyone_ends(&[rank(0, 1), router(1)]), ["end"]);

    let mut world = World::new(1);
    assert_eq!(world.on(Event::Stop), ["term rank 0.1"]);
    assert_eq!(world.on(Event::Stop), ["kill rank 0.1"]);
}

#[test]
fn a_start_without_progress_ends_with_the_stacks_of_all_ranks() {
    let mut world = World::new(2);
    world.sees((0, 1), Some(health(Phase::Loading, 5)), Duration::ZERO);
    assert_eq!(world.wait(120.0), [""; 0], "the first tick counts nothing");
    assert_eq!(world.wait(0.1), ["stacks rank 0.1", "stacks rank 1.1"]);
    assert_eq!(world.wait(1.0), ["term rank 0.1", "term rank 1.1"]);
    assert_eq!(
        world.everyone_ends(&[rank(0, 1), rank(1, 1)]),
        ["fail: no progress for 120 s (--startup-stall-timeout): rank 0: loading, rank 1: started, never answered"]
    );
}

#[test]
fn a_stalled_start_tells_which_rank_is_frozen() {
    let mut world = World::new(2);
    let sees = |world: &mut World, rank, state| {
        let sample = Sample { health: None, processor_time: None, state: Some(state) };
        world.on(Event::Sampled { rank, incarnation: 1, sample });
    };
    world.wait(121.0);
    sees(&mut world, 0, 'S');
    sees(&mut world, 1, 'T');
    world.wait(1.0);
    let frozen: Vec<&String> = world.logged.iter().filter(|line| line.contains("no stack")).collect();
    assert_eq!(frozen, ["rank 1: no stack, process state T (stopped)"]);
}

#[test]
fn progress_of_any_rank_keeps_a_start_alive() {
    let mut world = World::new(2);
    for progress in 0..10 {
        assert_eq!(world.sees((1, 1), Some(health(Phase::Loading, progress)), Duration::ZERO), [""; 0]);
        assert_eq!(world.wait(100.0), [""; 0]);
    }
}

#[test]
fn a_restart_without_progress_ends_too_and_a_server_without_work_does_not() {
    let mut world = World::stepping(1);
    assert_eq!(world.wait(1000.0), [""; 0]);
    world.dies(rank(0, 1), SIGKILL);
    assert_eq!(world.wait(120.0), ["stacks rank 0.2"]);
    assert_eq!(world.wait(1.0), ["gave up", "term rank 0.2"]);
}

#[test]
fn a_launcher_that_was_stopped_itself_does_not_call_the_start_stalled() {
    let mut world = World::new(1);
    world.wait(1.0);
    world.now += Duration::from_secs(1000);
    assert_eq!(world.wait(1.0), [""; 0]);
}

#[test]
fn whatever_happens_no_process_is_spawned_twice_and_none_is_forgotten_at_the_end() {
    // A small generator of our own: the seed is printed by the assertion.
    for seed in 1..2000_u64 {
        let mut state = seed;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut world = World::serving(2);
        let mut alive = vec![rank(0, 1), rank(1, 1), router(1)];
        let mut ended = false;
        for turn in 0..400 {
            let event = match random(11) {
                0 if turn < 300 => {
                    let message = match random(4) {
                        3 => ToLauncher::Pong,
                        0 => fault(random(6), Some(random(3) as u32), random(2) == 0),
                        1 => serving(random(6)),
                        _ => ToLauncher::Stepped { number: random(6) },
                    };
                    Event::RouterSaid(message)
                }
                1 if !alive.is_empty() => {
                    let who = alive.remove(random(alive.len() as u64) as usize);
                    Event::Exited { who, exit: Exit { cause: SIGKILL, last_lines: Vec::new() } }
                }
                2 => Event::RouterConnected,
                3 if random(10) == 0 => Event::Stop,
                4..6 => match alive.iter().find(|who| matches!(who, Who::Rank { .. })) {
                    Some(&Who::Rank { rank, incarnation }) => {
                        let health = (random(4) > 0).then(|| health(Phase::Loaded, random(3)));
                        Event::Sampled { rank, incarnation, sample: Sample { health, ..Sample::default() } }
                    }
                    _ => Event::Tick,
                },
                6 => {
                    let incarnation = alive.iter().find_map(|who| match who {
                        Who::Router { incarnation } => Some(*incarnation),
                        Who::Rank { .. } => None,
                    });
                    Event::RouterSampled { incarnation: incarnation.unwrap_or(1), processor_time: None }
                }
                _ => {
                    world.now += Duration::from_millis(random(3000));
                    Event::Tick
                }
            };
            for action in world.supervisor.on(world.now, event) {
                match action {
                    Action::Spawn(who) => {
                        let is_twin = |other: &Who| match (other, who) {
                            (Who::Rank { rank: a, .. }, Who::Rank { rank: b, .. }) => *a == b,
                            (Who::Router { .. }, Who::Router { .. }) => true,
                            _ => false,
                        };
                        assert!(!alive.iter().any(is_twin), "seed {seed}: {who:?} is spawned beside {alive:?}");
                        alive.push(who);
                    }
                    Action::Signal(who, _) => assert!(!ended, "seed {seed}: a signal to {who:?} after the end"),
                    Action::End(_) => {
                        assert!(alive.is_empty(), "seed {seed}: {alive:?} are forgotten");
                        ended = true;
                    }
                    _ => {}
                }
            }
            if ended {
                break;
            }
        }
        // Whoever is asked to end, ends.
        for _ in 0..3 {
            world.on(Event::Stop);
        }
        for _ in 0..100 {
            let Some(who) = alive.pop() else { break };
            ended |= world.dies(who, SIGKILL).iter().any(|action| is_end(action));
        }
        world.now += Duration::from_secs(10);
        ended |= world.on(Event::Tick).iter().any(|action| is_end(action));
        assert!(ended, "seed {seed}: it never ends");
    }
}
