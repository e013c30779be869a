//! The loop that owns everything: it takes requests in, plans steps, sends them to the shards, commits what they answer
//! and tells the clients; and it brings shards into service and survives their loss.
//!
//! Decisions are made by the scheduler and by small pure parts beside this file; here they meet time and channels.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use scheduler::{Event, FinishReason as Reason, Millis, Namespace, Request, RowError, RowResult, Scheduler};
use scheduler::{SequenceId, StepPlan, StepResult};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, error, info, warn};

use super::clients::{After, Clients};
use super::faults::Faults;
use super::limits::{CannotServe, Wishes};
use super::pace::Pace;
use super::prepare::FirstRank;
use super::start::{Generation, Start, StartError, Started, start};
use super::{Engine, FinishReason, GenerateError, Status, Submission, measure};
use crate::args::Args;
use crate::control::{Link, RankAddress, ToLauncher, ToRouter};
use crate::shards::{Answer, Fault, Group, Plan, SelfKill, Shard, Shards};
use crate::text::tokenizer::Tokenizer;

/// Submissions and queries that may wait for the loop's next turn.
const BUFFER: usize = 256;

/// How often clocks are looked at: deadlines, clients that do not read, gauges.
const TICK: Duration = Duration::from_millis(250);

/// How the loop is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the operator asked for.
    pub wishes: Wishes,
    /// How long a request may wait for its first step.
    pub queue_timeout: Option<Duration>,
    /// After which a step without an answer is a fault.
    pub step_timeout: Duration,
    /// How long running requests may go on after draining has begun.
    pub grace: Duration,
    /// Whether the process ends when the scheduler's books contradict themselves. Checking them after every step takes
    /// longer the more there is in them: for tests.
    pub checks_books: bool,
    /// For tests of crashes; see [`SelfKill`].
    pub fault_file: Option<PathBuf>,
}

impl From<&Args> for Config {
    fn from(args: &Args) -> Self {
        Self {
            wishes: Wishes::from(args),
            queue_timeout: args.queue_timeout,
            step_timeout: args.step_timeout,
            grace: args.graceful_termination_timeout,
            checks_books: cfg!(debug_assertions),
            fault_file: args.fault_file.clone(),
        }
    }
}

/// Why the loop ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Ended {
    /// As asked: nothing was running any more.
    Drained,
    /// As asked, but the grace was over before all requests had ended.
    CutOff {
        /// Requests that ended with an error.
        requests: usize,
    },
    /// The launcher gave up on the shards, or is gone.
    LauncherGone {
        /// In words.
        reason: String,
    },
    /// The limits do not fit the model or the memory.
    CannotServe {
        /// In words.
        reason: String,
    },
}

/// What the loop holds at a moment, for operators and tests.
pub struct Snapshot {
    /// Blocks, queue and running sequences.
    pub stats: scheduler::Stats,
    /// Completed steps.
    pub num_steps: u64,
    /// As told to probes.
    pub status: Status,
    /// The ranks of the current generation, with a connection where there is one.
    pub ranks: Vec<(RankAddress, Option<Arc<dyn Shard>>)>,
}

/// Asks the loop for snapshots.
#[derive(Clone, Debug)]
pub struct Observer(mpsc::Sender<oneshot::Sender<Snapshot>>);

impl Observer {
    /// What the loop holds; nothing if it has ended.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let (reply, snapshot) = oneshot::channel();
        self.0.send(reply).await.ok()?;
        snapshot.await.ok()
    }
}

/// The loop and all its state.
pub struct Driver {
    config: Config,
    shards: Arc<dyn Shards>,
    link: Link,
    submissions: mpsc::Receiver<Submission>,
    queries: mpsc::Receiver<oneshot::Sender<Snapshot>>,
    status: watch::Sender<Status>,
    scheduler: Scheduler,
    clients: Clients,
    phase: Phase,
    /// The latest that the launcher named.
    generation: Option<Generation>,
    connections: Vec<Arc<dyn Shard>>,
    faults: Faults,
    /// Blocks agreed with the first generation.
    num_blocks: Option<u32>,
    epoch: u64,
    num_steps: u64,
    pace: Pace,
    max_step_tokens: usize,
    /// Whether this generation has completed a step.
    has_stepped: bool,
    /// When the open steps were sent, and what they compute, oldest first.
    sent: VecDeque<(Instant, &'static str)>,
    /// Where the scheduler's clock begins.
    began: Instant,
    drain_until: Option<Instant>,
    ended: Option<Ended>,
}

/// How far the shards are.
enum Phase {
    /// For the launcher to name a generation.
    Waiting,
    Starting(BoxFuture<'static, Result<Started, StartError>>),
    Serving(Group),
}

enum PhaseEvent {
    Started(Result<Started, StartError>),
    Answered(Result<(Arc<Plan>, Answer), Fault>),
}

impl Phase {
    /// What happens next; nothing is lost if the future is dropped.
    async fn next(&mut self) -> PhaseEvent {
        match self {
            Self::Waiting => std::future::pending().await,
            Self::Starting(start) => PhaseEvent::Started(start.await),
            Self::Serving(group) => PhaseEvent::Answered(group.next().await),
        }
    }
}

impl Driver {
    /// A loop, its entrance and its window. Nothing happens before [`Self::run`].
    pub fn new(
        config: Config,
        shards: Arc<dyn Shards>,
        link: Link,
        tokenizer: Arc<Tokenizer>,
    ) -> (Self, Engine, Observer) {
        let (sender, submissions) = mpsc::channel(BUFFER);
        let (observer, queries) = mpsc::channel(BUFFER);
        let detail = "waiting for the launcher to start the shards".into();
        let (status, receiver) = watch::channel(Status { detail, ..Status::default() });
        let engine = Engine::new(sender, config.wishes.max_concurrent, receiver);
        let driver = Self {
            config,
            shards,
            link,
            submissions,
            queries,
            status,
            scheduler: Scheduler::new(),
            clients: Clients::new(tokenizer),
            phase: Phase::Waiting,
            generation: None,
            connections: vec![],
            faults: Faults::default(),
            num_blocks: None,
            epoch: 0,
            num_steps: 0,
            pace: Pace::default(),
            max_step_tokens: 0,
            has_stepped: false,
            sent: VecDeque::new(),
            began: Instant::now(),
            drain_until: None,
            ended: None,
        };
        (driver, engine, Observer(observer))
    }

    /// Runs until the launcher is gone, nothing can be served, or `drain` has resolved and all streams have ended.
    pub fn run(self, drain: impl Future<Output = ()> + Send + 'static) -> BoxFuture<'static, Ended> {
        self.run_until(drain.boxed())
    }

    /// Without type parameters, so that it is compiled once and not by all who call it.
    fn run_until(self, drain: BoxFuture<'static, ()>) -> BoxFuture<'static, Ended> {
        self.turn(drain).boxed()
    }

    async fn turn(mut self, drain: BoxFuture<'static, ()>) -> Ended {
        let mut drain = drain.fuse();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.sweep();
            self.send_plans().await;
            if let Some(ended) = self.end() {
                return ended;
            }
            tokio::select! {
                event = self.phase.next() => self.on_phase(event),
                message = self.link.incoming.recv() => self.on_launcher(message),
                Some(submission) = self.submissions.recv() => self.on_submission(submission),
                Some(reply) = self.queries.recv() => self.on_query(reply),
                _ = ticks.tick() => self.on_tick(),
                () = &mut drain => self.on_drain(),
            }
        }
    }

    // Requests.

    fn on_submission(&mut self, submission: Submission) {
        self.add(submission);
        // What arrived together is planned together. The channel is bounded, and so is this.
        for _ in 0..BUFFER {
            match self.submissions.try_recv() {
                Ok(submission) => self.add(submission),
                Err(_) => return,
            }
        }
    }

    fn add(&mut self, submission: Submission) {
        let now = Instant::now();
        let request = Request {
            prompt: submission.request.prompt_ids.clone(),
            max_new_tokens: submission.request.max_new_tokens,
            namespace: Namespace(submission.request.namespace),
            deadline: self.config.queue_timeout.map(|timeout| self.millis(now + timeout)),
            wants_prompt_logprobs: submission.request.wants_prompt_logprobs,
            ignore_eos: submission.request.ignore_eos,
        };
        match self.scheduler.add(request) {
            Ok(id) => {
                debug!(id = id.0, "queued");
                if !self.clients.insert(id, submission) {
                    self.scheduler.abort(id);
                }
            }
            Err(rejected) => {
                // Nobody listens if this fails.
                let _ = submission.outputs.try_send(Err(rejected.into()));
            }
        }
    }

    /// Aborts the sequences whose clients are gone or do not read.
    fn sweep(&mut self) {
        for id in self.clients.sweep(Instant::now()) {
            debug!(id = id.0, "aborted");
            self.scheduler.abort(id);
        }
    }

    fn on_tick(&mut self) {
        let events = self.scheduler.expire(self.millis(Instant::now()));
        self.deliver(events, None);
        measure::gauges(&self.scheduler.stats());
    }

    fn millis(&self, time: Instant) -> Millis {
        Millis((time - self.began).as_millis() as u64)
    }

    // Steps.

    /// Plans and sends as many steps as may be open.
    async fn send_plans(&mut self) {
        while let Phase::Serving(group) = &mut self.phase {
            let step = self.scheduler.plan();
            check(&self.scheduler, &self.config);
            let Some(step) = step else { return };
            let terms = step.admit.iter().map(|admission| self.clients.admit(admission.id)).collect();
            debug!(
                step = step.step,
                admitted = step.admit.len(),
                rows = step.work.len(),
                released = step.release.len()
            );
            let method = measure::planned(&step, &self.scheduler.stats());
            self.sent.push_back((Instant::now(), method));
            if let Err(fault) = group.send(Arc::new(Plan { step, terms })).await {
                self.on_fault(fault);
            }
        }
    }

    fn on_answer(&mut self, plan: &Plan, answer: &Answer) {
        let (sent, method) = self.sent.pop_front().expect("a plan was sent for every answer");
        let rows = answer.rows.iter().map(|row| RowResult {
            row: row.row,
            incarnation: row.incarnation,
            computed: row.computed as usize,
            tokens: match &row.sampled {
                Ok(sampled) => Ok(sampled.iter().map(|one| one.id).collect()),
                Err(_) => Err(RowError),
            },
        });
        for (work, row) in plan.step.work.iter().zip(&answer.rows) {
            self.clients.prompt(work.id, &row.prompt);
        }
        let result = StepResult { epoch: answer.epoch, step: answer.step, rows: rows.collect() };
        let committed = self.scheduler.commit(&result);
        check(&self.scheduler, &self.config);
        match committed {
            Ok(events) => {
                self.deliver(events, Some((&plan.step, answer)));
                measure::answered(method, answer, sent.elapsed());
                self.pace.note(&plan.step, answer.timings.total_us);
                self.scheduler.set_prompt_tokens(self.pace.prompt_tokens(self.max_step_tokens));
                self.on_completed_step();
            }
            Err(fault) => {
                self.on_fault(Fault::of(0, format!("the answer to step {} does not fit: {fault}", answer.step)));
            }
        }
    }

    fn on_completed_step(&mut self) {
        self.num_steps += 1;
        if !self.has_stepped {
            self.has_stepped = true;
            if let Some(number) = self.generation.as_ref().map(|generation| generation.number) {
                self.tell(ToLauncher::Stepped { number });
            }
        }
    }

    /// Tells the clients what happened to their sequences. `step`: what was asked and answered, where tokens come from.
    fn deliver(&mut self, events: Vec<Event>, step: Option<(&StepPlan, &Answer)>) {
        let now = Instant::now();
        let mut events = events.into_iter().peekable();
        while let Some(event) = events.next() {
            match event {
                Event::Token { id, work, index, .. } => {
                    let sampled = step.and_then(|(_, answer)| answer.rows.get(work)?.sampled.as_ref().ok()?.get(index));
                    let sampled = sampled.expect("a token comes from a row of the answer");
                    let end = events.next_if(|next| ends_with_token(next, id)).and_then(|event| reason(&event));
                    if self.clients.push(id, sampled, end, now) == After::Stop {
                        self.scheduler.abort(id);
                    }
                }
                Event::Finished { id, reason } => {
                    let error = self.failure(id, reason, step);
                    info!(id = id.0, %error, "a request failed");
                    self.clients.fail(id, error, now);
                }
            }
        }
    }

    /// What a client is told of a sequence that ended without a last token.
    fn failure(&self, id: SequenceId, reason: Reason, step: Option<(&StepPlan, &Answer)>) -> GenerateError {
        match reason {
            Reason::NoLongerFits => {
                let limit = self.status.borrow().model.as_ref().map_or(0, |facts| facts.max_total_tokens);
                GenerateError::TooLong { tokens: self.clients.num_total(id), limit }
            }
            Reason::DeadlineExceeded => {
                GenerateError::QueueTimeout { seconds: self.config.queue_timeout.unwrap_or_default().as_secs_f64() }
            }
            Reason::KilledShards => GenerateError::KilledShards,
            Reason::RowError | Reason::Length | Reason::EndOfSequence => {
                let failure = step.and_then(|(plan, answer)| {
                    let work = plan.work.iter().position(|work| work.id == id)?;
                    answer.rows.get(work)?.sampled.as_ref().err()
                });
                let (kind, message) = failure.map_or(("unknown", "the row failed"), |row| (row.kind, &row.message));
                GenerateError::Row { kind, message: message.into() }
            }
        }
    }

    // Shards.

    fn on_launcher(&mut self, message: Option<ToRouter>) {
        let number = self.generation.as_ref().map_or(0, |generation| generation.number);
        match message {
            Some(ToRouter::Generation { number: offered, ranks, rendezvous }) => {
                let is_in_use = matches!(self.phase, Phase::Starting(_) | Phase::Serving(_));
                if offered < number || offered == number && is_in_use {
                    return warn!(offered, current = number, "a generation that is over was offered again");
                }
                self.lose("the launcher replaced the shards");
                self.begin(Generation { number: offered, ranks, rendezvous });
            }
            Some(ToRouter::Lost { number: lost, reason }) if lost >= number => {
                warn!(generation = lost, reason, "the shards are lost");
                self.lose(&format!("the shards are being restarted: {reason}"));
            }
            Some(ToRouter::Lost { .. }) => {}
            Some(ToRouter::Ping) => self.tell(ToLauncher::Pong),
            Some(ToRouter::GaveUp { reason }) => self.ended = Some(Ended::LauncherGone { reason }),
            None => self.ended = Some(Ended::LauncherGone { reason: "the launcher is gone".into() }),
        }
    }

    /// Starts to bring a generation into service.
    fn begin(&mut self, generation: Generation) {
        match self.generation {
            None => measure::start("shards", self.began.elapsed()),
            Some(_) => measure::restarted(),
        }
        self.generation = Some(generation.clone());
        self.set_status(|status| {
            status.generation = generation.number;
            status.detail = format!("joining generation {} of the shards", generation.number);
        });
        self.connections.clear();
        self.has_stepped = false;
        let what = Start {
            shards: Arc::clone(&self.shards),
            generation,
            epoch: self.epoch,
            num_blocks: self.num_blocks,
            wishes: self.config.wishes.clone(),
            step_timeout: self.config.step_timeout,
            self_kill: SelfKill::new(self.config.fault_file.clone()),
        };
        self.phase = Phase::Starting(start(what).boxed());
    }

    fn on_phase(&mut self, event: PhaseEvent) {
        match event {
            PhaseEvent::Answered(Ok((plan, answer))) => self.on_answer(&plan, &answer),
            PhaseEvent::Answered(Err(fault)) | PhaseEvent::Started(Err(StartError::Fault(fault))) => {
                self.on_fault(fault)
            }
            PhaseEvent::Started(Ok(started)) => self.on_started(started),
            PhaseEvent::Started(Err(StartError::CannotServe(CannotServe(reason)))) => {
                error!(reason, "nothing can be served");
                self.tell(ToLauncher::CannotServe { reason: reason.clone() });
                self.ended = Some(Ended::CannotServe { reason });
            }
        }
    }

    fn on_started(&mut self, started: Started) {
        let Started { epoch, agreed, ranks, group } = started;
        let num_blocks = agreed.limits.num_blocks;
        if self.num_blocks.is_none() {
            measure::start("serving", self.began.elapsed());
        }
        self.epoch = epoch;
        self.num_blocks.get_or_insert(num_blocks);
        self.phase = Phase::Serving(group);
        self.set_status(|status| {
            status.first_rank = FirstRank(ranks.first().cloned());
            (status.is_ready, status.was_ready, status.epoch) = (true, true, epoch);
            status.detail = "serving".into();
            status.model = Some(agreed.facts);
        });
        self.connections = ranks;
        self.max_step_tokens = agreed.limits.max_step_tokens;
        let events = self.scheduler.shards_ready(epoch, agreed.limits);
        self.deliver(events, None);
        if let Some(number) = self.generation.as_ref().map(|generation| generation.number) {
            self.tell(ToLauncher::Serving { number, epoch, num_blocks });
        }
    }

    fn on_fault(&mut self, fault: Fault) {
        let Some(generation) = &self.generation else { return };
        let (number, now) = (generation.number, Instant::now());
        let replace = self.faults.is_repeated(generation.process_ids(), now) || fault.replace;
        // Mended by the launcher, and an error only if it gives up.
        warn!(generation = number, epoch = self.epoch, rank = fault.rank, reason = fault.reason, "the shards failed");
        self.sent.iter().for_each(|(_, method)| measure::failed(method));
        self.lose(&format!("the shards failed: {}", fault.reason));
        let Fault { rank, reason, .. } = fault;
        self.tell(ToLauncher::Fault { number, rank, reason, replace });
    }

    /// Abandons the generation: dropping the streams makes the shards drop all sequences at once. The launcher names the
    /// next one.
    fn lose(&mut self, detail: &str) {
        if let Phase::Serving(_) = std::mem::replace(&mut self.phase, Phase::Waiting) {
            let events = self.scheduler.lose_shards();
            self.sent.clear();
            self.deliver(events, None);
        }
        self.set_status(|status| {
            status.is_ready = false;
            status.detail = detail.into();
        });
    }

    fn tell(&self, message: ToLauncher) {
        // Only a launcher that does not read for many messages fills the channel, and it is watched by its own parent.
        if let Err(error) = self.link.outgoing.try_send(message) {
            warn!(%error, "the launcher does not hear");
        }
    }

    fn set_status(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    // The window and the end.

    fn on_query(&self, reply: oneshot::Sender<Snapshot>) {
        let addresses = self.generation.iter().flat_map(|generation| generation.ranks.iter().cloned());
        let connections = self.connections.iter().cloned().map(Some).chain(std::iter::repeat(None));
        let snapshot = Snapshot {
            stats: self.scheduler.stats(),
            num_steps: self.num_steps,
            status: self.status.borrow().clone(),
            ranks: addresses.zip(connections).collect(),
        };
        // Whoever asked may be gone.
        let _ = reply.send(snapshot);
    }

    fn on_drain(&mut self) {
        info!(grace_s = self.config.grace.as_secs_f64(), "draining");
        self.drain_until = Some(Instant::now() + self.config.grace);
        self.submissions.close();
        self.set_status(|status| status.is_draining = true);
    }

    /// Whether the loop ends here, after the clients were told.
    fn end(&mut self) -> Option<Ended> {
        let now = Instant::now();
        let requests = self.clients.num_open() + self.submissions.len();
        let drained = self.drain_until.and_then(|deadline| match requests {
            0 => Some(Ended::Drained),
            _ => (now >= deadline).then_some(Ended::CutOff { requests }),
        });
        let ended = self.ended.take().or(drained)?;
        let grace = self.config.grace.as_secs_f64();
        if requests > 0 {
            warn!(requests, "requests are cut off before their end, each with an error");
        }
        let reason = match &ended {
            Ended::Drained => "the server is shutting down".to_owned(),
            Ended::CutOff { .. } => format!(
                "the server is shutting down: the answer was cut off after the {grace} s that it was given to finish"
            ),
            Ended::LauncherGone { reason } | Ended::CannotServe { reason } => reason.clone(),
        };
        self.submissions.close();
        let error = GenerateError::ShuttingDown { reason: reason.clone() };
        while let Ok(submission) = self.submissions.try_recv() {
            let _ = submission.outputs.try_send(Err(error.clone()));
        }
        self.clients.fail_all(&error, now);
        self.set_status(|status| (status.is_ready, status.detail) = (false, reason));
        Some(ended)
    }
}

fn check(scheduler: &Scheduler, config: &Config) {
    if config.checks_books {
        scheduler.check();
    }
}

/// Whether an event ends the sequence with the token before it.
fn ends_with_token(event: &Event, id: SequenceId) -> bool {
    matches!(event, Event::Finished { id: ended, .. } if *ended == id) && reason(event).is_some()
}

fn reason(event: &Event) -> Option<FinishReason> {
    match event {
        Event::Finished { reason: Reason::Length, .. } => Some(FinishReason::Length),
        Event::Finished { reason: Reason::EndOfSequence, .. } => Some(FinishReason::EosToken),
        _ => None,
    }
}
