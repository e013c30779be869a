//! A rank in a process of its own, spoken to with gRPC over a Unix socket. Protobuf values end here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryFutureExt};
use hyper_util::rt::TokioIo;
use scheduler::{RowId, TokenId};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tracing::debug;

use super::proto::shard_client::ShardClient;
use super::proto::{self, health_reply, row_error};
use super::{
    Answer, Answers, Description, Health, Join, Plan, PromptLogprob, RowAnswer, RowFailure, Sampled, Shard, ShardError,
    Shards, Timings, Warmup, terms,
};
use crate::control::RankAddress;
use crate::request::form::Grammar;

/// The largest message, either way. A plan that admits full contexts is the largest; gRPC's default of 4 MB is too small.
pub const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// HTTP/2 flow control: a plan must not wait for window updates.
pub const WINDOW_BYTES: u32 = 16 << 20;

/// Deadlines of the calls. Generous: the launcher watches for processes that hang, and knows more.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const QUERY_DEADLINE: Duration = Duration::from_secs(10);
const PREPARE_DEADLINE: Duration = Duration::from_secs(5);
const JOIN_DEADLINE: Duration = Duration::from_secs(120);
const WARMUP_DEADLINE: Duration = Duration::from_secs(600);

/// Connects to shards by their Unix sockets.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrpcShards;

impl Shards for GrpcShards {
    fn connect<'a>(&'a self, address: &'a RankAddress) -> BoxFuture<'a, Result<Arc<dyn Shard>, ShardError>> {
        async move { Ok(Arc::new(GrpcShard::connect(address.socket.clone()).await?) as Arc<dyn Shard>) }.boxed()
    }
}

/// One rank's process.
#[derive(Clone, Debug)]
pub struct GrpcShard {
    client: ShardClient<Channel>,
}

impl GrpcShard {
    /// Connects to the socket that a shard listens on.
    pub async fn connect(socket: PathBuf) -> Result<Self, ShardError> {
        let name = socket.display().to_string();
        let failed = |error: &dyn std::fmt::Display| ShardError::Failed(format!("cannot connect to {name}: {error}"));
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://shard")
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        let channel = tokio::time::timeout(CONNECT_DEADLINE, endpoint.connect_with_connector(connector)).await;
        let channel = channel.map_err(|error| failed(&error))?.map_err(|error| failed(&describe_error(&error)))?;
        let client = ShardClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { client })
    }

    /// Makes a call with a deadline, on both sides: the shard is told it, and this side does not rely on the shard.
    async fn call<T, R>(
        &self,
        (name, deadline): (&str, Duration),
        message: T,
        rpc: impl AsyncFnOnce(ShardClient<Channel>, Request<T>) -> Result<tonic::Response<R>, Status>,
    ) -> Result<R, ShardError> {
        let mut request = Request::new(message);
        request.set_timeout(deadline);
        match tokio::time::timeout(deadline, rpc(self.client.clone(), request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(describe_status(name, &status)),
            Err(_) => Err(ShardError::Failed(format!("{name}: no answer within {} s", deadline.as_secs()))),
        }
    }
}

/// The error and its causes: tonic's own text is only "transport error".
fn describe_error(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What a shard answered has no cause on this side; what has one is a connection that broke.
fn describe_status(call: &str, status: &Status) -> ShardError {
    if let Some(cause) = std::error::Error::source(status) {
        debug!(call, status = status.message(), cause = describe_error(cause), "a connection to a shard broke");
        return ShardError::Failed(format!("{call}: the connection broke, as it does when the process dies"));
    }
    let text = format!("{call}: {:?}: {}", status.code(), status.message());
    match status.code() {
        Code::ResourceExhausted => ShardError::OutOfMemory(text),
        _ => ShardError::Failed(text),
    }
}

impl Shard for GrpcShard {
    fn health(&self) -> BoxFuture<'_, Result<Health, ShardError>> {
        let rpc = async |mut client: ShardClient<_>, request| client.health(request).await;
        self.call(("Health", QUERY_DEADLINE), proto::HealthRequest {}, rpc).map_ok(health).boxed()
    }

    fn describe(&self) -> BoxFuture<'_, Result<Description, ShardError>> {
        let rpc = async |mut client: ShardClient<_>, request| client.describe(request).await;
        self.call(("Describe", QUERY_DEADLINE), proto::DescribeRequest {}, rpc).map_ok(description).boxed()
    }

    fn join(&self, join: Join) -> BoxFuture<'_, Result<(), ShardError>> {
        let Join { epoch, rank, world_size, rendezvous } = join;
        let message = proto::JoinRequest { epoch, rank, world_size, rendezvous };
        let rpc = async |mut client: ShardClient<_>, request| client.join(request).await;
        let joined = self.call(("Join", JOIN_DEADLINE), message, rpc);
        let check = move |reply: proto::JoinReply| match reply.epoch {
            joined if joined == epoch => Ok(()),
            joined => Err(ShardError::Failed(format!("Join: joined epoch {joined}, expected {epoch}"))),
        };
        joined.map(move |reply| reply.and_then(check)).boxed()
    }

    fn warmup(&self, warmup: Warmup) -> BoxFuture<'_, Result<u32, ShardError>> {
        let Warmup { epoch, block_size, max_running, max_step_tokens, max_total_tokens, num_blocks } = warmup;
        let message =
            proto::WarmupRequest { epoch, block_size, max_running, max_step_tokens, max_total_tokens, num_blocks };
        let rpc = async |mut client: ShardClient<_>, request| client.warmup(request).await;
        self.call(("Warmup", WARMUP_DEADLINE), message, rpc).map_ok(|reply| reply.num_blocks).boxed()
    }

    fn prepare(&self, grammar: Grammar) -> BoxFuture<'_, Result<Option<String>, ShardError>> {
        let rpc = async |mut client: ShardClient<_>, request| client.prepare(request).await;
        let prepared = self.call(("Prepare", PREPARE_DEADLINE), terms::grammar(&grammar), rpc);
        prepared.map_ok(|reply| Some(reply.error).filter(|error| !error.is_empty())).boxed()
    }

    fn run(self: Arc<Self>, plans: mpsc::Receiver<Arc<Plan>>) -> BoxFuture<'static, Result<Answers, ShardError>> {
        let mut client = self.client.clone();
        let plans = ReceiverStream::new(plans).map(|plan| step_plan(&plan));
        // A server may keep its headers back until the first answer, so that opening is part of the stream. It has no
        // deadline: it lives as long as the epoch, and every step is watched by the group.
        let opened = async move { client.run(plans).await.map(tonic::Response::into_inner) };
        let answers = opened.try_flatten_stream();
        let answers = answers.map(|result| result.map(answer).map_err(|status| describe_status("Run", &status)));
        std::future::ready(Ok(answers.boxed())).boxed()
    }
}

fn health(reply: proto::HealthReply) -> Health {
    let phase = match reply.phase() {
        health_reply::Phase::Importing => "importing",
        health_reply::Phase::Loading => "loading",
        health_reply::Phase::Loaded => "loaded",
        health_reply::Phase::Joining => "joining",
        health_reply::Phase::WarmingUp => "warming_up",
        health_reply::Phase::Serving => "serving",
        health_reply::Phase::Failed => "failed",
    };
    let proto::HealthReply { epoch, step, num_rows, process_id, .. } = reply;
    Health { phase: phase.into(), epoch, step, num_rows, process_id }
}

fn description(reply: proto::Description) -> Description {
    let proto::Description { model_type, vocab_size, eos_token_ids, max_positions, dtype, device, version, .. } = reply;
    let proto::Description { num_cache_groups, max_drafts, world_size, .. } = reply;
    Description {
        model_type,
        vocab_size,
        eos_token_ids,
        max_positions,
        dtype,
        device,
        num_cache_groups,
        max_drafts,
        world_size,
        version,
    }
}

fn step_plan(plan: &Plan) -> proto::StepPlan {
    let step = &plan.step;
    let admit = step.admit.iter().zip(&plan.terms).map(|(admission, terms)| proto::Admit {
        row: admission.row.0,
        sequence: admission.id.0,
        incarnation: admission.incarnation,
        tokens: admission.token_ids.clone(),
        num_prompt: admission.num_prompt as u32,
        cached_len: admission.num_cached as u32,
        sampling: Some(terms::sampling(&terms.sampling)),
        grammar: terms.sampling.grammar.as_ref().map(terms::grammar),
        adapter: String::new(),
        spans: vec![],
        prompt_logprobs_from: terms.prompt_logprobs_from,
    });
    let work = step.work.iter().map(|work| proto::Work {
        row: work.row.0,
        incarnation: work.incarnation,
        max_query: work.extent.num_tokens as u32,
        max_ids: work.extent.max_new() as u32,
        new_blocks: vec![proto::Blocks { ids: work.new_blocks.iter().map(|block| block.0).collect() }],
    });
    proto::StepPlan {
        epoch: step.epoch,
        step: step.step,
        release: step.release.iter().map(|row| row.0).collect(),
        admit: admit.collect(),
        work: work.collect(),
    }
}

fn answer(result: proto::StepResult) -> Answer {
    let timings = result.timings.map_or_else(Timings::default, |timings| {
        let proto::Timings { forward_us, sample_us, total_us } = timings;
        Timings { forward_us, sample_us, total_us }
    });
    let rows = result.rows.into_iter().map(row_answer).collect();
    Answer { epoch: result.epoch, step: result.step, table_digest: result.table_digest, rows, timings }
}

fn row_answer(row: proto::RowResult) -> RowAnswer {
    let prompt = row.prompt_logprobs.into_iter().zip(tops(row.prompt_top));
    let prompt = prompt.map(|(logprob, top)| PromptLogprob { logprob, top }).collect();
    let sampled = match row.error {
        Some(error) => Err(row_failure(error)),
        None => {
            // What a shard leaves out shows as NaN; how many ids there may be is for the scheduler to judge.
            let logprobs = row.logprobs.into_iter().chain(std::iter::repeat(f32::NAN));
            let sampled = row.ids.into_iter().zip(logprobs).zip(tops(row.top));
            Ok(sampled.map(|((id, logprob), top)| Sampled { id, logprob, top }).collect())
        }
    };
    RowAnswer { row: RowId(row.row), incarnation: row.incarnation, computed: row.computed, sampled, prompt }
}

/// The alternatives to each id, and none to those that the shard has left out.
fn tops(tops: Vec<proto::TopTokens>) -> impl Iterator<Item = Vec<(TokenId, f32)>> {
    let tops = tops.into_iter().map(|top| top.ids.into_iter().zip(top.logprobs).collect());
    tops.chain(std::iter::repeat_with(Vec::new))
}

fn row_failure(error: proto::RowError) -> RowFailure {
    let kind = match error.kind() {
        row_error::Kind::Unspecified => "unknown",
        row_error::Kind::Numerical => "numerical",
        row_error::Kind::Grammar => "grammar",
        row_error::Kind::Unsupported => "unsupported",
    };
    RowFailure { kind, message: error.message }
}
