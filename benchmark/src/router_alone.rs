//! A router without Python: a stub shard and a stub launcher in this process, the router as a child.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use text_generation_router::control::{RankAddress, ToLauncher, ToRouter};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::stub_shard::{self, Observed, SharedObserved, SocketFile, StubShardArgs};
use crate::tokenizer;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Which router to run, and on what.
#[derive(Clone, Debug, clap::Args)]
pub struct RouterArgs {
    /// The router's binary.
    #[arg(long, value_name = "FILE", default_value = "target/release/text-generation-router")]
    pub router: PathBuf,
    /// A folder with a tokenizer. Its vocabulary is filled up to `--vocab-size`, in a copy.
    #[arg(long, value_name = "DIR", default_value = "models/docs-llama-7m")]
    pub model: PathBuf,
    /// Where the router listens.
    #[arg(long, default_value_t = 3000)]
    pub port: u16,
    /// The shard behind it.
    #[command(flatten)]
    pub shard: StubShardArgs,
    /// Further arguments of the router, after `--`.
    #[arg(last = true, value_name = "ROUTER_ARGS")]
    pub router_args: Vec<String>,
}

/// Answers the router's control connections as a launcher does whose shards never die, until it is dropped.
pub async fn stub_launcher(control_socket: &Path, shard_socket: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(control_socket).map_err(|error| {
        anyhow::anyhow!("--control-socket {}: {error}; name a path that does not exist", control_socket.display())
    })?;
    let _file = SocketFile(control_socket.to_owned());
    for connection in 1.. {
        let (router, _) = listener.accept().await?;
        let generation = ToRouter::Generation {
            number: 1,
            ranks: vec![RankAddress {
                rank: 0,
                socket: shard_socket.to_owned(),
                process_id: std::process::id(),
                incarnation: 1,
            }],
            rendezvous: control_socket.with_file_name(format!("rendezvous-{connection}")),
        };
        talk(router, &generation).await?;
    }
    Ok(())
}

async fn talk(router: UnixStream, generation: &ToRouter) -> anyhow::Result<()> {
    let (read, mut write) = router.into_split();
    write.write_all(format!("{}\n", serde_json::to_string(generation)?).as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str(&line).with_context(|| format!("the router said {line:?}"))? {
            ToLauncher::Fault { reason, .. } | ToLauncher::CannotServe { reason } => {
                anyhow::bail!("the router gave up on the stub shard: {reason}")
            }
            ToLauncher::Serving { .. } | ToLauncher::Stepped { .. } | ToLauncher::Pong => {}
        }
    }
    Ok(())
}

/// A router with its stubs. Dropping it kills the router and removes the run directory.
#[derive(Debug)]
pub struct RouterAlone {
    router: tokio::process::Child,
    /// Kept apart from the child, which closes its standard input when it is waited for.
    lifeline: Option<tokio::process::ChildStdin>,
    stubs: JoinHandle<anyhow::Result<()>>,
    directory: RunDirectory,
    /// What the stub shard sees.
    pub observed: SharedObserved,
}

impl RouterAlone {
    /// Starts everything and waits until the router is healthy.
    pub async fn start(args: &RouterArgs) -> anyhow::Result<Self> {
        let directory = RunDirectory::new()?;
        let [model, shard_socket, control_socket, admin_socket] =
            ["model", "shard", "control", "admin"].map(|name| directory.0.join(name));
        std::fs::create_dir(&model)?;
        tokenizer::copy_extended(&args.model, args.shard.vocab_size, &model)?;
        let observed = Arc::new(Mutex::new(Observed::default()));
        let stubs = tokio::spawn({
            let (shard_args, observed) = (args.shard.clone(), Arc::clone(&observed));
            let (shard_socket, control_socket) = (shard_socket.clone(), control_socket.clone());
            async move {
                tokio::select! {
                    result = stub_shard::serve(&shard_socket, shard_args, observed) => result,
                    result = stub_launcher(&control_socket, &shard_socket) => result,
                }
            }
        });
        wait_for("the stubs' sockets", || async { shard_socket.exists() && control_socket.exists() }).await?;
        let mut router = tokio::process::Command::new(&args.router)
            .arg("--tokenizer-name")
            .arg(&model)
            .args(["--model-id", "stub", "--exit-with-stdin", "--hostname", "127.0.0.1"])
            .args(["--port", &args.port.to_string()])
            .arg("--control-socket")
            .arg(&control_socket)
            .arg("--admin-socket")
            .arg(&admin_socket)
            .args(&args.router_args)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(std::io::stderr()))
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("--router {}: cannot be started; build it first", args.router.display()))?;
        let lifeline = router.stdin.take();
        let mut this = Self { router, lifeline, stubs, directory, observed };
        this.wait_until_healthy(args.port).await?;
        Ok(this)
    }

    async fn wait_until_healthy(&mut self, port: u16) -> anyhow::Result<()> {
        let start = Instant::now();
        while !is_healthy(port).await {
            if let Some(status) = self.router.try_wait()? {
                anyhow::bail!("the router ended before it was healthy: {status}; its own words stand above");
            }
            if self.stubs.is_finished() {
                (&mut self.stubs).await??;
            }
            anyhow::ensure!(start.elapsed() < START_TIMEOUT, "the router is not healthy after {START_TIMEOUT:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// The router's process id, while it runs.
    pub fn process_id(&self) -> Option<u32> {
        self.router.id()
    }

    /// Where the sockets are.
    pub fn directory(&self) -> &Path {
        &self.directory.0
    }

    /// Returns why, when the router or a stub ends by itself.
    pub async fn broken(&mut self) -> anyhow::Error {
        tokio::select! {
            status = self.router.wait() => match status {
                Ok(status) => anyhow::anyhow!("the router ended by itself: {status}"),
                Err(error) => error.into(),
            },
            result = &mut self.stubs => match result {
                Ok(Ok(())) => anyhow::anyhow!("a stub ended by itself"),
                Ok(Err(error)) => error,
                Err(error) => error.into(),
            },
        }
    }

    /// Lets the router end as it does when its launcher is gone.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        drop(self.lifeline.take());
        let ended = tokio::time::timeout(STOP_TIMEOUT, self.router.wait()).await;
        self.stubs.abort();
        ended.with_context(|| format!("the router did not end within {STOP_TIMEOUT:?} after its lifeline"))??;
        Ok(())
    }
}

impl Drop for RouterAlone {
    fn drop(&mut self) {
        self.stubs.abort();
    }
}

/// A fresh directory that only this user may enter.
#[derive(Debug)]
struct RunDirectory(PathBuf);

impl RunDirectory {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("text-generation-benchmark-{}", std::process::id()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("creating the run directory {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn wait_for<F: Future<Output = bool>>(what: &str, is_there: impl Fn() -> F) -> anyhow::Result<()> {
    let start = Instant::now();
    while !is_there().await {
        anyhow::ensure!(start.elapsed() < START_TIMEOUT, "{what}: not there after {START_TIMEOUT:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn is_healthy(port: u16) -> bool {
    let answer = async {
        let socket = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
        tokio::spawn(connection);
        let request = hyper::Request::get("/health").header("host", "127.0.0.1").body(Empty::<bytes::Bytes>::new())?;
        anyhow::Ok(sender.send_request(request).await?.status().is_success())
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), answer).await, Ok(Ok(true)))
}
