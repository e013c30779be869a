//! A shard that computes nothing: it speaks the real protocol and answers each plan at once, with ids from a hash.
//!
//! It keeps only the lengths of its rows. An id depends on (sequence, position), as on a real shard it depends on the log,
//! and is never an end token, so that every answer has the length that was asked for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::BoxStream;
use text_generation_router::shards::proto::health_reply::Phase;
use text_generation_router::shards::proto::shard_server::{Shard, ShardServer};
use text_generation_router::shards::proto::{
    DescribeRequest, Description, Grammar, HealthReply, HealthRequest, JoinReply, JoinRequest, PrepareReply, RowResult,
    StepPlan, StepResult, Timings, WarmupReply, WarmupRequest,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

use crate::histogram::Histogram;
use crate::prompts::mix;

/// gRPC's default limit of 4 MB would refuse long admissions.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// What the stub claims to be.
#[derive(Clone, Debug, clap::Args)]
pub struct StubShardArgs {
    /// Ids are below this number; the tokenizer should know them all.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(16..))]
    pub vocab_size: u32,
    /// End tokens told to the router; never generated.
    #[arg(long, value_delimiter = ',', default_values_t = [2])]
    pub eos: Vec<u32>,
    /// Longest sequence told to the router.
    #[arg(long, default_value_t = 2048)]
    pub max_positions: u32,
    /// KV-cache blocks told to the router.
    #[arg(long, default_value_t = 16384)]
    pub num_blocks: u32,
    /// Microseconds that each step pretends to compute.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000_000))]
    pub step_us: u64,
}

/// What the stub saw of the router: shared with whoever started it.
#[derive(Debug, Default)]
pub struct Observed {
    /// Nanoseconds from a result being handed to gRPC to the next plan being decoded, where both have at least
    /// `min_rows` rows of one id each.
    pub gaps: Histogram,
    /// Rows that a step needs to be counted in `gaps`.
    pub min_rows: usize,
    /// Plans answered.
    pub steps: u64,
    epoch: u64,
    is_serving: bool,
}

/// Observations behind a lock that is held for nanoseconds.
pub type SharedObserved = Arc<Mutex<Observed>>;

/// Runs `f` on the observations.
pub fn observe<R>(observed: &SharedObserved, f: impl FnOnce(&mut Observed) -> R) -> R {
    f(&mut observed.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Serves on a Unix socket until the future is dropped.
pub async fn serve(socket: &Path, args: StubShardArgs, observed: SharedObserved) -> anyhow::Result<()> {
    let listener = tokio::net::UnixListener::bind(socket)
        .map_err(|error| anyhow::anyhow!("--socket {}: {error}; name a path that does not exist", socket.display()))?;
    let _file = SocketFile(socket.to_owned());
    let shard = ShardServer::new(StubShard { args: Arc::new(args), observed })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .add_service(shard)
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}

/// The socket file of a stub; removed when this value is dropped.
#[derive(Debug)]
pub struct SocketFile(pub PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

struct StubShard {
    args: Arc<StubShardArgs>,
    observed: SharedObserved,
}

#[tonic::async_trait]
impl Shard for StubShard {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<Description>, Status> {
        Ok(Response::new(Description {
            model_type: "llama".into(),
            architecture: "LlamaForCausalLM".into(),
            vocab_size: self.args.vocab_size,
            eos_token_ids: self.args.eos.clone(),
            max_positions: self.args.max_positions,
            dtype: "float32".into(),
            device: "cpu".into(),
            kv_bytes_per_token: 1024,
            num_cache_groups: 1,
            max_drafts: 0,
            row_stable: true,
            version: env!("CARGO_PKG_VERSION").into(),
            rank: 0,
            world_size: 1,
        }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let JoinRequest { epoch, world_size, .. } = request.into_inner();
        if world_size != 1 {
            return Err(Status::invalid_argument(format!("world_size: found {world_size}, the stub is one rank")));
        }
        observe(&self.observed, |observed| {
            if epoch <= observed.epoch {
                let message = format!("epoch: found {epoch}, expected more than {}", observed.epoch);
                return Err(Status::failed_precondition(message));
            }
            observed.epoch = epoch;
            observed.is_serving = false;
            Ok(Response::new(JoinReply { epoch }))
        })
    }

    async fn warmup(&self, request: Request<WarmupRequest>) -> Result<Response<WarmupReply>, Status> {
        let num_blocks = match request.into_inner().num_blocks {
            0 => self.args.num_blocks,
            agreed => agreed,
        };
        observe(&self.observed, |observed| observed.is_serving = true);
        Ok(Response::new(WarmupReply { num_blocks }))
    }

    async fn prepare(&self, _: Request<Grammar>) -> Result<Response<PrepareReply>, Status> {
        Ok(Response::new(PrepareReply::default()))
    }

    type RunStream = BoxStream<'static, Result<StepResult, Status>>;

    async fn run(&self, request: Request<Streaming<StepPlan>>) -> Result<Response<Self::RunStream>, Status> {
        let run = Run {
            plans: request.into_inner(),
            table: Table::new(Arc::clone(&self.args)),
            epoch: observe(&self.observed, |observed| observed.epoch),
            observed: Arc::clone(&self.observed),
            sent: None,
        };
        // Polling the results reads the plans: no task and no channel between the two.
        let results = futures::stream::try_unfold(run, |mut run| async move {
            Ok(run.next_result().await?.map(|result| (result, run)))
        });
        Ok(Response::new(Box::pin(results)))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthReply>, Status> {
        let (epoch, steps, is_serving) =
            observe(&self.observed, |observed| (observed.epoch, observed.steps, observed.is_serving));
        let phase = if is_serving { Phase::Serving } else { Phase::Loaded };
        Ok(Response::new(HealthReply {
            phase: phase.into(),
            detail: "stub".into(),
            epoch,
            step: steps,
            progress: steps,
            process_id: std::process::id(),
            ..HealthReply::default()
        }))
    }
}

struct Run {
    plans: Streaming<StepPlan>,
    table: Table,
    epoch: u64,
    observed: SharedObserved,
    /// When the last result was handed to gRPC, if its rows count.
    sent: Option<Instant>,
}

impl Run {
    async fn next_result(&mut self) -> Result<Option<StepResult>, Status> {
        let Some(plan) = self.plans.message().await? else { return Ok(None) };
        let decoded = Instant::now();
        if plan.epoch != self.epoch {
            let message = format!("plan of epoch {}, joined was {}", plan.epoch, self.epoch);
            return Err(Status::failed_precondition(message));
        }
        let result = self.table.answer(&plan).map_err(Status::invalid_argument)?;
        let num_samples = result.rows.iter().filter(|row| !row.ids.is_empty()).count();
        let counts = observe(&self.observed, |observed| {
            observed.steps += 1;
            let counts = observed.min_rows > 0 && num_samples >= observed.min_rows && plan.admit.is_empty();
            if let (true, Some(sent)) = (counts, self.sent) {
                observed.gaps.record((decoded - sent).as_nanos().try_into().unwrap_or(u64::MAX));
            }
            counts
        });
        if self.table.args.step_us > 0 {
            tokio::time::sleep(Duration::from_micros(self.table.args.step_us)).await;
        }
        self.sent = counts.then(Instant::now);
        Ok(Some(result))
    }
}

/// Of one row: whose it is and how long.
struct Row {
    sequence: u64,
    incarnation: u32,
    /// Ids in the log, prompt included.
    known: u32,
    /// Positions in the cache.
    computed: u32,
}

/// The rows of a shard, as far as a router can tell them from those of a real one.
struct Table {
    args: Arc<StubShardArgs>,
    rows: HashMap<u32, Row>,
}

impl Table {
    fn new(args: Arc<StubShardArgs>) -> Self {
        Self { args, rows: HashMap::new() }
    }

    /// The result of a plan, or what is wrong with the plan.
    fn answer(&mut self, plan: &StepPlan) -> Result<StepResult, String> {
        for admit in &plan.admit {
            let Ok(known) = u32::try_from(admit.tokens.len()) else { return Err("a log of 4 billion ids".into()) };
            let row =
                Row { sequence: admit.sequence, incarnation: admit.incarnation, known, computed: admit.cached_len };
            if self.rows.insert(admit.row, row).is_some() {
                return Err(format!("row {} is admitted twice", admit.row));
            }
        }
        let mut rows = Vec::with_capacity(plan.work.len());
        for work in &plan.work {
            let row = self.rows.get_mut(&work.row).ok_or_else(|| format!("row {} was not admitted", work.row))?;
            if row.incarnation != work.incarnation {
                return Err(format!("row {}: incarnation {}, planned {}", work.row, row.incarnation, work.incarnation));
            }
            row.computed += work.max_query.min(row.known - row.computed);
            let mut result = RowResult { row: work.row, incarnation: work.incarnation, ..RowResult::default() };
            result.computed = row.computed;
            if work.max_ids > 0 {
                if row.computed != row.known {
                    return Err(format!("row {}: a sample after {} of {} ids", work.row, row.computed, row.known));
                }
                result.ids.push(next_id(&self.args, row.sequence, row.known));
                result.logprobs.push(-1.25);
                row.known += 1;
            }
            rows.push(result);
        }
        for row in &plan.release {
            if self.rows.remove(row).is_none() {
                return Err(format!("row {row} is released, but was not admitted"));
            }
        }
        let timings = Some(Timings { forward_us: self.args.step_us, sample_us: 0, total_us: self.args.step_us });
        Ok(StepResult { epoch: plan.epoch, step: plan.step, table_digest: mix(plan.step), rows, timings })
    }
}

fn next_id(args: &StubShardArgs, sequence: u64, position: u32) -> u32 {
    let mut id = (mix(mix(sequence) ^ u64::from(position)) % u64::from(args.vocab_size)) as u32;
    for _ in 0..args.eos.len() {
        if args.eos.contains(&id) {
            id = (id + 1) % args.vocab_size;
        }
    }
    id
}

#[cfg(test)]
mod tests {
    use text_generation_router::shards::proto::shard_client::ShardClient;
    use text_generation_router::shards::proto::{Admit, Work};

    use super::*;

    fn table() -> Table {
        let args = StubShardArgs { vocab_size: 16, eos: vec![2, 3], max_positions: 64, num_blocks: 8, step_us: 0 };
        Table::new(Arc::new(args))
    }

    fn admit(row: u32, num_tokens: usize) -> Admit {
        Admit { row, sequence: 7, incarnation: 1, tokens: vec![5; num_tokens], ..Admit::default() }
    }

    fn work(row: u32, max_query: u32, max_ids: u32) -> Work {
        Work { row, incarnation: 1, max_query, max_ids, ..Work::default() }
    }

    fn step(table: &mut Table, plan: StepPlan) -> Vec<(u32, usize)> {
        let rows = table.answer(&plan).unwrap().rows;
        rows.iter().map(|row| (row.computed, row.ids.len())).collect()
    }

    #[test]
    fn a_prompt_in_two_chunks_is_sampled_at_its_end_and_then_grows_by_one() {
        let mut table = table();
        let first = StepPlan { admit: vec![admit(0, 5)], work: vec![work(0, 3, 0)], ..StepPlan::default() };
        assert_eq!(step(&mut table, first), [(3, 0)]);
        assert_eq!(step(&mut table, StepPlan { work: vec![work(0, 2, 1)], ..StepPlan::default() }), [(5, 1)]);
        let last = StepPlan { work: vec![work(0, 1, 1)], release: vec![0], ..StepPlan::default() };
        assert_eq!(step(&mut table, last), [(6, 1)]);
        assert!(table.rows.is_empty());
    }

    #[test]
    fn a_plan_that_breaks_the_contract_is_refused() {
        let check = |plan: StepPlan, expected: &str| assert_eq!(table().answer(&plan).unwrap_err(), expected);
        check(StepPlan { work: vec![work(1, 1, 1)], ..StepPlan::default() }, "row 1 was not admitted");
        check(StepPlan { release: vec![1], ..StepPlan::default() }, "row 1 is released, but was not admitted");
        check(
            StepPlan { admit: vec![admit(0, 5)], work: vec![work(0, 3, 1)], ..StepPlan::default() },
            "row 0: a sample after 3 of 5 ids",
        );
    }

    #[test]
    fn a_router_can_join_warm_up_and_run_it_over_its_socket() {
        let path = std::env::temp_dir().join(format!("stub-shard-{}", std::process::id()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let talk = async {
            let connector = tower::service_fn({
                let path = path.clone();
                move |_: tonic::transport::Uri| {
                    let path = path.clone();
                    async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
                }
            });
            let endpoint = tonic::transport::Endpoint::from_static("http://shard");
            let mut client = ShardClient::new(endpoint.connect_with_connector(connector).await.unwrap());
            assert_eq!(client.describe(DescribeRequest {}).await.unwrap().into_inner().vocab_size, 16);
            let join = JoinRequest { epoch: 1, world_size: 1, ..JoinRequest::default() };
            client.join(join.clone()).await.unwrap();
            assert_eq!(client.join(join).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
            let warmup = client.warmup(WarmupRequest { epoch: 1, ..WarmupRequest::default() }).await.unwrap();
            assert_eq!(warmup.into_inner().num_blocks, 8);
            let plan =
                |step, admit| StepPlan { epoch: 1, step, admit, work: vec![work(0, 5, 1)], ..StepPlan::default() };
            let plans = tokio_stream::iter([plan(1, vec![admit(0, 5)]), plan(2, vec![])]);
            let mut results = client.run(plans).await.unwrap().into_inner();
            for step in [1, 2] {
                let result = results.message().await.unwrap().unwrap();
                assert_eq!((result.step, result.rows[0].ids.len()), (step, 1));
            }
            assert!(results.message().await.unwrap().is_none());
            let health = client.health(HealthRequest {}).await.unwrap().into_inner();
            assert_eq!((health.epoch, health.step, health.phase()), (1, 2, Phase::Serving));
        };
        runtime.block_on(async {
            let served = serve(&path, table().args.as_ref().clone(), SharedObserved::default());
            tokio::select! {
                // In this order: the socket must be there before the client connects.
                biased;
                result = served => panic!("the stub ended: {result:?}"),
                () = talk => {}
            }
        });
        assert!(!path.exists());
    }

    #[test]
    fn ids_are_below_the_vocabulary_and_never_end_a_sequence() {
        let args = table().args;
        let ids: Vec<u32> = (0..1000).map(|position| next_id(&args, 7, position)).collect();
        assert!(ids.iter().all(|id| *id < 16 && *id != 2 && *id != 3));
        assert!((0..16).filter(|id| ids.contains(id)).count() == 14);
    }
}
