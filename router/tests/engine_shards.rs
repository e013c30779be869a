//! What the engine and the launcher say to each other, step by step, and how shards are brought into service.

#![allow(clippy::unwrap_used)]

mod engine_common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use engine_common::*;
use text_generation_router::control::{LauncherLink, Link, ToLauncher, ToRouter};
use text_generation_router::engine::{Config, Driver, Ended, Engine, GenerateError};
use text_generation_router::shards::fake::{FakeOptions, FakeShards};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

struct Router {
    engine: Engine,
    launcher: LauncherLink,
    driver: JoinHandle<Ended>,
    shards: FakeShards,
}

fn router(options: FakeOptions, config: Config) -> Router {
    let shards = FakeShards::new(options);
    let (link, launcher) = Link::pair();
    let (driver, engine, _observer) = Driver::new(config, Arc::new(shards.clone()), link, tokenizer());
    Router { engine, launcher, driver: tokio::spawn(driver.run(std::future::pending())), shards }
}

impl Router {
    async fn offer(&self, number: u64) {
        let ranks = self.shards.addresses();
        let rendezvous = PathBuf::from("rendezvous");
        self.launcher.outgoing.send(ToRouter::Generation { number, ranks, rendezvous }).await.unwrap();
    }

    async fn heard(&mut self) -> ToLauncher {
        self.launcher.incoming.recv().await.unwrap()
    }
}

fn two_ranks() -> FakeOptions {
    FakeOptions { world_size: 2, ..FakeOptions::default() }
}

#[tokio::test(start_paused = true)]
async fn a_generation_is_joined_and_its_first_step_reported() {
    let mut router = router(two_ranks(), Config::default());
    router.offer(1).await;
    assert_eq!(router.heard().await, ToLauncher::Serving { number: 1, epoch: 1, num_blocks: 512 });
    generate(&router.engine, request(1, 5)).await.unwrap();
    generate(&router.engine, request(2, 5)).await.unwrap();
    assert_eq!(router.heard().await, ToLauncher::Stepped { number: 1 });
    assert!(router.launcher.incoming.is_empty(), "the first step only");
    let facts = router.engine.status().borrow().model.clone().unwrap();
    assert_eq!((facts.max_total_tokens, facts.max_input_tokens, facts.world_size), (2048, 2047, 2));
}

#[tokio::test(start_paused = true)]
async fn the_epoch_is_higher_than_any_that_a_rank_has_seen() {
    let mut first = router(two_ranks(), Config::default());
    first.offer(1).await;
    first.heard().await;
    let shards = first.shards.clone();
    first.driver.abort();
    shards.restart(1);
    let mut second = router(two_ranks(), Config::default());
    second.shards = shards.clone();
    let (link, launcher) = Link::pair();
    let (driver, engine, _) = Driver::new(Config::default(), Arc::new(shards), link, tokenizer());
    (second.launcher, second.engine) = (launcher, engine);
    tokio::spawn(driver.run(std::future::pending()));
    second.offer(1).await;
    assert_eq!(second.heard().await, ToLauncher::Serving { number: 1, epoch: 2, num_blocks: 512 });
}

#[tokio::test(start_paused = true)]
async fn a_failed_join_is_tried_again_and_then_the_rank_is_to_be_replaced() {
    let mut router = router(two_ranks(), Config::default());
    router.shards.refuse_joins(1, 2);
    for (offered, expected) in [(1, false), (2, true)] {
        router.offer(offered).await;
        let ToLauncher::Fault { number, rank: Some(1), replace, reason } = router.heard().await else {
            panic!("expected a fault of rank 1")
        };
        assert_eq!((number, replace), (offered, expected), "{reason}");
        assert!(reason.contains("told to refuse"), "{reason}");
    }
    router.shards.restart(1);
    router.offer(3).await;
    assert!(matches!(router.heard().await, ToLauncher::Serving { number: 3, .. }));
}

#[tokio::test(start_paused = true)]
async fn a_lost_generation_is_abandoned_and_not_joined_again() {
    let mut router = router(two_ranks(), Config::default());
    router.offer(1).await;
    router.heard().await;
    router.launcher.outgoing.send(ToRouter::Lost { number: 1, reason: "rank 0 was killed".into() }).await.unwrap();
    router.engine.status().wait_for(|status| !status.is_ready).await.unwrap();
    assert!(router.engine.status().borrow().detail.contains("rank 0 was killed"));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(router.launcher.incoming.is_empty(), "the router waits for the launcher");
    router.offer(2).await;
    assert_eq!(router.heard().await, ToLauncher::Serving { number: 2, epoch: 2, num_blocks: 512 });
}

#[tokio::test(start_paused = true)]
async fn a_lost_message_about_an_older_generation_is_ignored() {
    let mut router = router(two_ranks(), Config::default());
    router.offer(2).await;
    router.heard().await;
    router.launcher.outgoing.send(ToRouter::Lost { number: 1, reason: "late".into() }).await.unwrap();
    router.offer(1).await;
    generate(&router.engine, request(1, 5)).await.unwrap();
    assert_eq!(router.engine.status().borrow().generation, 2);
}

#[tokio::test(start_paused = true)]
async fn requests_before_the_first_generation_are_refused() {
    let mut router = router(FakeOptions::default(), Config::default());
    let reason = "the model is not loaded yet".into();
    assert_eq!(generate(&router.engine, request(1, 5)).await, Err(GenerateError::ShuttingDown { reason }));
    router.offer(1).await;
    router.heard().await;
    assert_eq!(generate(&router.engine, request(1, 5)).await.unwrap().ids.len(), 5);
}

#[tokio::test(start_paused = true)]
async fn when_the_launcher_gives_up_every_stream_ends_with_its_reason() {
    let router = router(two_ranks(), Config::default());
    router.offer(1).await;
    ready(&router.engine).await;
    let stream = submit(&router.engine, request(1, 2000)).await;
    router.launcher.outgoing.send(ToRouter::GaveUp { reason: "rank 1 cannot start".into() }).await.unwrap();
    let reason = String::from("rank 1 cannot start");
    assert_eq!(read(stream).await, Err(GenerateError::ShuttingDown { reason: reason.clone() }));
    assert_eq!(router.driver.await.unwrap(), Ended::LauncherGone { reason });
}

#[tokio::test(start_paused = true)]
async fn limits_that_do_not_fit_are_told_to_the_launcher_with_values_that_do() {
    let mut config = Config::default();
    config.wishes.max_total_tokens = Some(1000);
    let mut router = router(FakeOptions { num_blocks: 10, ..two_ranks() }, config);
    router.offer(1).await;
    let ToLauncher::CannotServe { reason } = router.heard().await else { panic!("expected a refusal") };
    assert!(reason.contains("--max-total-tokens 160"), "{reason}");
    assert_eq!(router.driver.await.unwrap(), Ended::CannotServe { reason });
}

#[tokio::test(start_paused = true)]
async fn a_restart_is_given_the_agreed_number_of_blocks() {
    let mut config = Config::default();
    config.wishes.max_running = Some(1);
    let mut router = router(FakeOptions { num_blocks: 100_000, ..two_ranks() }, config);
    router.offer(1).await;
    let agreed = 2048 / 16;
    assert_eq!(router.heard().await, ToLauncher::Serving { number: 1, epoch: 1, num_blocks: agreed });
    router.shards.shrink(agreed);
    router.shards.restart(0);
    router.launcher.outgoing.send(ToRouter::Lost { number: 1, reason: "restarted".into() }).await.unwrap();
    router.offer(2).await;
    let served = loop {
        match router.heard().await {
            ToLauncher::Serving { num_blocks, .. } => break num_blocks,
            // The broken stream may be noticed before the launcher's word arrives.
            ToLauncher::Fault { replace: false, .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(served, agreed);
}

/// Over a real socket, with a scripted launcher.
#[tokio::test]
async fn the_control_socket_carries_json_lines_both_ways() {
    let directory = std::env::temp_dir().join(format!("control-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let socket = directory.join("control");
    let listener = UnixListener::bind(&socket).unwrap();
    let shards = FakeShards::new(FakeOptions::default());
    let (link, accepted) = tokio::join!(Link::connect(&socket), listener.accept());
    let (driver, _engine, _) = Driver::new(Config::default(), Arc::new(shards.clone()), link.unwrap(), tokenizer());
    let driver = tokio::spawn(driver.run(std::future::pending()));

    let (reader, mut writer) = accepted.unwrap().0.into_split();
    let process_id = shards.addresses()[0].process_id;
    let ranks = format!(r#"[{{"rank":0,"socket":"s","process_id":{process_id},"incarnation":0}}]"#);
    let line = format!(r#"{{"type":"generation","number":7,"ranks":{ranks},"rendezvous":"r"}}"#);
    writer.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    let mut lines = BufReader::new(reader).lines();
    let heard = lines.next_line().await.unwrap().unwrap();
    assert_eq!(heard, r#"{"type":"serving","number":7,"epoch":1,"num_blocks":512}"#);

    drop((lines, writer));
    assert_eq!(driver.await.unwrap(), Ended::LauncherGone { reason: "the launcher is gone".into() });
    std::fs::remove_dir_all(directory).unwrap();
}
