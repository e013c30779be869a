//! From wire JSON to a request that can be generated: every limit and default, no I/O.

/// How ids are drawn. Values are those of `proto/shard.proto`'s `Sampling`: an option that is off has its neutral value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Without it the most probable id is taken.
    pub do_sample: bool,
    /// 1 leaves the distribution as it is.
    pub temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1: off.
    pub top_p: f32,
    /// 1: off.
    pub typical_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
    /// 0: off.
    pub frequency_penalty: f32,
    /// Of the counter-based draws.
    pub seed: u64,
    /// Most probable ids to report beside the chosen one.
    pub top_n: u32,
}

/// A request within every limit.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    /// The prompt, special tokens included, truncated where asked.
    pub prompt_ids: Vec<u32>,
    /// At least 1; prompt and these fit in `max_total_tokens`.
    pub max_new_tokens: usize,
    /// Strings that end the generation; their text stays in the answer, as in TGI.
    pub stop: Vec<String>,
    /// How ids are drawn.
    pub sampling: Sampling,
}
