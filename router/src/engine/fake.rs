//! A whole engine without processes: the real loop, fake shards and a fake launcher. For tests, the HTTP layer's too.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::limits::Wishes;
use super::{Config, Driver, Ended, Engine, Observer};
use crate::control::{LauncherLink, Link, ToLauncher, ToRouter};
use crate::shards::fake::{FakeOptions, FakeShards};
use crate::text::tokenizer::Tokenizer;

/// How long the fake launcher takes to replace a rank.
const RESTART: Duration = Duration::from_millis(300);

impl Default for Config {
    /// What the command line gives without flags, and every check.
    fn default() -> Self {
        Self {
            wishes: Wishes::default(),
            queue_timeout: None,
            step_timeout: Duration::from_secs(60),
            grace: Duration::from_secs(90),
            checks_books: true,
            fault_file: None,
        }
    }
}

/// A running engine. Dropping it ends the launcher, and so the loop.
#[derive(Debug)]
pub struct FakeEngine {
    /// Its entrance.
    pub engine: Engine,
    /// Its window.
    pub observer: Observer,
    /// What befalls its shards.
    pub shards: FakeShards,
    /// The loop.
    pub driver: JoinHandle<Ended>,
    drain: Option<oneshot::Sender<()>>,
    launcher: JoinHandle<()>,
}

impl FakeEngine {
    /// Does what SIGTERM does.
    pub fn drain(&mut self) {
        self.drain = None;
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.launcher.abort();
    }
}

/// Starts an engine against fake shards, on the current runtime. Dead ranks are replaced after a moment, as the real
/// launcher does it.
pub fn start(options: FakeOptions, config: Config, tokenizer: Arc<Tokenizer>) -> FakeEngine {
    let shards = FakeShards::new(options);
    let (link, launcher) = Link::pair();
    let (driver, engine, observer) = Driver::new(config, Arc::new(shards.clone()), link, tokenizer);
    let (drain, drained) = oneshot::channel::<()>();
    let launcher = tokio::spawn(launch(shards.clone(), launcher));
    let driver = tokio::spawn(driver.run(async { drop(drained.await) }));
    FakeEngine { engine, observer, shards, driver, drain: Some(drain), launcher }
}

/// Plays the launcher until the router has ended.
async fn launch(shards: FakeShards, mut link: LauncherLink) {
    for number in 1.. {
        let rendezvous = "rendezvous".into();
        let generation = ToRouter::Generation { number, ranks: shards.addresses(), rendezvous };
        if link.outgoing.send(generation).await.is_err() {
            return;
        }
        let Some(blamed) = next_loss(&shards, &mut link, number).await else { return };
        let reason = format!("generation {number} broke");
        if link.outgoing.send(ToRouter::Lost { number, reason }).await.is_err() {
            return;
        }
        tokio::time::sleep(RESTART).await;
        let is_due = |rank: &u32| blamed.contains(rank) || !shards.is_alive(*rank);
        (0..shards.addresses().len() as u32).filter(is_due).for_each(|rank| shards.restart(rank));
    }
}

/// The living ranks to be replaced, once the generation is broken; nothing if the router has ended.
async fn next_loss(shards: &FakeShards, link: &mut LauncherLink, serving: u64) -> Option<Vec<u32>> {
    loop {
        let message = tokio::select! {
            _ = shards.death() => return Some(vec![]),
            message = link.incoming.recv() => message?,
        };
        match message {
            ToLauncher::Fault { number, .. } if number != serving => {}
            ToLauncher::Fault { rank: Some(rank), replace: true, .. } => return Some(vec![rank]),
            ToLauncher::Fault { replace: true, .. } => return Some((0..shards.addresses().len() as u32).collect()),
            ToLauncher::Fault { .. } => return Some(vec![]),
            ToLauncher::Serving { .. } | ToLauncher::Stepped { .. } | ToLauncher::Pong => {}
            ToLauncher::CannotServe { .. } => {}
        }
    }
}
