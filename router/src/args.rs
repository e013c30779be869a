//! Command line of the router: TGI's flags as far as they are served, and what the launcher passes on.
//!
//! Every flag is also an environment variable of the same name in upper snake case, read by the argument parser alone.
//! What can be judged without the model is judged here; `engine::limits` judges the rest.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use axum::http::{HeaderValue, Uri};
use clap::builder::BoolishValueParser;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};

/// Batches requests continuously and sends them, step by step, to the shards of one model.
#[derive(Clone, Debug, Parser)]
#[command(name = "text-generation-router", version)]
pub struct Args {
    /// Directory that holds `tokenizer.json`.
    #[arg(long, env, value_name = "DIR")]
    pub tokenizer_name: PathBuf,

    /// Name of the model, as told to clients.
    #[arg(long, env)]
    pub model_id: String,

    /// Revision of the model, as told to clients.
    #[arg(long, env)]
    pub revision: Option<String>,

    /// Unix socket on which the launcher listens; it names the shards.
    #[arg(long, env, value_name = "SOCKET")]
    pub control_socket: PathBuf,

    /// Unix socket to listen on for `GET /state`: blocks, permits, queue and ranks, for operators and tests.
    #[arg(long, env, value_name = "SOCKET")]
    pub admin_socket: Option<PathBuf>,

    /// IP address to listen on. As in TGI, a value that is none (containers set HOSTNAME) means all addresses.
    #[arg(long, env, default_value = "0.0.0.0")]
    pub hostname: String,

    /// Port to listen on.
    #[arg(short, long, env, default_value_t = 3000)]
    pub port: u16,

    /// What clients may ask for.
    #[command(flatten)]
    pub limits: RequestLimits,

    /// What a step may hold.
    #[command(flatten)]
    pub batch: BatchLimits,

    /// What the answers' header `x-compute-type` says; by default the device of the shards, and `+optimized`.
    #[arg(long, env, value_parser = header_value)]
    pub compute_type: Option<HeaderValue>,

    /// Threads that tokenize prompts; half as many more tokenize long ones, which short ones need not wait for.
    #[arg(long, env, default_value_t = 2, value_parser = at_least_one)]
    pub validation_workers: usize,

    /// A chat template to use instead of the model's own: a file of Jinja, or JSON with `chat_template`.
    #[arg(long, env, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,

    /// A file to read in place of the model's `tokenizer_config.json`: its chat template and special tokens.
    #[arg(long, env, value_name = "FILE")]
    pub tokenizer_config_path: Option<PathBuf>,

    /// A key that clients must send as `Authorization: Bearer KEY`; may be repeated. Whoever may list processes sees it
    /// here: prefer the environment or the file. Without any key, anybody may call.
    #[arg(long, env, value_delimiter = '\n', hide_env_values = true, value_parser = api_key)]
    pub api_key: Vec<String>,

    /// A file of further keys, one a line; lines that begin with # are comments.
    #[arg(long, env, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Origins that browsers may call from; any, if none is given.
    #[arg(long, env)]
    pub cors_allow_origin: Vec<String>,

    /// Steps sent to the shards before the result of the first of them is known.
    #[arg(long, env, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub pipeline_depth: u8,

    /// Seconds that a request may wait for its first step before it is refused; for ever, if not given.
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds)]
    pub queue_timeout: Option<Duration>,

    /// Seconds after which a step without an answer is a fault of the shards.
    #[arg(long, env, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub step_timeout: Duration,

    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(short, long, env, value_name = "SECONDS", default_value = "90", value_parser = any_seconds)]
    pub graceful_termination_timeout: Duration,

    /// Where traces are sent to, by OTLP over gRPC, such as `http://localhost:4317`; nowhere, if not given.
    #[arg(long, env, value_name = "URL", value_parser = endpoint)]
    pub otlp_endpoint: Option<String>,

    /// What traces call this server.
    #[arg(long, env, default_value = "text-generation-inference.router")]
    pub otlp_service_name: String,

    /// error, warn, info, debug, trace, or a filter in the syntax of the tracing-subscriber crate.
    #[arg(long, env, default_value = "info")]
    pub log_level: String,

    /// Write logs as JSON, one object per line.
    #[arg(long, env, action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    pub json_output: bool,

    /// End at once when standard input is closed: whoever started the router is gone.
    #[arg(long, env, action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    pub exit_with_stdin: bool,

    /// Read the files that the other flags name, say what is wrong with them, and end: with code 0 if nothing is.
    #[arg(long, action = ArgAction::SetTrue)]
    pub check: bool,

    /// For tests of crashes: a file that tells this process when to kill itself.
    #[arg(long, env = "ROUTER_FAULT_FILE", hide = true)]
    pub fault_file: Option<PathBuf>,

    /// What this program was built from.
    #[arg(skip)]
    pub commit: Option<&'static str>,
}

/// What clients may ask for.
#[derive(Clone, Debug, clap::Args)]
pub struct RequestLimits {
    /// Requests that wait or run at once; further ones are refused with 429.
    #[arg(long, env, default_value_t = 128, value_parser = at_least_one)]
    pub max_concurrent_requests: usize,

    /// Candidates that one request may have generated to be answered the best of them.
    #[arg(long, env, default_value_t = 2, value_parser = at_least_one)]
    pub max_best_of: usize,

    /// Prompts of one request.
    #[arg(long, env, default_value_t = 4, value_parser = at_least_one)]
    pub max_client_batch_size: usize,

    /// Stop strings of one request.
    #[arg(long, env, default_value_t = 4)]
    pub max_stop_sequences: usize,

    /// Most probable ids that a request may have reported beside each chosen one.
    #[arg(long, env, default_value_t = 5)]
    pub max_top_n_tokens: u32,

    /// Tokens of a prompt; one less than `max-total-tokens`, if not given.
    #[arg(long, env, value_parser = at_least_one)]
    pub max_input_tokens: Option<usize>,

    /// Tokens of a prompt and its answer; what the model's positions and the memory allow, if not given.
    #[arg(long, env, value_parser = at_least_two)]
    pub max_total_tokens: Option<usize>,

    /// Refuse every request whose answer is to have a given form.
    #[arg(long, env, action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    pub disable_grammar_support: bool,

    /// Bytes of a request's body.
    #[arg(long, env, default_value_t = 2_000_000, value_parser = at_least_one)]
    pub payload_limit: usize,
}

/// What a step may hold.
#[derive(Clone, Debug, clap::Args)]
pub struct BatchLimits {
    /// Input tokens of one step. By default the smaller of 4096 (on CPU 512) and the model's positions, but at least one
    /// for each running sequence.
    #[arg(long, env, value_parser = at_least_one)]
    pub max_batch_prefill_tokens: Option<usize>,

    /// Tokens that the KV cache holds, over all sequences; what the memory allows, if not given.
    #[arg(long, env, value_parser = at_least_one)]
    pub max_batch_total_tokens: Option<usize>,

    /// Sequences that run at once; by default as many as requests are served at once.
    #[arg(long, env, value_parser = at_least_one)]
    pub max_batch_size: Option<usize>,

    /// Tokens per block of the KV cache.
    #[arg(long, env, default_value_t = DEFAULT_BLOCK_SIZE, value_parser = block_size)]
    pub block_size: usize,
}

/// Tokens per block of the KV cache.
pub const DEFAULT_BLOCK_SIZE: usize = 16;
/// Of a file of keys.
const MAX_KEY_FILE_BYTES: u64 = 1 << 20;

/// Two flags contradict each other.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("--{smaller} {smaller_value} must be {relation} --{larger} {larger_value}")]
pub struct Contradiction {
    smaller: &'static str,
    smaller_value: usize,
    relation: &'static str,
    larger: &'static str,
    larger_value: usize,
}

/// The file of keys cannot be used.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("--api-key-file {path}: {reason}")]
pub struct KeyFileError {
    path: PathBuf,
    reason: String,
}

/// Number and commit of a build, for clap, which wants to keep it: to be called once in a process.
pub fn version(commit: Option<&str>) -> &'static str {
    let number = env!("CARGO_PKG_VERSION");
    match commit.filter(|commit| !commit.is_empty()) {
        Some(commit) => format!("{number} ({commit})").leak(),
        None => number,
    }
}

/// Container templates set variables to nothing where they mean to leave them out.
pub fn without_empty_variable(arg: clap::Arg) -> clap::Arg {
    let is_empty = arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    if is_empty { arg.env(None::<&str>) } else { arg }
}

impl Args {
    /// Reads command line and environment, or ends the process with what clap says.
    pub fn parse_with(commit: Option<&'static str>) -> Self {
        let matches = Self::command().version(version(commit)).mut_args(without_empty_variable).get_matches();
        Self { commit, ..Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()) }
    }

    /// Where to listen.
    pub fn address(&self) -> SocketAddr {
        let ip = self.hostname.parse().unwrap_or_else(|_| {
            tracing::warn!(hostname = self.hostname, "not an IP address; listening on 0.0.0.0");
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        });
        SocketAddr::new(ip, self.port)
    }

    /// All keys that clients may send.
    pub fn api_keys(&self) -> Result<Vec<String>, KeyFileError> {
        let mut keys = self.api_key.clone();
        let Some(path) = &self.api_key_file else { return Ok(keys) };
        let error = |reason: String| KeyFileError { path: path.clone(), reason };
        let expected = "expected a file of keys, one a line; lines that begin with # are comments";
        let unreadable = |cause: std::io::Error| error(format!("cannot be read: {cause}; {expected}"));
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        // Every start of the router reads it; a pipe has it but once.
        if !metadata.is_file() {
            return Err(error(format!("is no regular file; {expected}")));
        }
        if metadata.len() > MAX_KEY_FILE_BYTES {
            return Err(error(format!(
                "has {} bytes, of which {MAX_KEY_FILE_BYTES} are allowed; {expected}",
                metadata.len()
            )));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        // Some editors begin a file with a byte order mark.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let lines = text.lines().map(str::trim).enumerate();
        for (n, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            keys.push(api_key(line).map_err(|expected| error(format!("line {}: {expected}", n + 1)))?);
        }
        if keys.is_empty() { Err(error(format!("has no key; {expected}"))) } else { Ok(keys) }
    }

    /// Refuses flags that contradict each other.
    pub fn validate(&self) -> Result<(), Contradiction> {
        let (limits, batch) = (&self.limits, &self.batch);
        let input = ("max-input-tokens", limits.max_input_tokens);
        let total = ("max-total-tokens", limits.max_total_tokens);
        let batch_total = ("max-batch-total-tokens", batch.max_batch_total_tokens);
        let size = ("max-batch-size", batch.max_batch_size);
        let step = ("max-batch-prefill-tokens", batch.max_batch_prefill_tokens);
        ordered(input, "less than", total)?;
        ordered(total, "at most", batch_total)?;
        ordered(input, "less than", batch_total)?;
        // A step has room for one token of every running sequence, or the youngest would starve.
        ordered(size, "at most", step)?;
        ordered(("block-size", Some(batch.block_size)), "at most", batch_total)
    }
}

type Flag = (&'static str, Option<usize>);

fn ordered(smaller: Flag, relation: &'static str, larger: Flag) -> Result<(), Contradiction> {
    let (Some(smaller_value), Some(larger_value)) = (smaller.1, larger.1) else { return Ok(()) };
    let is_ordered = if relation == "at most" { smaller_value <= larger_value } else { smaller_value < larger_value };
    let contradiction = Contradiction { smaller: smaller.0, smaller_value, relation, larger: larger.0, larger_value };
    if is_ordered { Ok(()) } else { Err(contradiction) }
}

/// No count of tokens, bytes or sequences is larger; sums of them fit in every type they are sent in.
const MAX_COUNT: usize = u32::MAX as usize / 4;

fn count(text: &str, min: usize, max: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        _ => Err(format!("expected a whole number from {min} to {max}")),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    count(text, 1, MAX_COUNT)
}

fn at_least_two(text: &str) -> Result<usize, String> {
    count(text, 2, MAX_COUNT)
}

fn block_size(text: &str) -> Result<usize, String> {
    count(text, 1, 1024)
}

/// A key as it can stand in a header: some bytes, none of which is a control character, no space at its ends.
///
/// # Errors
///
/// What is expected instead; never the key.
pub fn api_key(text: &str) -> Result<String, String> {
    let is_fit = !text.is_empty() && text.trim() == text && HeaderValue::from_bytes(text.as_bytes()).is_ok();
    if is_fit { Ok(text.into()) } else { Err("expected a text without control characters or space at its ends".into()) }
}

fn header_value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|_| "expected characters that may stand in an HTTP header".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..=1e6).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds from 0.001 to 1000000".into())
}

/// An address that traces can be sent to.
///
/// # Errors
///
/// What is expected instead.
pub fn endpoint(text: &str) -> Result<String, String> {
    let is_served = text.parse::<Uri>().is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some());
    let expected = "expected http://HOST:PORT of a collector that takes OTLP over gRPC; https is not spoken";
    if is_served { Ok(text.to_owned()) } else { Err(expected.into()) }
}

fn any_seconds(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { seconds(text) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(flags: &str) -> Result<Args, String> {
        let always = ["router", "--tokenizer-name", "m", "--model-id", "m", "--control-socket", "c"];
        let args = Args::try_parse_from(always.into_iter().chain(flags.split_whitespace()));
        let args = args.map_err(|error| error.to_string())?;
        args.validate().map_err(|error| error.to_string())?;
        Ok(args)
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_tgi() {
        let args = parse("").unwrap();
        assert_eq!((args.limits.max_concurrent_requests, args.limits.max_stop_sequences), (128, 4));
        assert_eq!((args.limits.payload_limit, args.validation_workers, args.port), (2_000_000, 2, 3000));
        assert_eq!((args.pipeline_depth, args.step_timeout.as_secs(), args.batch.block_size), (2, 60, 16));
        assert_eq!(args.graceful_termination_timeout.as_secs(), 90);
    }

    #[test]
    fn keys_come_from_flags_and_a_file() {
        let path = std::env::temp_dir().join(format!("api-keys-{}", std::process::id()));
        std::fs::write(&path, "\u{feff}c\r\n# one that is gone: e\n\n d \n").unwrap();
        let args = parse(&format!("--api-key a --api-key b --api-key-file {}", path.display())).unwrap();
        assert_eq!(args.api_keys().unwrap(), ["a", "b", "c", "d"]);
        std::fs::write(&path, "\n").unwrap();
        let error = parse(&format!("--api-key-file {}", path.display())).unwrap().api_keys().unwrap_err().to_string();
        assert!(error.contains("has no key"), "{error}");
        std::fs::File::create(&path).unwrap().set_len(MAX_KEY_FILE_BYTES + 1).unwrap();
        let error = parse(&format!("--api-key-file {}", path.display())).unwrap().api_keys().unwrap_err().to_string();
        assert!(error.contains("has 1048577 bytes"), "{error}");
        std::fs::write(&path, "a\nb\u{7}c\n").unwrap();
        let error = parse(&format!("--api-key-file {}", path.display())).unwrap().api_keys().unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        std::fs::remove_file(&path).unwrap();
        for (path, reason) in [("no/such", "cannot be read"), ("/dev/null", "is no regular file")] {
            let error = parse(&format!("--api-key-file {path}")).unwrap().api_keys().unwrap_err().to_string();
            assert!(error.starts_with(&format!("--api-key-file {path}: {reason}")), "{error}");
        }
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_the_name_of_its_flag() {
        let check = |flags: &str, expected: &str| {
            let error = parse(flags).unwrap_err();
            assert!(error.contains(expected), "{flags}: {error}");
        };
        check("--max-concurrent-requests abc", "--max-concurrent-requests");
        check("--max-concurrent-requests 0", "--max-concurrent-requests");
        check("--max-concurrent-requests=-1", "--max-concurrent-requests");
        check("--validation-workers 0", "--validation-workers");
        check("--max-batch-size 0", "--max-batch-size");
        check("--pipeline-depth 5", "--pipeline-depth");
        check("--block-size 0", "--block-size");
        check("--step-timeout nan", "--step-timeout");
        check("--max-total-tokens 1", "--max-total-tokens");
        check("--compute-type=\u{7}", "--compute-type");
        check(
            "--max-input-tokens 10 --max-total-tokens 5",
            "--max-input-tokens 10 must be less than --max-total-tokens 5",
        );
        check("--max-total-tokens 9 --max-batch-total-tokens 8", "--max-total-tokens 9 must be at most");
        check("--max-batch-size 9 --max-batch-prefill-tokens 8", "--max-batch-size 9 must be at most");
        check("--api-key=", "--api-key");
    }
}
