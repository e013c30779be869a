//! Decides what every step computes and which KV-cache blocks it uses.
#![allow(missing_docs, unused, clippy::all)]
pub type TokenId = u32;
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SequenceId(pub u64);
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RowId(pub u32);
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BlockId(pub u32);
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Millis(pub u64);
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Namespace(pub u64);
#[derive(Clone, Debug)]
pub struct Request {
    pub prompt: Vec<TokenId>,
    pub max_new_tokens: usize,
    pub namespace: Namespace,
    pub deadline: Option<Millis>,
    pub wants_prompt_logprobs: bool,
    pub ignore_eos: bool,
}
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_step_tokens: usize,
    pub max_running: usize,
    pub max_open_steps: usize,
    pub max_drafts: usize,
    pub block_size: usize,
    pub num_blocks: u32,
    pub eos: Vec<TokenId>,
}
#[derive(Debug)]
pub enum Rejected {
    EmptyPrompt,
    NothingToGenerate,
    TooLong { tokens: usize, limit: usize },
}
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    pub num_tokens: usize,
    pub num_drafts: usize,
    pub samples: bool,
}
impl Extent {
    pub fn max_new(&self) -> usize {
        if self.samples { self.num_drafts + 1 } else { 0 }
    }
}
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Admission {
    pub row: RowId,
    pub id: SequenceId,
    pub incarnation: u32,
    pub token_ids: Vec<TokenId>,
    pub num_prompt: usize,
    pub num_cached: usize,
}
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Work {
    pub row: RowId,
    pub id: SequenceId,
    pub incarnation: u32,
    pub extent: Extent,
    pub new_blocks: Vec<BlockId>,
}
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StepPlan {
    pub epoch: u64,
    pub step: u64,
    pub release: Vec<RowId>,
    pub admit: Vec<Admission>,
    pub work: Vec<Work>,
}
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RowError;
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RowResult {
    pub row: RowId,
    pub incarnation: u32,
    pub computed: usize,
    pub tokens: Result<Vec<TokenId>, RowError>,
}
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StepResult {
    pub epoch: u64,
    pub step: u64,
    pub rows: Vec<RowResult>,
}
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FinishReason {
    Length,
    EndOfSequence,
    RowError,
    KilledShards,
    NoLongerFits,
    DeadlineExceeded,
}
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    Token { id: SequenceId, token: TokenId, work: usize, index: usize },
    Finished { id: SequenceId, reason: FinishReason },
}
#[derive(Debug)]
pub struct ShardFault;
#[derive(Debug, Default)]
pub struct Stats {
    pub num_waiting: usize,
    pub num_running: usize,
    pub num_blocks: u32,
    pub num_free: usize,
    pub num_cached: usize,
    pub num_pinned: usize,
    pub block_size: usize,
}
#[derive(Debug)]
pub struct Scheduler;
impl Scheduler {
    pub fn new() -> Self {
        Self
    }
    pub fn add(&mut self, _: Request) -> Result<SequenceId, Rejected> {
        Err(Rejected::EmptyPrompt)
    }
    pub fn abort(&mut self, _: SequenceId) {}
    pub fn expire(&mut self, _: Millis) -> Vec<Event> {
        vec![]
    }
    pub fn plan(&mut self) -> Option<StepPlan> {
        None
    }
    pub fn commit(&mut self, _: &StepResult) -> Result<Vec<Event>, ShardFault> {
        Err(ShardFault)
    }
    pub fn lose_shards(&mut self) -> Vec<Event> {
        vec![]
    }
    pub fn shards_ready(&mut self, _: u64, _: Limits) -> Vec<Event> {
        vec![]
    }
    pub fn stats(&self) -> Stats {
        Stats::default()
    }
}
