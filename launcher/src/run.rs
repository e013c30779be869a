//! The thin shell: carries out what `plan` and `supervisor` decide.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tracing::{error, info, warn};

use crate::args::{Args, Device};
use crate::events::{Action, Event, Level, Outcome, Signal, Who};
use crate::logs::Output;
use crate::machine::{self, Machine};
use crate::plan::{self, CommandLine, Gpu, LaunchPlan, ModelPlan, PlanError, Programs};
use crate::process::{self, Cause, Exit, Running};
use crate::reaper::Reaper;
use crate::run_directory::{self, RunDirectory};
use crate::supervisor::{Policy, Supervisor, generation_message};
use crate::{control, health};

/// How often ranks are looked at while something is awaited, and otherwise.
const OFTEN: Duration = Duration::from_millis(100);
const SELDOM: Duration = Duration::from_millis(500);
/// Between two ticks of the supervisor.
const TICK: Duration = Duration::from_millis(100);
/// Events waiting to be handled.
const EVENTS: usize = 1024;
/// What a helper program is given to end after SIGTERM.
const TERM: Duration = Duration::from_secs(2);

/// Why the launcher ends with a code other than 0.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Failure {
    /// Exit code 2.
    Usage(String),
    /// Exit code 1.
    Failed(String),
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Usage(message) => Self::Usage(message),
            PlanError::Model(message) => Self::Failed(message),
        }
    }
}

fn failed(message: impl Into<String>) -> Failure {
    Failure::Failed(message.into())
}

/// SIGTERM, SIGINT and SIGHUP.
struct Stops {
    streams: Vec<SignalStream>,
}

impl Stops {
    fn listen() -> io::Result<Self> {
        let mut kinds = vec![SignalKind::terminate(), SignalKind::interrupt()];
        // Under nohup a hang-up is ignored, and is to stay so.
        if !hangup_is_ignored() {
            kinds.push(SignalKind::hangup());
        }
        Ok(Self { streams: kinds.into_iter().map(signal).collect::<io::Result<_>>()? })
    }

    async fn next(&mut self) {
        std::future::poll_fn(|context| {
            if self.streams.iter_mut().any(|stream| stream.poll_recv(context).is_ready()) {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
    }
}

fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}

/// Starts everything, keeps it running, and ends it. Must run on a runtime of the current thread: the children ask the
/// kernel to end them with the thread that started them.
///
/// # Errors
///
/// When nothing could be started, or what runs could not be kept running.
pub async fn launch(args: &Args, output: &Output) -> Result<(), Failure> {
    plan::check(args)?;
    let mut stops = Stops::listen().map_err(|error| failed(format!("signals cannot be received: {error}")))?;
    let machine = Machine::read(Path::new("/"))
        .map_err(|error| failed(format!("the memory of this machine cannot be read: {error}")))?;
    tell_start(args, &machine);
    plan::check_machine(args, &machine)?;
    let programs = find_programs()?;
    check_port(args)?;

    for swept in run_directory::sweep(&args.shard_uds_path) {
        info!("removed {}, left behind by a launcher that is gone", swept.display());
    }
    let directory = make_run_directory(args)?;
    let program = std::env::current_exe().map_err(|error| failed(format!("the launcher's own program: {error}")))?;
    let mut reaper = Reaper::start(&program, directory.path())
        .map_err(|error| failed(format!("{} cannot be started: {error}", program.display())))?;

    let result = prepare_and_supervise(
        args,
        &machine,
        &programs,
        &directory,
        &mut Context { output, stops: &mut stops, reaper: &mut reaper },
    )
    .await;
    drop(directory);
    reaper.end();
    result
}

/// What every stage needs.
struct Context<'a> {
    output: &'a Output,
    stops: &'a mut Stops,
    reaper: &'a mut Reaper,
}

async fn prepare_and_supervise(
    args: &Args,
    machine: &Machine,
    programs: &Programs,
    directory: &RunDirectory,
    context: &mut Context<'_>,
) -> Result<(), Failure> {
    // Before a large model is downloaded for a machine that cannot serve it.
    let Some(gpus) = find_gpus(args, programs, context).await? else { return Ok(()) };
    let world_size = plan::world_size(args, &gpus)?;
    let args = &plan::for_gpus(args, &gpus);
    let Some(model_dir) = locate_model(args, programs, context).await? else { return Ok(()) };
    let Some(model) = preflight(args, programs, &model_dir, world_size, context).await? else { return Ok(()) };
    let sockets = (directory.control_socket(), directory.admin_socket());
    let plan = plan::launch(args, (machine, &gpus), &model, programs, (&sockets.0, &sockets.1))?;
    let Some(_) = examine(&plan.router_check(), "text-generation-router --check", args, context).await? else {
        return Ok(());
    };
    tell_plan(&plan, &model, directory);
    let policy = Policy {
        world_size,
        startup_stall: Duration::from_secs_f64(args.startup_stall_timeout),
        grace: Duration::from_secs_f64(args.graceful_termination_timeout),
        url: plan.url.clone(),
    };
    supervise(plan, policy, directory, context).await
}

fn tell_start(args: &Args, machine: &Machine) {
    info!("text-generation-launcher {} for {}", args.version, args.model_id);
    if args.env {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        info!("system: Linux {} on {}", kernel.trim(), std::env::consts::ARCH);
        info!("processor: {}; usable cores: {}", machine.processor, machine.cores);
        info!("memory: {} available within the container's limits", plan::bytes(machine.memory_bytes));
    }
    for notice in &args.notices {
        warn!("{notice}");
    }
    if args.trust_remote_code {
        warn!("--trust-remote-code has no effect: nothing that is served runs code of a model");
    }
}

fn tell_plan(plan: &LaunchPlan, model: &ModelPlan, directory: &RunDirectory) {
    info!(
        "model: {} ({}, {} parameters, {})",
        model.model_dir.display(),
        model.architecture.as_deref().unwrap_or("unknown architecture"),
        model.num_parameters.map_or_else(|| "unknown".into(), |count| count.to_string()),
        model.dtype.as_deref().unwrap_or("type chosen by the shards"),
    );
    info!(
        "shards: {}; threads of each: {}; memory of each for weights and cache: {}",
        plan.world_size,
        plan.threads_per_rank,
        plan::bytes(plan.memory_bytes_per_rank)
    );
    info!("run directory: {}", directory.path().display());
}

fn find_programs() -> Result<Programs, Failure> {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent);
    let path = std::env::var_os("PATH");
    let find = |name| process::find(name, beside, path.as_deref()).map_err(failed);
    Ok(Programs { server: find("text-generation-server")?, router: find("text-generation-router")? })
}

fn make_run_directory(args: &Args) -> Result<RunDirectory, Failure> {
    RunDirectory::create(&args.shard_uds_path).map_err(|error| {
        let advice = match error.kind() {
            // Which it says itself.
            io::ErrorKind::InvalidInput => "",
            _ => "; name a place that this user may write and that has room, or give the container such a /tmp: docker run --tmpfs /tmp",
        };
        failed(format!("the run directory (--shard-uds-path {:?}) cannot be made: {error}{advice}", args.shard_uds_path))
    })
}

fn check_port(args: &Args) -> Result<(), Failure> {
    let address = args.hostname.parse().map_err(|_| Failure::Usage(format!("--hostname {:?}", args.hostname)))?;
    machine::try_listen(SocketAddr::new(address, args.port)).map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::AddrInUse => "it is in use; end what listens there, or choose another port".into(),
            io::ErrorKind::PermissionDenied => "ports below 1024 are reserved for root; choose another port".into(),
            io::ErrorKind::AddrNotAvailable => "this machine has no such address; choose another --hostname".into(),
            _ => error.to_string(),
        };
        failed(format!("--port {} on {}: {why}", args.port, args.hostname))
    })
}

/// The directory of the model, downloaded if need be. None: asked to end meanwhile.
async fn locate_model(args: &Args, programs: &Programs, context: &mut Context<'_>) -> Result<Option<PathBuf>, Failure> {
    let path = Path::new(&args.model_id);
    if path.is_dir() {
        if let Some(revision) = &args.revision {
            info!("--revision {revision} has no effect on what is loaded: {} is a local folder", path.display());
        }
        return path.canonicalize().map(Some).map_err(|error| failed(format!("--model-id {path:?}: {error}")));
    }
    if path.exists() {
        return Err(failed(format!(
            "--model-id {path:?} is a file: expected the directory that holds the model's files"
        )));
    }
    if !is_hub_name(&args.model_id) {
        return Err(failed(format!("--model-id {path:?}: there is no such directory; check the path")));
    }
    info!("downloading {}", args.model_id);
    let command = plan::download_command(args, programs);
    let Some((exit, answer)) = ask(&command, "download", true, context).await? else { return Ok(None) };
    if let Some(refusal) = exit.refusal() {
        return Err(failed(refusal));
    }
    if exit.cause != Cause::Code(0) {
        let text = format!("--model-id {path:?} is no directory here, and its download {}", exit.explain());
        return Err(failed(exit.with_last_lines(&text)));
    }
    #[derive(serde::Deserialize)]
    struct Downloaded {
        model_dir: PathBuf,
    }
    let line = answer.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    match serde_json::from_str::<Downloaded>(line) {
        Ok(downloaded) => Ok(Some(downloaded.model_dir)),
        Err(error) => Err(failed(format!("text-generation-server download-weights answered {line:?}: {error}"))),
    }
}

/// Whether the text can name a model on the hub: `name` or `owner/name`.
fn is_hub_name(text: &str) -> bool {
    let mut parts = text.split('/');
    let legal = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    parts.clone().count() <= 2 && parts.all(legal)
}

/// The GPUs of the ranks; none where they compute on the processor. None: asked to end meanwhile.
async fn find_gpus(args: &Args, programs: &Programs, context: &mut Context<'_>) -> Result<Option<Vec<Gpu>>, Failure> {
    if args.device == Device::Cpu {
        return Ok(Some(Vec::new()));
    }
    let name = "text-generation-server devices";
    let command = plan::devices_command(args, programs)?;
    let Some(answer) = examine(&command, name, args, context).await? else { return Ok(None) };
    let found: Vec<Gpu> = serde_json::from_str(answer.trim())
        .map_err(|error| failed(format!("{name} answered something else: {error}")))?;
    for (index, gpu) in found.iter().enumerate() {
        info!("GPU {index}: {}, {} free", gpu.name, plan::bytes(gpu.free_bytes));
    }
    Ok(Some(found))
}

/// Whether the model can be served at all, before any rank is spawned. None: asked to end meanwhile.
async fn preflight(
    args: &Args,
    programs: &Programs,
    model_dir: &Path,
    world_size: u32,
    context: &mut Context<'_>,
) -> Result<Option<ModelPlan>, Failure> {
    let command = plan::preflight_command(args, programs, model_dir, world_size);
    let name = "text-generation-server plan";
    let Some(answer) = examine(&command, name, args, context).await? else { return Ok(None) };
    serde_json::from_str(answer.trim()).map(Some).map_err(|error| failed(format!("{name} answered no plan: {error}")))
}

/// What a program answers that is asked whether something can be served; its own words, if it says that it cannot. None:
/// asked to end meanwhile.
async fn examine(
    command: &CommandLine,
    name: &str,
    args: &Args,
    context: &mut Context<'_>,
) -> Result<Option<String>, Failure> {
    let limit = Duration::from_secs_f64(args.startup_stall_timeout);
    let Ok(asked) = tokio::time::timeout(limit, ask(command, name, false, context)).await else {
        return Err(failed(format!("{name} gave no answer for {} s", limit.as_secs())));
    };
    let Some((exit, answer)) = asked? else { return Ok(None) };
    if let Some(refusal) = exit.refusal() {
        return Err(failed(refusal));
    }
    if exit.cause != Cause::Code(0) {
        return Err(failed(exit.with_last_lines(&format!("{name} {}", exit.explain()))));
    }
    Ok(Some(answer))
}

/// Runs a helper program to its end. None: asked to end meanwhile.
async fn ask(
    command: &CommandLine,
    name: &str,
    forward: bool,
    context: &mut Context<'_>,
) -> Result<Option<(Exit, String)>, Failure> {
    let forward = forward.then_some(context.output);
    let (running, end) = process::ask(command, name, forward)
        .map_err(|error| failed(format!("{} cannot be started: {error}", command.program.display())))?;
    context.reaper.add(running.process_id);
    tokio::pin!(end);
    let mut ticks = tokio::time::interval(TICK);
    let result = loop {
        tokio::select! {
            answer = &mut end => break Some(answer),
            _ = ticks.tick() => context.reaper.watch(),
            () = context.stops.next() => {
                info!("asked to end");
                running.signal(Signal::Term);
                let ended = tokio::select! {
                    ended = tokio::time::timeout(TERM, &mut end) => ended.is_ok(),
                    () = context.stops.next() => false,
                };
                if !ended {
                    running.signal(Signal::Kill);
                    end.await;
                }
                break None;
            }
        }
    };
    context.reaper.remove(running.process_id);
    Ok(result)
}

/// The processes, as the supervisor wants them.
struct Shell<'a> {
    plan: LaunchPlan,
    directory: &'a RunDirectory,
    output: &'a Output,
    reaper: &'a mut Reaper,
    events: mpsc::Sender<Event>,
    messages: mpsc::Sender<text_generation_router::control::ToRouter>,
    interval: watch::Sender<Duration>,
    running: HashMap<Who, Running>,
    looks: HashMap<Who, JoinHandle<()>>,
    /// Events that actions caused, handled before any other.
    follow_up: VecDeque<Event>,
    outcome: Option<Outcome>,
}

async fn supervise(
    plan: LaunchPlan,
    policy: Policy,
    directory: &RunDirectory,
    context: &mut Context<'_>,
) -> Result<(), Failure> {
    let (events, mut received) = mpsc::channel(EVENTS);
    let (messages, to_router) = mpsc::channel(64);
    let listener = control::listen(&directory.control_socket())
        .map_err(|error| failed(format!("{}: {error}", directory.control_socket().display())))?;
    let control = tokio::spawn(control::serve(listener, to_router, events.clone()));
    let mut supervisor = Supervisor::new(policy);
    let mut shell = Shell {
        plan,
        directory,
        output: context.output,
        reaper: context.reaper,
        events,
        messages,
        interval: watch::channel(OFTEN).0,
        running: HashMap::new(),
        looks: HashMap::new(),
        follow_up: VecDeque::from([Event::Start]),
        outcome: None,
    };
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let outcome = loop {
        let event = if let Some(event) = shell.follow_up.pop_front() {
            event
        } else {
            tokio::select! {
                Some(event) = received.recv() => event,
                _ = ticks.tick() => Event::Tick,
                () = context.stops.next() => Event::Stop,
            }
        };
        if matches!(event, Event::Tick) {
            shell.reaper.watch();
        }
        shell.note(&event);
        for action in supervisor.on(Instant::now(), event) {
            shell.perform(action);
        }
        if let Some(outcome) = shell.outcome.take() {
            break outcome;
        }
    };
    control.abort();
    match outcome {
        Outcome::Stopped => Ok(()),
        Outcome::Failed(reason) => Err(Failure::Failed(reason)),
    }
}

impl Shell<'_> {
    fn note(&mut self, event: &Event) {
        if let Event::Exited { who, .. } = event {
            if let Some(running) = self.running.remove(who) {
                self.reaper.remove(running.process_id);
            }
            if let Some(look) = self.looks.remove(who) {
                look.abort();
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Spawn(who) => {
                let event = match self.spawn(who) {
                    Ok(process_id) => Event::Spawned { who, process_id },
                    Err(error) => Event::NotSpawned { who, error: error.to_string() },
                };
                self.follow_up.push_back(event);
            }
            Action::Signal(who, signal) => {
                if let Some(running) = self.running.get(&who) {
                    running.signal(signal);
                }
            }
            Action::Tell(message) => self.tell(message),
            Action::Announce { number, ranks } => self.tell(generation_message(number, &ranks, self.directory)),
            Action::Poll { often } => {
                self.interval.send_replace(if often { OFTEN } else { SELDOM });
            }
            Action::Log(Level::Info, text) => info!("{text}"),
            Action::Log(Level::Warn, text) => warn!("{text}"),
            Action::Log(Level::Error, text) => error!("{text}"),
            Action::End(outcome) => self.outcome = Some(outcome),
        }
    }

    fn tell(&self, message: text_generation_router::control::ToRouter) {
        if let Err(error) = self.messages.try_send(message) {
            warn!("a message to the router is lost: {error}");
        }
    }

    fn spawn(&mut self, who: Who) -> io::Result<u32> {
        let command = match who {
            Who::Rank { rank, incarnation } => self.plan.shard(rank, &self.directory.shard_socket(rank, incarnation)),
            Who::Router { .. } => self.plan.router.clone(),
        };
        let (running, end) = process::spawn(&command, &who.to_string(), self.output)?;
        let process_id = running.process_id;
        self.reaper.add(process_id);
        self.running.insert(who, running);
        let events = self.events.clone();
        tokio::spawn(async move {
            let exit = end.await;
            // Nobody listens when everything has ended.
            let _ = events.send(Event::Exited { who, exit }).await;
        });
        let (interval, events) = (self.interval.subscribe(), self.events.clone());
        let look = match who {
            Who::Rank { rank, incarnation } => {
                let socket = self.directory.shard_socket(rank, incarnation);
                tokio::spawn(
                    async move { health::look((rank, incarnation), process_id, &socket, interval, events).await },
                )
            }
            Who::Router { incarnation } => {
                tokio::spawn(health::look_at_router(incarnation, process_id, interval, events))
            }
        };
        self.looks.insert(who, look);
        Ok(process_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_hub_are_told_from_paths() {
        for name in ["gpt2", "meta-llama/Llama-3.1-8B", "a_b/c.d"] {
            assert!(is_hub_name(name), "{name}");
        }
        for path in ["/models/x", "./x", "../../x", "a/b/c", "a;b", "", "a/", "~/x", "a b"] {
            assert!(!is_hub_name(path), "{path}");
        }
    }
}
