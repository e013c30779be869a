//! The way from a valid request to its tokens. Everything behind `Engine` belongs to the driver loop alone.

use std::sync::Arc;
use std::task::{Context, Poll};

use scheduler::Rejected;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use self::prepare::Preparer;
use crate::request::ValidRequest;
use crate::request::form::Grammar;

mod clients;
pub mod driver;
pub mod fake;
mod faults;
pub mod limits;
mod measure;
mod outbox;
mod pace;
mod prepare;
mod start;
mod text_state;

pub use prepare::FirstRank;

pub use driver::{Config, Driver, Ended, Observer, Snapshot};

/// Outputs buffered per stream before the driver counts the client as stalled.
pub const STREAM_BUFFER: usize = 256;

/// One generated token, as a client sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Id in the vocabulary.
    pub id: u32,
    /// The text that became certain with this token: empty while a character is incomplete. The texts of a stream's
    /// tokens that are not special, concatenated, are its generated text.
    pub text: String,
    /// Natural logarithm, under the model's own distribution.
    pub logprob: f32,
    /// Whether the tokenizer calls it special.
    pub special: bool,
    /// The most probable alternatives (id, text, logprob, special), where asked for.
    pub top: Vec<TopToken>,
}

/// An alternative to a generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TopToken {
    /// Id in the vocabulary.
    pub id: u32,
    /// The token decoded alone.
    pub text: String,
    /// Natural logarithm, under the model's own distribution.
    pub logprob: f32,
    /// Whether the tokenizer calls it special.
    pub special: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FinishReason {
    /// `max_new_tokens` were generated.
    Length,
    /// The model produced an end-of-sequence token.
    EosToken,
    /// A stop string was generated.
    StopSequence,
}

/// The end of a generation that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// All of the text, without special tokens, up to the end of a stop string.
    pub text: String,
    /// Tokens generated, special ones included.
    pub num_tokens: u32,
}

/// What a stream yields: any number of tokens without `finished`, then one with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The token.
    pub token: Token,
    /// Set on the last output of a stream.
    pub finished: Option<Finished>,
    /// When the sequence was first planned; the time before it is queueing.
    pub started: Option<std::time::Instant>,
    /// On the first output, where asked for: the tokens of the prompt.
    pub prompt: Option<Vec<PromptToken>>,
}

/// A token of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptToken {
    /// Id in the vocabulary.
    pub id: u32,
    /// The token decoded alone.
    pub text: String,
    /// Natural logarithm, under the model's own distribution after the tokens before it. The first has none.
    pub logprob: Option<f32>,
    /// The most probable ids in its place, where asked for.
    pub top: Vec<TopToken>,
}

/// Why a request got no (further) tokens.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum GenerateError {
    /// All permits are taken.
    #[error("Model is overloaded")]
    Overloaded,
    /// It waited in the queue for longer than its deadline.
    #[error("the request waited longer than {seconds} s")]
    QueueTimeout {
        /// The deadline.
        seconds: f64,
    },
    /// The shards are gone for good, or the server is shutting down.
    #[error("{reason}")]
    ShuttingDown {
        /// In words.
        reason: String,
    },
    /// It can never fit in the KV cache.
    #[error("`inputs` tokens + `max_new_tokens` must be <= {limit}. Given: {tokens} tokens")]
    TooLong {
        /// Prompt plus `max_new_tokens`.
        tokens: usize,
        /// The longest sequence that fits.
        limit: usize,
    },
    /// The shard cannot go on with this sequence.
    #[error("{message}")]
    Row {
        /// `numerical`, `grammar` or `unsupported`.
        kind: &'static str,
        /// In words.
        message: String,
    },
    /// It ended the shards three times, the last time alone.
    #[error("the shards died three times while computing this request")]
    KilledShards,
    /// The client did not read for too long.
    #[error("the client stopped reading")]
    Stalled,
}

impl From<Rejected> for GenerateError {
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::TooLong { tokens, limit } => Self::TooLong { tokens, limit },
            Rejected::NotReady => Self::ShuttingDown { reason: "the model is not loaded yet".into() },
            other => Self::Row { kind: "unsupported", message: format!("the request cannot be planned: {other}") },
        }
    }
}

/// What the engine tells about itself, for probes, `/info` and metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Shards have joined and warmed up, and plans are answered.
    pub is_ready: bool,
    /// Whether it was ready once.
    pub was_ready: bool,
    /// SIGTERM was received: nothing is admitted any more.
    pub is_draining: bool,
    /// In words: what it waits for.
    pub detail: String,
    /// The current epoch.
    pub epoch: u64,
    /// The launcher's generation.
    pub generation: u64,
    /// The model, once known.
    pub model: Option<Arc<ModelFacts>>,
    /// Who makes grammars ready.
    pub first_rank: FirstRank,
}

/// What the shards told about the model, and the limits agreed with them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFacts {
    /// `config.json`'s `model_type`.
    pub model_type: String,
    /// As computed in.
    pub dtype: String,
    /// `cpu`, `cuda`.
    pub device: String,
    /// Rows of the logits.
    pub vocab_size: u32,
    /// Ids that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Longest prompt.
    pub max_input_tokens: usize,
    /// Longest sequence.
    pub max_total_tokens: usize,
    /// KV-cache blocks.
    pub num_blocks: u32,
    /// Tokens per block.
    pub block_size: usize,
    /// Ranks.
    pub world_size: u32,
}

/// A request on its way to the driver.
#[derive(Debug)]
pub struct Submission {
    /// What to generate.
    pub request: ValidRequest,
    /// Where its tokens go. A receiver that was dropped aborts the sequence within a step.
    pub outputs: mpsc::Sender<Result<Output, GenerateError>>,
    /// Returned when the sequence has ended.
    pub permit: OwnedSemaphorePermit,
    /// When the request arrived.
    pub arrived: std::time::Instant,
}

/// The entrance to the driver loop. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Engine {
    submissions: mpsc::Sender<Submission>,
    permits: Arc<Semaphore>,
    num_permits: usize,
    status: watch::Receiver<Status>,
    preparer: Arc<Preparer>,
}

/// The right to generate one sequence; taken before a request is tokenized, so that overload is cheap.
#[derive(Debug)]
pub struct Permit(OwnedSemaphorePermit);

impl Engine {
    /// An entrance whose submissions go to `submissions`, at most `max_concurrent_requests` of them alive at once.
    pub fn new(
        submissions: mpsc::Sender<Submission>,
        max_concurrent_requests: usize,
        status: watch::Receiver<Status>,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(max_concurrent_requests));
        let preparer = Arc::default();
        Self { submissions, permits, num_permits: max_concurrent_requests, status, preparer }
    }

    /// Takes a permit, or says at once that there is none.
    pub fn permit(&self) -> Result<Permit, GenerateError> {
        Arc::clone(&self.permits).try_acquire_owned().map(Permit).map_err(|_| GenerateError::Overloaded)
    }

    /// Permits, taken or not.
    pub fn num_permits(&self) -> usize {
        self.num_permits
    }

    /// Permits not taken.
    pub fn num_free_permits(&self) -> usize {
        self.permits.available_permits()
    }

    /// The latest status; `changed` on the receiver waits for the next.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Whether nothing is admitted any more.
    pub fn is_draining(&self) -> bool {
        self.status.borrow().is_draining
    }

    /// The model, once it is known.
    pub fn model(&self) -> Option<Arc<ModelFacts>> {
        self.status.borrow().model.clone()
    }

    /// Lets the shards make a grammar ready, before sequences with it are queued. Why they cannot, if they say so.
    pub async fn prepare(&self, grammar: &Grammar) -> Result<(), GenerateError> {
        let (epoch, rank) = {
            let status = self.status.borrow();
            (status.epoch, status.is_ready.then(|| status.first_rank.clone()))
        };
        // Shards that are gone, or have no time, make it ready when the sequence is admitted.
        let Some(rank) = rank else { return Ok(()) };
        let refused = self.preparer.prepare(grammar, epoch, &rank).await;
        refused.map_or(Ok(()), |message| Err(GenerateError::Row { kind: "grammar", message }))
    }

    /// Queues a request. Dropping the stream aborts it.
    pub async fn generate(&self, request: ValidRequest, permit: Permit) -> Result<TokenStream, GenerateError> {
        let (outputs, receiver) = mpsc::channel(STREAM_BUFFER);
        let submission = Submission { request, outputs, permit: permit.0, arrived: std::time::Instant::now() };
        let gone = || GenerateError::ShuttingDown { reason: "the server is shutting down".into() };
        self.submissions.send(submission).await.map_err(|_| gone())?;
        Ok(TokenStream { outputs: receiver })
    }
}

/// The outputs of one request. Dropping it aborts the request.
#[derive(Debug)]
pub struct TokenStream {
    outputs: mpsc::Receiver<Result<Output, GenerateError>>,
}

impl TokenStream {
    /// The next output; `None` after the last, or if the driver ended without one.
    pub async fn next(&mut self) -> Option<Result<Output, GenerateError>> {
        self.outputs.recv().await
    }

    /// The same, for whoever waits for several streams.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Output, GenerateError>>> {
        self.outputs.poll_recv(cx)
    }
}
