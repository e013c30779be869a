//! A router that dies between sending a plan to rank 0 and to rank 1, and the one that comes after it.

#![allow(clippy::unwrap_used)]

mod engine_common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use engine_common::*;
use text_generation_router::control::{LauncherLink, Link, RankAddress, ToRouter};
use text_generation_router::engine::{Config, Driver, Engine, fake};
use text_generation_router::shards::Shard;
use text_generation_router::shards::fake::{FakeOptions, FakeShards};
use text_generation_router::shards::grpc::GrpcShards;
use text_generation_router::shards::stub::serve_fake_rank;

/// Tells the test binary, run again, that it is the router that dies.
const DIRECTORY: &str = "SELF_KILL_DIRECTORY";

/// An engine of two ranks behind sockets in `directory`.
async fn engine(directory: &Path) -> (Engine, LauncherLink) {
    let (link, launcher) = Link::pair();
    let config = Config { fault_file: Some(directory.join("fault")), ..Config::default() };
    let (driver, engine, _) = Driver::new(config, Arc::new(GrpcShards), link, tokenizer());
    tokio::spawn(driver.run(std::future::pending()));
    let address = |rank| RankAddress {
        rank,
        socket: directory.join(format!("shard-{rank}")),
        process_id: 1000 + rank,
        incarnation: 0,
    };
    let ranks = vec![address(0), address(1)];
    let generation = ToRouter::Generation { number: 1, ranks, rendezvous: directory.join("rendezvous") };
    launcher.outgoing.send(generation).await.unwrap();
    ready(&engine).await;
    (engine, launcher)
}

/// Does nothing unless the test below has started it.
#[tokio::test(flavor = "multi_thread")]
async fn the_router_that_dies() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        let (engine, _launcher) = engine(&directory).await;
        generate(&engine, request(1, 1000)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_reached_one_rank_only_harms_no_later_request() {
    use std::os::unix::process::ExitStatusExt;

    let directory = std::env::temp_dir().join(format!("self-kill-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("fault"), "point=between_ranks count=20 action=kill\n").unwrap();
    let shards = FakeShards::new(FakeOptions { world_size: 2, ..FakeOptions::default() });
    for rank in 0..2 {
        let (socket, rank) = (directory.join(format!("shard-{rank}")), shards.rank(rank));
        tokio::spawn(async move { serve_fake_rank(&socket, rank).await.unwrap() });
    }
    let mut router = Command::new(std::env::current_exe().unwrap());
    router.args(["--exact", "the_router_that_dies"]).env(DIRECTORY, &directory).stdout(Stdio::null());
    let died = tokio::task::spawn_blocking(move || router.status().unwrap()).await.unwrap();
    assert_eq!(died.signal(), Some(9));
    let mut steps = (0, 0);
    for _ in 0..100 {
        steps = (shards.rank(0).health().await.unwrap().step, shards.rank(1).health().await.unwrap().step);
        if steps == (20, 19) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(steps, (20, 19), "the last plan reached rank 0 only");

    let (engine, _launcher) = engine(&directory).await;
    assert_eq!(engine.status().borrow().epoch, 2);
    let undisturbed = fake::start(FakeOptions::default(), Config::default(), tokenizer());
    ready(&undisturbed.engine).await;
    let expected = generate(&undisturbed.engine, request(2, 60)).await.unwrap();
    assert_eq!(generate(&engine, request(2, 60)).await.unwrap(), expected);
    std::fs::remove_dir_all(directory).unwrap();
}
