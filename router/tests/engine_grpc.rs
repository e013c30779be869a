//! The engine over real gRPC on Unix sockets, against fake ranks behind the generated server; and the admin socket.

#![allow(clippy::unwrap_used)]

mod engine_common;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use engine_common::*;
use text_generation_router::admin::{self, EngineState};
use text_generation_router::control::{LauncherLink, Link, ToLauncher, ToRouter};
use text_generation_router::engine::{Config, Driver, Engine, Observer, fake};
use text_generation_router::shards::fake::{Corruption, FakeOptions, FakeShards};
use text_generation_router::shards::grpc::GrpcShards;
use text_generation_router::shards::stub::serve_fake_rank;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Fake ranks behind sockets, and an engine that has been offered them.
struct Served {
    directory: PathBuf,
    shards: FakeShards,
    launcher: LauncherLink,
    engine: Engine,
    observer: Observer,
}

impl Drop for Served {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

impl Served {
    async fn start(world_size: u32) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("grpc-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let shards = FakeShards::new(FakeOptions { world_size, ..FakeOptions::default() });
        for rank in 0..world_size {
            let (socket, rank) = (directory.join(format!("shard-{rank}")), shards.rank(rank));
            tokio::spawn(async move { serve_fake_rank(&socket, rank).await.unwrap() });
        }
        let (link, launcher) = Link::pair();
        let (driver, engine, observer) = Driver::new(Config::default(), Arc::new(GrpcShards), link, tokenizer());
        tokio::spawn(driver.run(std::future::pending()));
        let served = Self { directory, shards, launcher, engine, observer };
        while (0..world_size).any(|rank| !served.directory.join(format!("shard-{rank}")).exists()) {
            tokio::task::yield_now().await;
        }
        served.offer(1).await;
        ready(&served.engine).await;
        served
    }

    async fn offer(&self, number: u64) {
        let mut ranks = self.shards.addresses();
        ranks.iter_mut().for_each(|address| address.socket = self.directory.join(format!("shard-{}", address.rank)));
        let rendezvous = self.directory.join("rendezvous");
        self.launcher.outgoing.send(ToRouter::Generation { number, ranks, rendezvous }).await.unwrap();
    }
}

async fn in_process(seed: u64) -> Answer {
    let fake = fake::start(FakeOptions::default(), Config::default(), tokenizer());
    ready(&fake.engine).await;
    generate(&fake.engine, request(seed, 60)).await.unwrap()
}

#[tokio::test]
async fn answers_over_the_wire_equal_those_in_process() {
    let served = Served::start(2).await;
    let answers = futures::future::join_all((0..16).map(|seed| generate(&served.engine, request(seed, 60)))).await;
    for (seed, answer) in (0..16).zip(answers) {
        assert_eq!(answer.unwrap(), in_process(seed).await, "seed {seed}");
    }
}

#[tokio::test]
async fn ranks_whose_tables_differ_are_a_fault_and_the_answer_goes_on() {
    let mut served = Served::start(2).await;
    assert!(matches!(served.launcher.incoming.recv().await, Some(ToLauncher::Serving { epoch: 1, .. })));
    let stream = submit(&served.engine, request(3, 60)).await;
    served.shards.corrupt(1, Corruption::Digest);
    let reason = loop {
        if let ToLauncher::Fault { reason, replace: false, .. } = served.launcher.incoming.recv().await.unwrap() {
            break reason;
        }
    };
    assert!(reason.contains("the tables of ranks 0 and 1 differ"), "{reason}");
    served.offer(2).await;
    assert_eq!(read(stream).await.unwrap(), in_process(3).await);
}

#[tokio::test]
async fn a_broken_stream_names_its_rank_and_the_next_generation_goes_on() {
    let mut served = Served::start(2).await;
    let mut stream = submit(&served.engine, request(4, 60)).await;
    let first = stream.next().await.unwrap().unwrap().token.id;
    served.shards.die(1);
    let fault = loop {
        match served.launcher.incoming.recv().await.unwrap() {
            ToLauncher::Fault { number, rank, reason, .. } => break (number, rank, reason),
            _ => continue,
        }
    };
    assert_eq!((fault.0, fault.1), (1, Some(1)), "{}", fault.2);
    served.shards.restart(1);
    served.offer(2).await;
    let mut ids = vec![first];
    while let Some(output) = stream.next().await {
        ids.push(output.unwrap().token.id);
    }
    assert_eq!(ids, in_process(4).await.ids);
}

#[tokio::test]
async fn a_socket_that_nobody_listens_on_is_a_fault_that_names_it() {
    let mut served = Served::start(1).await;
    served.launcher.incoming.recv().await.unwrap();
    std::fs::remove_file(served.directory.join("shard-0")).unwrap();
    served.offer(2).await;
    let Some(ToLauncher::Fault { rank: Some(0), reason, .. }) = served.launcher.incoming.recv().await else {
        panic!("expected a fault")
    };
    assert!(reason.contains("shard-0") && reason.contains("No such file"), "{reason}");
}

#[tokio::test]
async fn the_admin_socket_tells_blocks_permits_and_ranks_to_its_owner() {
    let served = Served::start(2).await;
    served.shards.slow(Duration::from_millis(20));
    let mut stream = submit(&served.engine, request(1, 500)).await;
    stream.next().await.unwrap().unwrap();

    let socket = served.directory.join("admin");
    let listener = admin::bind(&socket).unwrap();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    tokio::spawn(admin::serve(listener, served.engine.clone(), served.observer.clone()));
    let mut client = UnixStream::connect(&socket).await.unwrap();
    client.write_all(b"GET /state HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let state: EngineState = serde_json::from_str(body).unwrap();

    assert!(state.ready && state.steps > 0, "{state:?}");
    assert_eq!((state.epoch, state.generation, state.running, state.queue), (1, 1, 1, 0));
    assert_eq!((state.permits.total, state.permits.free), (128, 127));
    assert_eq!(state.blocks.total, state.blocks.free + state.blocks.cached + state.blocks.pinned);
    assert!(state.blocks.pinned > 0);
    let ranks: Vec<_> = state.ranks.iter().map(|rank| (rank.rank, rank.process_id, rank.live_rows)).collect();
    assert_eq!(ranks, [(0, 1000, Some(1)), (1, 1001, Some(1))]);
}
