//! A fake rank behind a real socket: what the router is measured and tested against without Python.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use scheduler::{Admission, BlockId, Extent, RowId, SequenceId, StepPlan, Work};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::fake::{FakeOptions, FakeRank, FakeShards};
use super::grpc::{MAX_MESSAGE_BYTES, WINDOW_BYTES};
use super::proto::shard_server::ShardServer;
use super::proto::{self, health_reply, row_error};
use super::{Answer, Description, Health, Join, PLAN_BUFFER, Plan, RowAnswer, Shard, ShardError, Terms, Warmup, terms};
use crate::request::Sampling;

/// Serves rank 0 of fake shards on a Unix socket until the future is dropped.
pub fn serve_fake(socket: &Path, options: FakeOptions) -> BoxFuture<'_, std::io::Result<()>> {
    serve_fake_rank(socket, FakeShards::new(options).rank(0))
}

/// Serves one fake rank, whose faults stay in the hands of its [`FakeShards`].
pub fn serve_fake_rank(socket: &Path, rank: Arc<FakeRank>) -> BoxFuture<'_, std::io::Result<()>> {
    serve(socket, rank).boxed()
}

async fn serve(socket: &Path, rank: Arc<FakeRank>) -> std::io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    let service = ShardServer::new(Stub { rank })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .add_service(service);
    server.serve_with_incoming(UnixListenerStream::new(listener)).await.map_err(std::io::Error::other)
}

struct Stub {
    rank: Arc<FakeRank>,
}

fn status(error: ShardError) -> Status {
    match error {
        ShardError::OutOfMemory(reason) => Status::resource_exhausted(reason),
        ShardError::Failed(reason) => Status::failed_precondition(reason),
    }
}

#[tonic::async_trait]
impl proto::shard_server::Shard for Stub {
    async fn describe(&self, _: Request<proto::DescribeRequest>) -> Result<Response<proto::Description>, Status> {
        Ok(Response::new(description(self.rank.describe().await.map_err(status)?)))
    }

    async fn join(&self, request: Request<proto::JoinRequest>) -> Result<Response<proto::JoinReply>, Status> {
        let proto::JoinRequest { epoch, rank, world_size, rendezvous } = request.into_inner();
        self.rank.join(Join { epoch, rank, world_size, rendezvous }).await.map_err(status)?;
        Ok(Response::new(proto::JoinReply { epoch }))
    }

    async fn warmup(&self, request: Request<proto::WarmupRequest>) -> Result<Response<proto::WarmupReply>, Status> {
        let proto::WarmupRequest { epoch, block_size, max_running, max_step_tokens, max_total_tokens, num_blocks } =
            request.into_inner();
        let warmup = Warmup { epoch, block_size, max_running, max_step_tokens, max_total_tokens, num_blocks };
        let num_blocks = self.rank.warmup(warmup).await.map_err(status)?;
        Ok(Response::new(proto::WarmupReply { num_blocks }))
    }

    async fn prepare(&self, request: Request<proto::Grammar>) -> Result<Response<proto::PrepareReply>, Status> {
        let Some(grammar) = terms::read_grammar(request.into_inner()) else {
            return Ok(Response::new(proto::PrepareReply::default()));
        };
        let error = self.rank.prepare(grammar).await.map_err(status)?.unwrap_or_default();
        Ok(Response::new(proto::PrepareReply { error }))
    }

    type RunStream = Pin<Box<dyn Stream<Item = Result<proto::StepResult, Status>> + Send>>;

    async fn run(&self, request: Request<Streaming<proto::StepPlan>>) -> Result<Response<Self::RunStream>, Status> {
        let mut incoming = request.into_inner();
        let (plans, receiver) = mpsc::channel(PLAN_BUFFER);
        let answers = Arc::clone(&self.rank).run(receiver).await.map_err(status)?;
        // As Python's server, which sends no headers before the first answer: a router must not wait for them.
        if let Some(first) = incoming.message().await? {
            plans.try_send(Arc::new(plan(first))).map_err(|_| Status::internal("a new channel is full"))?;
        }
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                if plans.send(Arc::new(plan(message))).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(answers.map(|answer| answer.map(step_result).map_err(status)).boxed()))
    }

    async fn health(&self, _: Request<proto::HealthRequest>) -> Result<Response<proto::HealthReply>, Status> {
        let Health { phase, epoch, step, num_rows, process_id } = self.rank.health().await.map_err(status)?;
        let phase = if phase == "serving" { health_reply::Phase::Serving } else { health_reply::Phase::Loaded };
        let reply = proto::HealthReply { epoch, step, num_rows, process_id, progress: step, ..Default::default() };
        Ok(Response::new(proto::HealthReply { phase: phase.into(), ..reply }))
    }
}

fn description(description: Description) -> proto::Description {
    let Description { model_type, vocab_size, eos_token_ids, max_positions, dtype, device, .. } = description;
    proto::Description {
        model_type,
        vocab_size,
        eos_token_ids,
        max_positions,
        dtype,
        device,
        num_cache_groups: description.num_cache_groups,
        max_drafts: description.max_drafts,
        world_size: description.world_size,
        version: description.version,
        row_stable: true,
        ..Default::default()
    }
}

fn plan(message: proto::StepPlan) -> Plan {
    let (admit, terms) = message.admit.into_iter().map(admission).unzip();
    let step = StepPlan {
        epoch: message.epoch,
        step: message.step,
        release: message.release.into_iter().map(RowId).collect(),
        admit,
        // The sequence of a row is not on the wire again, and the fake does not look at it.
        work: message.work.into_iter().map(work).collect(),
    };
    Plan { step, terms }
}

fn admission(admit: proto::Admit) -> (Admission, Terms) {
    let prompt_logprobs_from = admit.prompt_logprobs_from;
    let admission = Admission {
        row: RowId(admit.row),
        id: SequenceId(admit.sequence),
        incarnation: admit.incarnation,
        token_ids: admit.tokens,
        num_prompt: admit.num_prompt as usize,
        num_cached: admit.cached_len as usize,
    };
    let asked = admit.sampling.unwrap_or_default();
    let sampling = Sampling { grammar: admit.grammar.and_then(terms::read_grammar), ..terms::read_sampling(asked) };
    (admission, Terms { sampling: Arc::new(sampling), prompt_logprobs_from })
}

fn work(work: proto::Work) -> Work {
    let num_drafts = (work.max_ids as usize).saturating_sub(1);
    let extent = Extent { num_tokens: work.max_query as usize, num_drafts, samples: work.max_ids > 0 };
    let new_blocks = work.new_blocks.into_iter().flat_map(|blocks| blocks.ids).map(BlockId).collect();
    Work { row: RowId(work.row), id: SequenceId(u64::MAX), incarnation: work.incarnation, extent, new_blocks }
}

fn step_result(answer: Answer) -> proto::StepResult {
    let Answer { epoch, step, table_digest, rows, timings } = answer;
    let super::Timings { forward_us, sample_us, total_us } = timings;
    let timings = Some(proto::Timings { forward_us, sample_us, total_us });
    proto::StepResult { epoch, step, table_digest, rows: rows.into_iter().map(row_result).collect(), timings }
}

fn row_result(row: RowAnswer) -> proto::RowResult {
    let mut result =
        proto::RowResult { row: row.row.0, incarnation: row.incarnation, computed: row.computed, ..Default::default() };
    let top = |top: Vec<(u32, f32)>| {
        let (ids, logprobs) = top.into_iter().unzip();
        proto::TopTokens { ids, logprobs }
    };
    for one in row.prompt {
        result.prompt_logprobs.push(one.logprob);
        result.prompt_top.push(top(one.top));
    }
    match row.sampled {
        Ok(sampled) => {
            for one in sampled {
                result.ids.push(one.id);
                result.logprobs.push(one.logprob);
                result.top.push(top(one.top));
            }
        }
        Err(failure) => {
            let kind = match failure.kind {
                "numerical" => row_error::Kind::Numerical,
                "grammar" => row_error::Kind::Grammar,
                "unsupported" => row_error::Kind::Unsupported,
                _ => row_error::Kind::Unspecified,
            };
            result.error = Some(proto::RowError { kind: kind.into(), message: failure.message });
        }
    }
    result
}
