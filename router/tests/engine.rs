//! The engine against fake shards that keep a simulated KV cache: any lost, repeated or changed id shows. Time is paused.

#![allow(clippy::unwrap_used)]

mod engine_common;

use std::sync::Arc;
use std::time::Duration;

use engine_common::*;
use futures::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use text_generation_router::admin;
use text_generation_router::control::{Link, ToLauncher, ToRouter};
use text_generation_router::engine::fake::{self, FakeEngine};
use text_generation_router::engine::{Config, Driver, Ended, FinishReason, GenerateError};
use text_generation_router::shards::fake::{Corruption, FakeOptions, FakeShards};
use tokio::time::sleep;

async fn start(options: FakeOptions, config: Config) -> FakeEngine {
    let fake = fake::start(options, config, tokenizer());
    ready(&fake.engine).await;
    fake
}

fn with_max_running(max_running: usize) -> Config {
    let mut config = Config::default();
    config.wishes.max_running = Some(max_running);
    config
}

async fn alone(seed: u64, max_new_tokens: usize) -> Answer {
    let fake = start(FakeOptions::default(), Config::default()).await;
    generate(&fake.engine, request(seed, max_new_tokens)).await.unwrap()
}

/// Nothing waits or runs, no block is pinned, and every permit and row is back.
async fn assert_clean(fake: &FakeEngine) {
    let mut state = admin::read(&fake.engine, &fake.observer).await.unwrap();
    for _ in 0..100 {
        let is_clean = state.running + state.queue + state.blocks.pinned == 0
            && state.permits.free == state.permits.total
            && state.ranks.iter().all(|rank| rank.live_rows == Some(0));
        if is_clean {
            assert_eq!(state.blocks.free + state.blocks.cached, state.blocks.total);
            return;
        }
        sleep(Duration::from_millis(100)).await;
        state = admin::read(&fake.engine, &fake.observer).await.unwrap();
    }
    panic!("not clean: {state:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_yields_its_tokens_and_then_its_text() {
    let fake = start(FakeOptions::default(), Config::default()).await;
    let answer = generate(&fake.engine, request(1, 20)).await.unwrap();
    assert_eq!((answer.ids.len(), answer.reason), (20, FinishReason::Length));
    assert_clean(&fake).await;
}

#[tokio::test(start_paused = true)]
async fn thirty_two_requests_at_once_equal_the_same_requests_alone() {
    let fake = start(FakeOptions { world_size: 2, ..FakeOptions::default() }, Config::default()).await;
    let together = join_all((0..32).map(|seed| generate(&fake.engine, request(seed, 40)))).await;
    for (seed, answer) in (0..32).zip(together) {
        assert_eq!(answer.unwrap(), alone(seed, 40).await, "seed {seed}");
    }
    assert_clean(&fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_is_too_small_for_all_changes_no_answer() {
    let options = FakeOptions { num_blocks: 12, ..FakeOptions::default() };
    for depth in [1, 2, 4] {
        let mut config = Config::default();
        config.wishes.max_open_steps = depth;
        let fake = start(options.clone(), config).await;
        let together = join_all((0..16).map(|seed| generate(&fake.engine, request(seed, 60)))).await;
        for (seed, answer) in (0..16).zip(together) {
            assert_eq!(answer.unwrap(), alone(seed, 60).await, "depth {depth}, seed {seed}");
        }
        assert_clean(&fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn streams_dropped_at_random_points_return_all_blocks_and_permits() {
    let fake = start(FakeOptions { world_size: 2, ..FakeOptions::default() }, with_max_running(8)).await;
    let mut rng = StdRng::seed_from_u64(1);
    let points: Vec<usize> = (0..64).map(|_| rng.random_range(0..30)).collect();
    let clients = (0..64).zip(points).map(async |(seed, point)| {
        let mut stream = submit(&fake.engine, request(seed, 30)).await;
        for _ in 0..point {
            stream.next().await;
        }
    });
    join_all(clients).await;
    assert_clean(&fake).await;
    assert_eq!(generate(&fake.engine, request(7, 30)).await.unwrap(), alone(7, 30).await);
}

#[tokio::test(start_paused = true)]
async fn an_abort_while_the_shards_are_lost_returns_its_permit() {
    let fake = start(FakeOptions::default(), Config::default()).await;
    let mut stream = submit(&fake.engine, request(1, 1000)).await;
    stream.next().await.unwrap().unwrap();
    fake.shards.die(0);
    fake.engine.status().wait_for(|status| !status.is_ready).await.unwrap();
    drop(stream);
    sleep(Duration::from_millis(260)).await;
    assert!(!fake.engine.status().borrow().is_ready);
    assert_eq!(fake.engine.num_free_permits(), 128);
}

#[tokio::test(start_paused = true)]
async fn deaths_at_random_moments_change_no_answer() {
    for round in 0..10 {
        let fake = start(FakeOptions { world_size: 2, ..FakeOptions::default() }, with_max_running(16)).await;
        let mut rng = StdRng::seed_from_u64(round);
        let deaths = async {
            for _ in 0..2 {
                fake.shards.die_after(rng.random_range(0..2), rng.random_range(1..30));
                fake.engine.status().wait_for(|status| !status.is_ready).await.unwrap();
                ready(&fake.engine).await;
            }
        };
        let clients = join_all((0..24).map(|seed| generate(&fake.engine, request(seed, 100))));
        let (answers, ()) = tokio::join!(clients, deaths);
        for (seed, answer) in (0..24).zip(answers) {
            assert_eq!(answer.unwrap(), alone(seed, 100).await, "round {round}, seed {seed}");
        }
        assert_eq!(fake.engine.status().borrow().generation, 3, "round {round}");
        assert_clean(&fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_death_while_idle_is_noticed_and_the_next_request_is_served() {
    let fake = start(FakeOptions::default(), Config::default()).await;
    fake.shards.die(0);
    fake.engine.status().wait_for(|status| !status.is_ready).await.unwrap();
    assert_eq!(generate(&fake.engine, request(3, 10)).await.unwrap(), alone(3, 10).await);
    let status = fake.engine.status().borrow().clone();
    assert_eq!((status.generation, status.is_ready), (2, true));
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_does_not_answer_in_time_is_replaced() {
    let config = Config { step_timeout: Duration::from_secs(5), ..Config::default() };
    let fake = start(FakeOptions { world_size: 2, ..FakeOptions::default() }, config).await;
    let mut stream = submit(&fake.engine, request(5, 50)).await;
    stream.next().await.unwrap().unwrap();
    fake.shards.stall(1);
    let process_id = fake.shards.addresses()[1].process_id;
    let rest = async {
        let mut ids = vec![];
        while let Some(output) = stream.next().await {
            ids.push(output.unwrap().token.id);
        }
        ids
    };
    assert_eq!(rest.await, alone(5, 50).await.ids[1..]);
    assert_ne!(fake.shards.addresses()[1].process_id, process_id);
    assert_eq!(fake.shards.addresses()[0].incarnation, 0, "only the rank that hung was replaced");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_fit_is_a_fault_and_changes_nothing() {
    use Corruption::*;
    for (corruption, rank) in [(Digest, 1), (Step, 0), (Step, 1), (Epoch, 0), (RowCount, 0), (IdCount, 0)] {
        let fake = start(FakeOptions { world_size: 2, ..FakeOptions::default() }, Config::default()).await;
        let mut stream = submit(&fake.engine, request(5, 50)).await;
        let first = stream.next().await.unwrap().unwrap().token.id;
        fake.shards.corrupt(rank, corruption);
        let mut ids = vec![first];
        while let Some(output) = stream.next().await {
            ids.push(output.unwrap().token.id);
        }
        assert_eq!(ids, alone(5, 50).await.ids, "{corruption:?}");
        assert_eq!(fake.engine.status().borrow().epoch, 2, "{corruption:?}");
        assert_eq!(fake.shards.addresses()[0].incarnation, 0, "{corruption:?}: joining again suffices");
    }
}

#[tokio::test(start_paused = true)]
async fn a_row_error_ends_its_own_sequence_only() {
    let fake = start(FakeOptions::default(), Config::default()).await;
    fake.shards.poison(1); // it is in no other prompt, and never drawn
    let mut poisoned = request(2, 30);
    poisoned.prompt_ids[1] = 1;
    let (poisoned, other) = tokio::join!(generate(&fake.engine, poisoned), generate(&fake.engine, request(7, 30)));
    let message = "logits are not finite (poisoned)".into();
    assert_eq!(poisoned, Err(GenerateError::Row { kind: "numerical", message }));
    assert_eq!(other.unwrap(), alone(7, 30).await);
    assert_clean(&fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_kills_the_shards_fails_alone() {
    let fake = start(FakeOptions::default(), Config::default()).await;
    fake.shards.kill_at(1); // it is in no other prompt, and never drawn
    let mut killer = request(2, 30);
    killer.prompt_ids[1] = 1;
    let others = join_all((10..14).map(|seed| generate(&fake.engine, request(seed, 60))));
    let (killer, others) = tokio::join!(generate(&fake.engine, killer), others);
    assert_eq!(killer, Err(GenerateError::KilledShards));
    for (seed, answer) in (10..14).zip(others) {
        assert_eq!(answer.unwrap(), alone(seed, 60).await, "seed {seed}");
    }
    assert_clean(&fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_sequence_that_no_longer_fits_after_a_restart_is_told_so() {
    let fake = start(FakeOptions::default(), Config::default()).await;
    let (long, short) = (submit(&fake.engine, request(1, 1000)).await, submit(&fake.engine, request(2, 50)).await);
    sleep(Duration::from_millis(10)).await;
    fake.shards.shrink(10);
    fake.shards.die(0);
    assert_eq!(read(long).await, Err(GenerateError::TooLong { tokens: 4 + 1000, limit: 160 }));
    assert_eq!(read(short).await.unwrap(), alone(2, 50).await);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_fit_is_refused_at_once() {
    let fake = start(FakeOptions { num_blocks: 10, ..FakeOptions::default() }, Config::default()).await;
    let refused = generate(&fake.engine, request(1, 157)).await;
    assert_eq!(refused, Err(GenerateError::TooLong { tokens: 161, limit: 160 }));
    assert_eq!(generate(&fake.engine, request(1, 156)).await.unwrap().ids.len(), 156);
    assert_clean(&fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_string_ends_the_text_right_after_it() {
    let undisturbed = alone(1, 60).await;
    for (from, len) in [(5, 3), (12, 1), (30, 7)] {
        let stop: String = undisturbed.text.chars().skip(from).take(len).collect();
        let end = undisturbed.text.find(&stop).unwrap() + stop.len();
        let fake = start(FakeOptions { world_size: 2, ..FakeOptions::default() }, Config::default()).await;
        let mut asked = request(1, 60);
        asked.stop = vec!["never to be found in it".into(), stop.clone()];
        let answer = generate(&fake.engine, asked).await.unwrap();
        assert_eq!((answer.text.as_str(), answer.reason), (&undisturbed.text[..end], FinishReason::StopSequence));
        assert_clean(&fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn text_held_back_for_a_stop_string_comes_with_the_last_output() {
    let undisturbed = alone(1, 60).await;
    let mut asked = request(1, 60);
    let tail: String = undisturbed.text.chars().rev().take(4).collect::<Vec<_>>().into_iter().rev().collect();
    asked.stop = vec![format!("{tail} and more that never comes")];
    let fake = start(FakeOptions::default(), Config::default()).await;
    let answer = generate(&fake.engine, asked).await.unwrap();
    assert_eq!((answer.text, answer.reason), (undisturbed.text, FinishReason::Length));
}

#[tokio::test(start_paused = true)]
async fn an_end_token_ends_the_sequence_and_is_no_part_of_the_text() {
    let fake = start(FakeOptions { ids: 2..3, ..FakeOptions::default() }, Config::default()).await;
    let answer = generate(&fake.engine, request(1, 60)).await.unwrap();
    assert_eq!((answer.ids, answer.texts), (vec![2], vec!["</s>".to_owned()]));
    assert_eq!((answer.text.as_str(), answer.reason), ("", FinishReason::EosToken));
}

#[tokio::test(start_paused = true)]
async fn at_the_last_token_the_length_counts_whatever_else_it_ends() {
    let fake = start(FakeOptions { ids: 2..3, ..FakeOptions::default() }, Config::default()).await;
    let answer = generate(&fake.engine, request(1, 1)).await.unwrap();
    assert_eq!((answer.ids.len(), answer.reason), (1, FinishReason::Length));
}

#[tokio::test(start_paused = true)]
async fn draining_lets_running_streams_finish_and_refuses_new_ones() {
    let mut fake = start(FakeOptions::default(), with_max_running(4)).await;
    let streams = join_all((0..8).map(|seed| submit(&fake.engine, request(seed, 100)))).await;
    let permit = fake.engine.permit().unwrap();
    fake.drain();
    fake.engine.status().wait_for(|status| status.is_draining).await.unwrap();
    let refused = fake.engine.generate(request(9, 1), permit).await;
    assert!(matches!(refused, Err(GenerateError::ShuttingDown { .. })), "{refused:?}");
    for (seed, answer) in (0..8).zip(join_all(streams.into_iter().map(read)).await) {
        assert_eq!(answer.unwrap(), alone(seed, 100).await);
    }
    assert_eq!((&mut fake.driver).await.unwrap(), Ended::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_ping_is_answered_at_any_time_by_the_loop_itself() {
    let (link, mut launcher) = Link::pair();
    let shards = Arc::new(FakeShards::new(FakeOptions::default()));
    let (driver, engine, _observer) = Driver::new(Config::default(), shards.clone(), link, tokenizer());
    let driver = tokio::spawn(driver.run(std::future::pending()));
    launcher.outgoing.send(ToRouter::Ping).await.unwrap();
    assert_eq!(launcher.incoming.recv().await, Some(ToLauncher::Pong), "before there are shards");
    let generation = ToRouter::Generation { number: 1, ranks: shards.addresses(), rendezvous: "r".into() };
    launcher.outgoing.send(generation).await.unwrap();
    ready(&engine).await;
    assert!(matches!(launcher.incoming.recv().await, Some(ToLauncher::Serving { number: 1, .. })));
    shards.stall(0);
    let _stream = submit(&engine, request(1, 100)).await;
    launcher.outgoing.send(ToRouter::Ping).await.unwrap();
    assert_eq!(launcher.incoming.recv().await, Some(ToLauncher::Pong), "while a step is not answered");
    driver.abort();
}

#[tokio::test(start_paused = true)]
async fn streams_that_outlast_the_grace_are_told_so() {
    let mut fake = start(FakeOptions::default(), Config { grace: Duration::from_secs(1), ..Config::default() }).await;
    fake.shards.slow(Duration::from_secs(1));
    let stream = submit(&fake.engine, request(1, 100)).await;
    fake.drain();
    assert_eq!(read(stream).await, Err(GenerateError::ShuttingDown { reason: "the server is shutting down".into() }));
    assert_eq!((&mut fake.driver).await.unwrap(), Ended::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_too_long_is_refused_and_returns_its_permit() {
    let config = Config { queue_timeout: Some(Duration::from_secs(2)), ..with_max_running(1) };
    let fake = start(FakeOptions { step_time: Duration::from_millis(100), ..FakeOptions::default() }, config).await;
    let first = submit(&fake.engine, request(1, 100)).await;
    sleep(Duration::from_millis(50)).await;
    let second = generate(&fake.engine, request(2, 10)).await;
    assert_eq!(second, Err(GenerateError::QueueTimeout { seconds: 2.0 }));
    assert_eq!(fake.engine.num_free_permits(), 127);
    assert_eq!(read(first).await.unwrap(), alone(1, 100).await, "what runs is not timed");
}

#[tokio::test(start_paused = true)]
async fn more_requests_than_permits_are_refused_at_once_and_permits_come_back() {
    let mut config = Config::default();
    config.wishes.max_concurrent = 2;
    let fake = start(FakeOptions::default(), config).await;
    let streams = join_all((0..2).map(|seed| submit(&fake.engine, request(seed, 10)))).await;
    assert_eq!(fake.engine.permit().unwrap_err(), GenerateError::Overloaded);
    join_all(streams.into_iter().map(read)).await;
    assert_eq!(fake.engine.num_free_permits(), 2);
    assert_clean(&fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_reading_is_ended_and_others_are_not_held_up() {
    let fake =
        start(FakeOptions { step_time: Duration::from_millis(100), ..FakeOptions::default() }, Config::default()).await;
    let mut sleeper = submit(&fake.engine, request(1, 1500)).await;
    let other = generate(&fake.engine, request(2, 1000)).await.unwrap();
    assert_eq!(other, alone(2, 1000).await);
    assert_eq!(fake.engine.num_free_permits(), 128);
    let mut last = None;
    while let Some(output) = sleeper.next().await {
        last = Some(output);
    }
    assert_eq!(last, Some(Err(GenerateError::Stalled)));
    assert_clean(&fake).await;
}
