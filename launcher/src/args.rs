//! The command line: TGI's flags, environment names and defaults as far as they have a meaning here, and a few of ours.
//!
//! A flag that TGI knows and this version does not serve is parsed and then refused by name, whether it came from the
//! command line or from the environment; nothing is ignored silently. Relations between flags are checked in `plan`.

use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::LazyLock;

use clap::builder::{BoolishValueParser, PossibleValuesParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, CommandFactory, FromArgMatches, Parser, ValueEnum};
use text_generation_router::args::{endpoint, version, without_empty_variable};

const MODEL: &str = "Model";
const SHARDS: &str = "Shards";
const LIMITS: &str = "Limits";
const HTTP: &str = "HTTP";
const OPERATION: &str = "Operation";
const NO_EFFECT: &str = "Accepted for TGI's sake, without effect here";
const NOT_SERVED: &str = "Known to TGI, not served yet (an error if given)";

/// Serves a language model: starts the shards and the router, watches them, restarts what dies.
#[derive(Clone, Debug, Parser, PartialEq)]
#[command(name = "text-generation-launcher", version, about, max_term_width = 110)]
pub struct Args {
    /// A directory with config.json, tokenizer.json and safetensors files, or the name of a model on the hub.
    #[arg(long, env, help_heading = MODEL)]
    pub model_id: String,
    /// Branch, tag or commit of a model on the hub.
    #[arg(long, env, help_heading = MODEL)]
    pub revision: Option<String>,
    /// The type computed in. By default what the processor computes natively; on GPUs bfloat16, or float16 where one is
    /// older than compute capability 8.0. float16 is refused on CPUs, float32 on GPUs.
    #[arg(long, env, value_enum, help_heading = MODEL)]
    pub dtype: Option<Dtype>,
    /// How the weights are quantized. By default what the checkpoint's own files say; a method that contradicts them is
    /// an error.
    #[arg(long, env, value_enum, help_heading = MODEL)]
    pub quantize: Option<Quantize>,
    /// The bits of gptq weights, where no file of the checkpoint says it.
    #[arg(long, env, allow_negative_numbers = true, help_heading = MODEL)]
    pub gptq_bits: Option<i32>,
    /// The group size of gptq weights, where no file of the checkpoint says it; -1: one group.
    #[arg(long, env, allow_negative_numbers = true, help_heading = MODEL)]
    pub gptq_groupsize: Option<i32>,
    /// Accepted for scripts that give it: no model that is served needs code of its own, and nothing is ever unpickled.
    #[arg(long, env, action = ArgAction::SetTrue, value_parser = BoolishValueParser::new(), help_heading = MODEL)]
    pub trust_remote_code: bool,
    /// Where models from the hub are kept. By default where other programs of the hub keep them: `hub` in HF_HOME, which is
    /// ~/.cache/huggingface if not set.
    #[arg(long, env, help_heading = MODEL)]
    pub huggingface_hub_cache: Option<String>,

    /// In TGI a variable alone: the former name of HF_TOKEN, which it overrides.
    #[arg(long, env, hide = true, hide_env_values = true)]
    pub hf_api_token: Option<String>,

    /// Whether the model is cut into several shards.
    #[arg(long, env, value_name = "BOOL", value_parser = BoolishValueParser::new(), help_heading = SHARDS)]
    pub sharded: Option<bool>,
    /// How many tensor-parallel shards, each a process; on GPUs each has one. By default one, or as many as there are
    /// visible GPUs where --sharded says true.
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=256), allow_negative_numbers = true,
          help_heading = SHARDS)]
    pub num_shard: Option<u32>,
    /// What computes.
    #[arg(long, env, value_enum, default_value = "cpu", help_heading = SHARDS)]
    pub device: Device,
    /// The share of the memory (the smaller of what is available and the container's limit) that all shards together
    /// may take for weights and KV cache; on GPUs of what each has free. By default 0.5, on GPUs 0.9.
    #[arg(long, env, value_parser = fraction, allow_negative_numbers = true, help_heading = SHARDS)]
    pub memory_fraction: Option<f64>,
    /// TGI's name of --memory-fraction on GPUs.
    #[arg(long, env, value_parser = fraction, allow_negative_numbers = true, help_heading = SHARDS)]
    pub cuda_memory_fraction: Option<f64>,
    /// On GPUs: for how many decoding sequences steps are recorded as CUDA graphs, several numbers with commas between; 0:
    /// none. By default 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 and 128. Shards that share a model record none.
    #[arg(long, env, value_name = "NUMBERS", value_parser = graph_sizes, allow_hyphen_values = true,
          help_heading = SHARDS)]
    pub cuda_graphs: Option<String>,
    /// The share of the vocabulary that the watermark favours, where a request asks for one. By default 0.5.
    #[arg(long, env, value_parser = fraction, allow_negative_numbers = true, help_heading = SHARDS)]
    pub watermark_gamma: Option<f64>,
    /// How much the watermark adds to the logits of that share. By default 2.
    #[arg(long, env, value_parser = finite, allow_negative_numbers = true, help_heading = SHARDS)]
    pub watermark_delta: Option<f64>,
    /// Where the run directory goes that holds the sockets: this, followed by a suffix of its own for each start.
    #[arg(long, env, default_value = "/tmp/text-generation-server", help_heading = SHARDS)]
    pub shard_uds_path: String,

    /// Requests served or queued at a time; one more is answered 429.
    #[arg(long, env, default_value = "128", value_parser = at_least_one(), allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub max_concurrent_requests: u32,
    /// The most stop sequences of a request.
    #[arg(long, env, default_value = "4", allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_stop_sequences: u32,
    /// Candidates that one request may have generated to be answered the best of them.
    #[arg(long, env, default_value = "2", value_parser = at_least_one(), allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub max_best_of: u32,
    /// Most probable tokens that one request may have reported beside each chosen one.
    #[arg(long, env, default_value = "5", allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_top_n_tokens: u32,
    /// Prompts of one request to /v1/completions.
    #[arg(long, env, default_value = "4", value_parser = at_least_one(), allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub max_client_batch_size: u32,
    /// Refuse every request whose answer is to have a given form.
    #[arg(long, env, action = ArgAction::SetTrue, value_parser = BoolishValueParser::new(), help_heading = LIMITS)]
    pub disable_grammar_support: bool,
    /// The longest prompt, in tokens. By default one less than --max-total-tokens.
    #[arg(long, env, value_parser = at_least_one(), allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_input_tokens: Option<u32>,
    /// The former name of --max-input-tokens.
    #[arg(long, env, value_parser = at_least_one(), allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_input_length: Option<u32>,
    /// The longest sequence, prompt and answer together. By default what the model's positions and the cache allow.
    #[arg(long, env, value_parser = at_least_one(), allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_total_tokens: Option<u32>,
    /// Input tokens computed in one step, over all sequences; longer prompts are computed in parts, and in smaller ones
    /// while other sequences go on. By default the smaller of 512 and the model's positions, but at least one for each
    /// running sequence.
    #[arg(long, env, value_parser = at_least_one(), allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_batch_prefill_tokens: Option<u32>,
    /// Tokens held in the KV cache at a time. By default as many as the memory allows.
    #[arg(long, env, value_parser = at_least_one(), allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_batch_total_tokens: Option<u32>,
    /// Tokens per block of the KV cache. By default 16.
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=1024), allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub block_size: Option<u32>,
    /// Sequences computed in one step. By default as many as --max-concurrent-requests.
    #[arg(long, env, value_parser = at_least_one(), allow_negative_numbers = true, help_heading = LIMITS)]
    pub max_batch_size: Option<u32>,
    /// Steps in flight: while one is computed the next is planned and sent. By default 2.
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=4), allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub pipeline_depth: Option<u32>,
    /// Seconds that a request may wait in the queue. By default for ever.
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub queue_timeout: Option<f64>,
    /// Seconds after which a step without an answer counts as a fault of the shards. By default 60.
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true,
          help_heading = LIMITS)]
    pub step_timeout: Option<f64>,

    /// The address to listen on. A name that a container runtime put into HOSTNAME means 0.0.0.0, with a notice.
    #[arg(long, env, default_value = "0.0.0.0", help_heading = HTTP)]
    pub hostname: String,
    /// The port to listen on.
    #[arg(short, long, env, default_value = "3000", value_parser = clap::value_parser!(u16).range(1..),
          allow_negative_numbers = true, help_heading = HTTP)]
    pub port: u16,
    /// The largest request body, in bytes.
    #[arg(long, env, default_value = "2000000", value_parser = at_least_one(),
          allow_negative_numbers = true, help_heading = HTTP)]
    pub payload_limit: u32,
    /// Threads that turn text into tokens; half as many more do so for long texts, which short ones need not wait for.
    #[arg(long, env, default_value = "2", value_parser = at_least_one(), allow_negative_numbers = true,
          help_heading = HTTP)]
    pub validation_workers: u32,
    /// What the answers' header `x-compute-type` says. By default the device, and `+optimized`.
    #[arg(long, env, value_parser = header_value, help_heading = HTTP)]
    pub compute_type: Option<String>,
    /// A key that clients must send as `Authorization: Bearer KEY`; may be given several times. Whoever may list processes
    /// sees it on a command line: prefer the environment, one key a line, or --api-key-file. Without any, anybody may call.
    #[arg(long, env, value_delimiter = '\n', hide_env_values = true, help_heading = HTTP)]
    pub api_key: Vec<String>,
    /// A file of keys, one a line; lines that begin with # are comments.
    #[arg(long, env, value_name = "FILE", help_heading = HTTP)]
    pub api_key_file: Option<String>,
    /// A chat template to use instead of the model's own: a file of Jinja, or JSON with `chat_template`.
    #[arg(long, env, value_name = "FILE", help_heading = HTTP)]
    pub chat_template: Option<String>,
    /// A file to read in place of the model's tokenizer_config.json: its chat template and special tokens.
    #[arg(long, env, value_name = "FILE", help_heading = HTTP)]
    pub tokenizer_config_path: Option<String>,
    /// An origin that browsers may call from; may be given several times. By default any.
    #[arg(long, env, value_delimiter = ',', help_heading = HTTP)]
    pub cors_allow_origin: Vec<String>,

    /// Writes the log as lines of JSON.
    #[arg(long, env, action = ArgAction::SetTrue, value_parser = BoolishValueParser::new(), help_heading = OPERATION)]
    pub json_output: bool,
    /// Where traces are sent to, by OTLP over gRPC, such as http://localhost:4317. By default nowhere.
    #[arg(long, env, value_name = "URL", value_parser = endpoint, help_heading = OPERATION)]
    pub otlp_endpoint: Option<String>,
    /// What traces call this server.
    #[arg(long, env, default_value = "text-generation-inference.router", help_heading = OPERATION)]
    pub otlp_service_name: String,
    /// error, warn, info, debug, trace, or a filter in the syntax of the tracing-subscriber crate.
    #[arg(long, env, default_value = "info", help_heading = OPERATION)]
    pub log_level: String,
    /// Logs versions, processor and memory before it starts.
    #[arg(short, long, action = ArgAction::SetTrue, help_heading = OPERATION)]
    pub env: bool,
    /// Seconds that running requests are given to finish after SIGTERM or Ctrl-C.
    #[arg(short, long, env, value_name = "SECONDS", default_value = "90", value_parser = seconds, allow_negative_numbers = true,
          help_heading = OPERATION)]
    pub graceful_termination_timeout: f64,
    /// Seconds without any progress after which a start, or a restart of a shard, is given up.
    #[arg(long, env, value_name = "SECONDS", default_value = "120", value_parser = seconds, allow_negative_numbers = true,
          help_heading = OPERATION)]
    pub startup_stall_timeout: f64,

    /// What to tell the user about flags that have no effect here.
    #[arg(skip)]
    pub notices: Vec<String>,
    /// Number and commit of this build.
    #[arg(skip)]
    pub version: &'static str,
}

/// The type that a model is computed in.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Dtype {
    /// IEEE single precision.
    #[value(name = "float32")]
    Float32,
    /// Brain floating point.
    #[value(name = "bfloat16")]
    Bfloat16,
    /// IEEE half precision.
    #[value(name = "float16")]
    Float16,
}

impl Dtype {
    /// The name on every command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// How weights are quantized.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Quantize {
    /// A checkpoint of AutoAWQ or GPTQModel, 4 bits.
    Awq,
    /// A checkpoint of compressed-tensors: packed integers or 8-bit floats.
    CompressedTensors,
    /// Not served: the original weights are, with bitsandbytes or fp8.
    Eetq,
    /// Not served: take a gptq or awq checkpoint of the same model.
    Exl2,
    /// A checkpoint of AutoGPTQ, GPTQModel or Optimum, 2, 3, 4 or 8 bits.
    Gptq,
    /// Not served: the gptq checkpoint that it was made from is.
    Marlin,
    /// 8 bits: such a checkpoint, or plain weights quantized while they are loaded.
    Bitsandbytes,
    /// 4 bits, nf4: such a checkpoint, or plain weights quantized while they are loaded.
    BitsandbytesNf4,
    /// 4 bits, fp4: such a checkpoint, or plain weights quantized while they are loaded.
    BitsandbytesFp4,
    /// 8-bit floats: such a checkpoint, or plain weights quantized while they are loaded.
    Fp8,
}

impl Quantize {
    /// The name on every command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Awq => "awq",
            Self::CompressedTensors => "compressed-tensors",
            Self::Eetq => "eetq",
            Self::Exl2 => "exl2",
            Self::Gptq => "gptq",
            Self::Marlin => "marlin",
            Self::Bitsandbytes => "bitsandbytes",
            Self::BitsandbytesNf4 => "bitsandbytes-nf4",
            Self::BitsandbytesFp4 => "bitsandbytes-fp4",
            Self::Fp8 => "fp8",
        }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Device {
    /// The processor.
    Cpu,
    /// NVIDIA GPUs: shard i has the i-th that CUDA_VISIBLE_DEVICES leaves. Tested without a GPU only.
    Cuda,
}

impl Device {
    /// The name on every command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// What happens to a flag of TGI's that has no field in `Args`.
enum Fate {
    /// An error, unless the value is one of these, which ask for what happens anyway.
    Refused(Values),
    /// A line in the log, unless the value is one of these.
    Noticed(Values),
}

/// A flag of TGI's without a field in `Args`.
struct Foreign {
    flag: &'static str,
    /// The legal values; empty: any. `SWITCH`: the flag takes none.
    values: Values,
    fate: Fate,
    /// For a refusal: what there is instead. For a notice: why it has no effect.
    why: &'static str,
}

const SWITCH: &[&str] = &["true", "false"];
const ANY: &[&str] = &[];

type Values = &'static [&'static str];

const fn refused(flag: &'static str, values: Values, why: &'static str) -> Foreign {
    refused_unless(&[], flag, values, why)
}

const fn refused_unless(accepted: Values, flag: &'static str, values: Values, why: &'static str) -> Foreign {
    Foreign { flag, values, fate: Fate::Refused(accepted), why }
}

const fn noticed(flag: &'static str, values: Values, why: &'static str) -> Foreign {
    noticed_unless(&[], flag, values, why)
}

const fn noticed_unless(accepted: Values, flag: &'static str, values: Values, why: &'static str) -> Foreign {
    Foreign { flag, values, fate: Fate::Noticed(accepted), why }
}

/// Noticed is what changes neither answers nor whether they are given: where and how fast something is done. A start script
/// or an environment made for TGI works with it. Refused is what somebody would miss.
const FOREIGN: &[Foreign] = &[
    noticed(
        "waiting-served-ratio",
        ANY,
        "every step mixes prompts and answers, so nothing waits to be served (as in TGI)",
    ),
    noticed("max-waiting-tokens", ANY, "every step mixes prompts and answers, so nothing waits for tokens (as in TGI)"),
    noticed("master-addr", ANY, "the shards of one machine meet through the run directory, not over TCP"),
    noticed("master-port", ANY, "the shards of one machine meet through the run directory, no port is used"),
    noticed("prometheus-port", ANY, "metrics are on the main port, at /metrics"),
    noticed(
        "disable-custom-kernels",
        SWITCH,
        "ours cannot be replaced; `text-generation-server serve --instruction-set none` computes without them, slowly",
    ),
    noticed_unless(&["off"], "usage-stats", &["on", "off", "no-stack"], "nothing is ever sent anywhere"),
    noticed_unless(&["0"], "speculate", ANY, "nothing is drafted yet; answers are the same without drafts"),
    noticed("enable-prefill-logprobs", SWITCH, "log-probabilities of prompts are always to be had"),
    noticed("request-logprobs", ANY, "log-probabilities of prompts are always to be had"),
    noticed("attention", ANY, "there is one kind of attention"),
    noticed_unless(
        &["1", "true"],
        "prefix-caching",
        ANY,
        "prefixes are always cached, and change no answer; the cache gives way to running sequences",
    ),
    noticed_unless(
        &["1", "true"],
        "prefill-chunking",
        ANY,
        "long prompts are always computed in parts, which change no answer",
    ),
    noticed("tgi-wiggle-room", ANY, "it is about GPUs; --memory-fraction is the share of this machine's memory"),
    refused("kv-cache-dtype", ANY, "the cache has the type of the model; leave it out"),
    refused("rope-scaling", ANY, "scaling is read from the checkpoint's config.json; leave it out"),
    refused("rope-factor", ANY, "scaling is read from the checkpoint's config.json; leave it out"),
    refused("weights-cache-override", ANY, "give a directory as --model-id, or use --huggingface-hub-cache"),
    refused_unless(&["false"], "ngrok", SWITCH, "leave it out"),
    refused("ngrok-authtoken", ANY, "leave it out"),
    refused("ngrok-edge", ANY, "leave it out"),
    refused("lora-adapters", ANY, "leave it out"),
];

/// In TGI these are environment variables only; they are no flags here either.
const ENVIRONMENT_ONLY: &[&str] =
    &["request-logprobs", "attention", "prefix-caching", "prefill-chunking", "tgi-wiggle-room"];

/// No count of tokens, bytes or sequences is larger; sums of them fit in every type they are sent in.
const MAX_COUNT: i64 = u32::MAX as i64 / 4;

fn at_least_one() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=MAX_COUNT)
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..=1e6).contains(seconds));
    seconds.ok_or_else(|| "expected seconds from 0.001 to 1000000".into())
}

fn header_value(text: &str) -> Result<String, String> {
    let is_legal = |byte: u8| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\t');
    text.bytes().all(is_legal).then(|| text.to_owned()).ok_or_else(|| "expected printable ASCII characters".into())
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a number above 0 and at most 1".into()),
    }
}

fn graph_sizes(text: &str) -> Result<String, String> {
    let is_size = |word: &str| word.parse::<u32>().is_ok_and(|size| (1..=1024).contains(&size));
    let is_legal = text == "0" || text.split(',').all(is_size);
    is_legal.then(|| text.to_owned()).ok_or_else(|| "expected numbers from 1 to 1024 with commas between, or 0".into())
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse::<f64>().ok().filter(|value| value.is_finite()).ok_or_else(|| "expected a number".into())
}

/// The environment's names of `FOREIGN`, in order: clap keeps a reference to them.
static ENVIRONMENT_NAMES: LazyLock<Vec<String>> =
    LazyLock::new(|| FOREIGN.iter().map(|foreign| foreign.flag.replace('-', "_").to_uppercase()).collect());

/// The whole command line, foreign flags included.
pub fn command() -> clap::Command {
    FOREIGN.iter().zip(ENVIRONMENT_NAMES.iter()).fold(Args::command(), |command, (foreign, environment_name)| {
        let heading = if matches!(foreign.fate, Fate::Noticed(_)) { NO_EFFECT } else { NOT_SERVED };
        let mut arg = clap::Arg::new(foreign.flag)
            .long(foreign.flag)
            .env(environment_name.as_str())
            .value_name("VALUE")
            .hide_env_values(true)
            .allow_hyphen_values(foreign.values.is_empty())
            .hide(ENVIRONMENT_ONLY.contains(&foreign.flag))
            .action(ArgAction::Set)
            .help(sentence(foreign.why))
            .help_heading(heading);
        if foreign.values == SWITCH {
            arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true").hide_possible_values(true);
        } else if !foreign.values.is_empty() {
            arg = arg.value_parser(PossibleValuesParser::new(foreign.values)).hide_possible_values(true);
        }
        command.arg(arg)
    })
}

fn sentence(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).chain(['.']).collect()).unwrap_or_default()
}

/// Reads command line and environment. `commit`: what this was built from.
///
/// # Errors
///
/// What clap refuses (also `--help` and `--version`), a flag that is not served yet, a host name that is no address.
pub fn parse(
    argv: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    commit: Option<&str>,
) -> Result<Args, clap::Error> {
    let version = version(commit);
    let matches = command().version(version).mut_args(without_empty_variable).try_get_matches_from(argv)?;
    let mut args = Args::from_arg_matches(&matches)?;
    args.version = version;
    let (notices, refusals) = judge_foreign(&matches);
    if !refusals.is_empty() {
        return Err(usage(refusals.join("\n       ")));
    }
    args.notices = notices;
    if args.device == Device::Cpu {
        tell_of_gpus(&mut args, &matches);
    }
    if args.model_id.is_empty() || args.model_id.starts_with('-') {
        let found = &args.model_id;
        return Err(usage(format!("--model-id {found:?}: expected a directory or the name of a model on the hub")));
    }
    settle_hostname(&mut args, matches.value_source("hostname"))?;
    Ok(args)
}

/// A usage error (exit code 2) in clap's form.
pub fn usage(message: impl std::fmt::Display) -> clap::Error {
    command().error(ErrorKind::ValueValidation, message)
}

/// Notices and refusals for the foreign flags that were given.
fn judge_foreign(matches: &ArgMatches) -> (Vec<String>, Vec<String>) {
    let (mut notices, mut refusals) = (Vec::new(), Vec::new());
    for (foreign, environment_name) in FOREIGN.iter().zip(ENVIRONMENT_NAMES.iter()) {
        let Some(value) = matches.get_one::<String>(foreign.flag) else { continue };
        let from_environment = matches.value_source(foreign.flag) == Some(ValueSource::EnvVariable);
        // The value stays out of the message: it may be a secret.
        let name =
            if from_environment { format!("{environment_name} (environment)") } else { format!("--{}", foreign.flag) };
        match foreign.fate {
            Fate::Refused(unless) if !unless.contains(&value.as_str()) => {
                refusals.push(format!("{name} is not served yet: {}", foreign.why));
            }
            Fate::Noticed(unless) if !unless.contains(&value.as_str()) => {
                notices.push(format!("{name} has no effect: {}", foreign.why));
            }
            Fate::Refused(_) | Fate::Noticed(_) => {}
        }
    }
    (notices, refusals)
}

/// What is said of GPUs has no effect on processors, and does no harm: it stands in environments made for TGI.
fn tell_of_gpus(args: &mut Args, matches: &ArgMatches) {
    let graphs = args.cuda_graphs.take().is_some_and(|sizes| sizes != "0");
    let fraction = args.cuda_memory_fraction.take().is_some();
    for (given, flag, variable, why) in [
        (graphs, "cuda_graphs", "CUDA_GRAPHS", "processors have no graphs to record"),
        (
            fraction,
            "cuda_memory_fraction",
            "CUDA_MEMORY_FRACTION",
            "it is about GPUs; --memory-fraction is the share of this machine's memory",
        ),
    ] {
        if given {
            let from_environment = matches.value_source(flag) == Some(ValueSource::EnvVariable);
            let name = if from_environment {
                format!("{variable} (environment)")
            } else {
                format!("--{}", flag.replace('_', "-"))
            };
            args.notices.push(format!("{name} has no effect: {why}"));
        }
    }
}

/// Docker sets HOSTNAME to the container's name, which is no address to listen on; TGI takes 0.0.0.0 then.
fn settle_hostname(args: &mut Args, source: Option<ValueSource>) -> Result<(), clap::Error> {
    if args.hostname == "localhost" {
        args.hostname = "127.0.0.1".into();
    }
    if args.hostname.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    let found = std::mem::replace(&mut args.hostname, "0.0.0.0".into());
    if source != Some(ValueSource::EnvVariable) {
        return Err(usage(format!("--hostname {found:?}: expected an IP address to listen on, such as 0.0.0.0")));
    }
    args.notices.push(format!("HOSTNAME (environment) is {found:?}, no address to listen on; 0.0.0.0 is used"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(flags: &[&str]) -> Result<Args, clap::Error> {
        parse([&["launcher", "--model-id", "m"], flags].concat(), None)
    }

    fn refusal(flags: &[&str]) -> String {
        parsed(flags).unwrap_err().to_string()
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_tgi() {
        let args = parsed(&[]).unwrap();
        assert_eq!(
            (args.port, args.hostname.as_str(), args.max_concurrent_requests, args.max_stop_sequences),
            (3000, "0.0.0.0", 128, 4)
        );
        assert_eq!((args.payload_limit, args.validation_workers), (2_000_000, 2));
        assert_eq!(
            (args.graceful_termination_timeout, args.shard_uds_path.as_str()),
            (90.0, "/tmp/text-generation-server")
        );
    }

    #[test]
    fn a_flag_known_to_tgi_but_not_served_is_refused_by_name() {
        for (flags, name) in [
            (vec!["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype"),
            (vec!["--ngrok"], "--ngrok"),
            (vec!["--lora-adapters", "a,b"], "--lora-adapters"),
            (vec!["--rope-scaling", "linear"], "--rope-scaling"),
            (vec!["--ngrok-authtoken", "secret"], "--ngrok-authtoken"),
        ] {
            let message = refusal(&flags);
            assert!(message.contains(&format!("{name} is not served yet")), "{message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn every_method_of_tgi_is_a_value_of_quantize_under_its_own_name() {
        let names = [
            "awq",
            "compressed-tensors",
            "eetq",
            "exl2",
            "gptq",
            "marlin",
            "bitsandbytes",
            "bitsandbytes-nf4",
            "bitsandbytes-fp4",
            "fp8",
        ];
        for name in names {
            assert_eq!(parsed(&["--quantize", name]).unwrap().quantize.map(Quantize::name), Some(name));
        }
        let args = parsed(&["--gptq-bits", "4", "--gptq-groupsize", "-1"]).unwrap();
        assert_eq!((args.gptq_bits, args.gptq_groupsize), (Some(4), Some(-1)));
    }

    #[test]
    fn values_that_ask_for_what_happens_anyway_are_accepted() {
        let args = parsed(&["--speculate", "0", "--cuda-graphs", "0", "--usage-stats", "off"]).unwrap();
        assert_eq!(args.notices, Vec::<String>::new());
    }

    #[test]
    fn a_flag_without_effect_is_accepted_with_a_notice() {
        let args =
            parsed(&["--max-waiting-tokens", "20", "--disable-custom-kernels", "--prometheus-port", "9000"]).unwrap();
        assert_eq!(args.notices.len(), 3, "{:?}", args.notices);
        assert!(args.notices.iter().all(|notice| notice.contains("has no effect")));
        let expected = "--prometheus-port has no effect: metrics are on the main port, at /metrics";
        assert!(args.notices.iter().any(|notice| notice == expected), "{:?}", args.notices);
    }

    #[test]
    fn what_is_said_of_gpus_is_taken_there_and_noticed_on_processors() {
        let flags = ["--cuda-graphs", "1,8", "--cuda-memory-fraction", "0.8"];
        let args = parsed(&flags).unwrap();
        assert_eq!(args.notices.len(), 2, "{:?}", args.notices);
        assert!(args.notices[0].starts_with("--cuda-graphs has no effect: processors"), "{:?}", args.notices);
        assert_eq!((args.cuda_graphs, args.cuda_memory_fraction), (None, None));
        let args = parsed(&[&flags[..], &["--device", "cuda"]].concat()).unwrap();
        assert_eq!((args.cuda_graphs.as_deref(), args.cuda_memory_fraction), (Some("1,8"), Some(0.8)));
        assert_eq!(args.notices, Vec::<String>::new());
    }

    #[test]
    fn a_bad_value_is_refused_with_the_name_of_its_flag() {
        for (flag, value) in [
            ("--max-concurrent-requests", "abc"),
            ("--max-concurrent-requests", "0"),
            ("--max-concurrent-requests", "-1"),
            ("--validation-workers", "0"),
            ("--num-shard", "0"),
            ("--port", "0"),
            ("--port", "65536"),
            ("--memory-fraction", "1.5"),
            ("--memory-fraction", "nan"),
            ("--cuda-memory-fraction", "1.5"),
            ("--cuda-graphs", "1,-2"),
            ("--cuda-graphs", "1,0"),
            ("--cuda-graphs", ""),
            ("--cuda-graphs", "2000"),
            ("--graceful-termination-timeout", "0"),
            ("--step-timeout", "nan"),
            ("--hostname", "nonsense"),
            ("--compute-type", "2\n3"),
            ("--quantize", "int7"),
            ("--dtype", "int8"),
        ] {
            let error = parsed(&[flag, value]).unwrap_err();
            assert!(error.to_string().contains(flag), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn a_model_id_is_never_taken_for_a_flag_of_a_child() {
        let error = parse(["launcher", "--model-id=-h"], None).unwrap_err();
        assert!(error.to_string().contains("--model-id \"-h\""), "{error}");
    }
}
