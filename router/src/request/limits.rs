//! Every bound of what a request may ask for: those of the operator and the model, and those that are fixed.
//!
//! The table of `docs/api.md` is written from here.

/// Levels of nested lists and objects of a body: as many as serde reads.
pub const MAX_DEPTH: usize = 127;
/// Characters of one stop string.
pub const MAX_STOP_CHARS: usize = 256;
/// Ids whose logits one request may change, and by how much at most.
pub const MAX_BIASES: usize = 1024;
/// What may be added to a logit, or taken from it.
pub const MAX_BIAS: f64 = 100.0;
/// What a penalty may add to a logit, or take from it.
pub const MAX_PENALTY: f64 = 2.0;
/// Alternatives to each token that the `OpenAI` routes tell.
pub const MAX_TOP_LOGPROBS: u64 = 20;
/// Answers at once to one request of the `OpenAI` routes, however many may run.
pub const MAX_CHOICES: usize = 128;
/// Messages of a chat.
pub const MAX_MESSAGES: usize = 1024;
/// Tools of a chat.
pub const MAX_TOOLS: usize = 128;
/// Characters of a role, of the name of a speaker, and of a tool.
pub const MAX_NAME_CHARS: usize = 256;
/// Bytes of the source of an answer's form.
pub const MAX_FORM_BYTES: usize = 64 << 10;
/// Characters and classes of a regular expression, with all that is repeated written out.
pub const MAX_REGEX_SIZE: u64 = 10_000;
/// Remainders that a number is told by while it is written: of one `multipleOf`.
pub const MAX_MULTIPLE: u64 = 5_000;
/// The same, of all of a schema.
pub const MAX_MULTIPLES: u64 = 50_000;
/// Properties that an object of a schema may have or not.
pub const MAX_OPTIONAL: usize = 400;

/// What clients may ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Candidates of which the best is answered.
    pub max_best_of: usize,
    /// Prompts of one request.
    pub max_client_batch_size: usize,
    /// Answers at once to one request of the `OpenAI` routes.
    pub max_choices: usize,
    /// Stop strings of one request.
    pub max_stop_sequences: usize,
    /// Most probable ids beside the chosen one.
    pub max_top_n_tokens: u32,
    /// Tokens of a prompt.
    pub max_input_tokens: usize,
    /// Tokens of a prompt and its answer.
    pub max_total_tokens: usize,
    /// Every id of a prompt is below it.
    pub vocab_size: u32,
    /// No token stands for more bytes of text, where that is known.
    pub max_token_bytes: Option<usize>,
    /// How the served model is called; beside it, `tgi` is a name for it.
    pub model_id: String,
}

/// Names that clients give to whatever is served: TGI's own, and what `huggingface_hub` says when it is told none.
const ANY_MODEL: [&str; 2] = ["tgi", "dummy"];

impl Limits {
    /// Whether a name is one of the served model.
    pub fn names_the_model(&self, name: &str) -> bool {
        names(name, &self.model_id)
    }
}

/// Whether a name is one of this model, which is the only one that is served.
pub fn names(name: &str, model_id: &str) -> bool {
    name == model_id || ANY_MODEL.contains(&name)
}

/// A bound, for people.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Row {
    /// Of what.
    pub what: &'static str,
    /// The bound.
    pub limit: String,
    /// The flag that sets it.
    pub flag: &'static str,
}

fn row(what: &'static str, limit: impl ToString, flag: &'static str) -> Row {
    Row { what, limit: limit.to_string(), flag }
}

/// All bounds of what a request may ask for, with the defaults of those that have a flag.
pub fn rows(defaults: &Limits) -> Vec<Row> {
    let penalty = format!("-{MAX_PENALTY} to {MAX_PENALTY}");
    vec![
        row("nested lists and objects of a body", MAX_DEPTH, ""),
        row("tokens of a prompt", "what the model's positions and the memory allow", "`--max-input-tokens`"),
        row("tokens of a prompt and its answer", "the same", "`--max-total-tokens`"),
        row("texts of `stop`", defaults.max_stop_sequences, "`--max-stop-sequences`"),
        row("characters of one", MAX_STOP_CHARS, ""),
        row("`best_of` of the native routes", defaults.max_best_of, "`--max-best-of`"),
        row("`n`, `best_of` of `/v1`", format!("as many as requests at once, {MAX_CHOICES} at most"), ""),
        row("`top_n_tokens`", defaults.max_top_n_tokens, "`--max-top-n-tokens`"),
        row("`logprobs`, `top_logprobs` of `/v1`", MAX_TOP_LOGPROBS, ""),
        row("prompts of one request", defaults.max_client_batch_size, "`--max-client-batch-size`"),
        row("messages", MAX_MESSAGES, ""),
        row("tools", MAX_TOOLS, ""),
        row("characters of a role, of the name of a speaker or a tool", MAX_NAME_CHARS, ""),
        row("`temperature`, `repetition_penalty`", "above 0; on `/v1` a temperature of 0 is greedy", ""),
        row("`top_p`, `typical_p`", "above 0 and below 1; on `/v1` `top_p` may be 1", ""),
        row("`top_k`", format!("1 to {}", i32::MAX), ""),
        row("`frequency_penalty`, `presence_penalty`", penalty, ""),
        row("ids of `logit_bias`", format!("{MAX_BIASES}, each of the vocabulary"), ""),
        row("values of `logit_bias`", format!("-{MAX_BIAS} to {MAX_BIAS}"), ""),
        row("bytes of a schema or a regular expression, as JSON", MAX_FORM_BYTES, ""),
        row("parts of a regular expression, repetitions written out", MAX_REGEX_SIZE, ""),
        row("properties of an object in a schema that are not required", MAX_OPTIONAL, ""),
        row("remainders of a `multipleOf`; of all in a schema", format!("{MAX_MULTIPLE}; {MAX_MULTIPLES}"), ""),
    ]
}
