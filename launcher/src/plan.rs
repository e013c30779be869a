//! Decides what is started: arguments, machine and model in, command lines out. Pure.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use text_generation_router::args::{DEFAULT_BLOCK_SIZE, api_key};

use crate::args::{Args, Device, Dtype};
use crate::machine::Machine;

/// A program with its arguments.
#[derive(Clone, Eq, PartialEq)]
pub struct CommandLine {
    /// What is executed.
    pub program: PathBuf,
    /// Without the program's name.
    pub args: Vec<String>,
    /// Variables set beside the inherited environment.
    pub env: Vec<(&'static str, String)>,
    /// Variables taken out of the inherited environment.
    pub env_remove: Vec<&'static str>,
}

/// What goes into an environment may be secret.
impl std::fmt::Debug for CommandLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.env.iter().map(|(name, _)| *name).collect();
        f.debug_struct("CommandLine")
            .field("program", &self.program)
            .field("args", &self.args)
            .field("env", &names)
            .finish()
    }
}

impl CommandLine {
    fn new(program: &Path) -> Self {
        // The log level is given as an argument, to each program in its own words. Keys are the router's business alone.
        let env_remove = vec!["LOG_LEVEL", "API_KEY", "API_KEY_FILE"];
        Self { program: program.into(), args: Vec::new(), env: Vec::new(), env_remove }
    }

    fn word(&mut self, word: impl ToString) -> &mut Self {
        self.args.push(word.to_string());
        self
    }

    fn flag(&mut self, flag: &str, value: impl ToString) -> &mut Self {
        let value = value.to_string();
        // A value that looks like a flag would be taken for one.
        if value.starts_with('-') { self.word(format!("{flag}={value}")) } else { self.word(flag).word(value) }
    }

    fn optional(&mut self, flag: &str, value: Option<impl ToString>) -> &mut Self {
        match value {
            Some(value) => self.flag(flag, value),
            None => self,
        }
    }

    fn switch(&mut self, flag: &str, on: bool) -> &mut Self {
        if on { self.word(flag) } else { self }
    }
}

/// The programs that the launcher starts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Programs {
    /// `text-generation-server`
    pub server: PathBuf,
    /// `text-generation-router`
    pub router: PathBuf,
}

/// What `text-generation-server plan` says of a model, as far as the launcher uses it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct ModelPlan {
    /// The directory that holds the files.
    pub model_dir: PathBuf,
    /// As in `config.json`.
    #[serde(default)]
    pub architecture: Option<String>,
    /// Computed in.
    #[serde(default)]
    pub dtype: Option<String>,
    /// All weights.
    #[serde(default)]
    pub num_parameters: Option<u64>,
    /// What one rank holds of them.
    #[serde(default)]
    pub weight_bytes_per_rank: Option<u64>,
    /// The longest sequence that the positions allow.
    #[serde(default)]
    pub max_positions: Option<u32>,
}

/// What `text-generation-server devices` says of a GPU, as far as the launcher uses it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Gpu {
    /// For people.
    pub name: String,
    /// What nobody uses.
    pub free_bytes: u64,
    /// Whether it multiplies bfloat16.
    pub has_bfloat16: bool,
}

/// Why nothing is started.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The arguments contradict each other: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The model does not fit the arguments or the machine: exit code 1.
    #[error("{0}")]
    Model(String),
}

fn usage<T>(message: impl Into<String>) -> Result<T, PlanError> {
    Err(PlanError::Usage(message.into()))
}

/// How many shards the arguments ask for. None: as many as there are GPUs.
///
/// # Errors
///
/// When `--sharded` and `--num-shard` contradict each other.
pub fn num_shard(args: &Args) -> Result<Option<u32>, PlanError> {
    match (args.sharded, args.num_shard) {
        (Some(true), None) if args.device == Device::Cuda => Ok(None),
        (Some(true), None) => usage("--sharded true: on a CPU the number of shards must be said; add --num-shard N"),
        (Some(true), Some(1)) => usage("--sharded true --num-shard 1: expected at least 2 shards, or --sharded false"),
        (Some(false), Some(shards)) if shards > 1 => {
            usage(format!("--sharded false --num-shard {shards}: expected 1 shard, or --sharded true"))
        }
        (_, shards) => Ok(Some(shards.unwrap_or(1))),
    }
}

/// How many shards there will be. gpus: those that there are for them.
///
/// # Errors
///
/// As `num_shard`, and when there is one GPU where several were meant.
pub fn world_size(args: &Args, gpus: &[Gpu]) -> Result<u32, PlanError> {
    match num_shard(args)? {
        None if gpus.len() < 2 => Err(PlanError::Model(
            "--sharded true: one GPU is visible (see CUDA_VISIBLE_DEVICES); expected at least 2, or --sharded false"
                .into(),
        )),
        shards => Ok(shards.unwrap_or(gpus.len() as u32)),
    }
}

/// Checks what the arguments alone show.
///
/// # Errors
///
/// Names the two flags that contradict each other, what was found and what was expected.
pub fn check(args: &Args) -> Result<(), PlanError> {
    num_shard(args)?;
    if let (Some(one), Some(other)) = (args.cuda_memory_fraction, args.memory_fraction) {
        return usage(format!(
            "--cuda-memory-fraction {one} and --memory-fraction {other}: both name the same share; use one alone"
        ));
    }
    if let (Some(tokens), Some(length)) = (args.max_input_tokens, args.max_input_length) {
        return usage(format!(
            "--max-input-tokens {tokens} and --max-input-length {length}: both name the same limit; use the first alone"
        ));
    }
    for (n, key) in args.api_key.iter().enumerate() {
        // Here and not in the parser, which would show the key.
        api_key(key).map_err(|expected| PlanError::Usage(format!("--api-key, key {}: {expected}", n + 1)))?;
    }
    let input = ("--max-input-tokens", max_input_tokens(args));
    let total = ("--max-total-tokens", args.max_total_tokens);
    let batch_total = ("--max-batch-total-tokens", args.max_batch_total_tokens);
    let step = ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens);
    if args.max_total_tokens == Some(1) {
        return usage("--max-total-tokens 1: expected at least 2, one for the prompt and one for the answer");
    }
    less(input, total, "an answer needs at least one token")?;
    less(input, batch_total, "an answer needs at least one token")?;
    at_most(total, batch_total, "such a sequence would never fit")?;
    at_most(("--max-batch-size", args.max_batch_size), step, "a step has room for one token of every sequence")?;
    let by_default = DEFAULT_BLOCK_SIZE as u32;
    match args.block_size {
        Some(_) => at_most(("--block-size", args.block_size), batch_total, "the cache holds whole blocks"),
        None => at_most(("the default --block-size", Some(by_default)), batch_total, "the cache holds whole blocks"),
    }
}

/// Checks what the machine alone shows, before any program is started.
///
/// # Errors
///
/// When not even idle programs would have the processes and threads that they are made of.
pub fn check_machine(args: &Args, machine: &Machine) -> Result<(), PlanError> {
    // Of how many GPUs there are nothing is known yet: two at least.
    let shards = num_shard(args)?.unwrap_or(2);
    let needed = tasks_needed(shards, machine.cores);
    match machine.tasks {
        Some(tasks) if tasks < needed => Err(PlanError::Model(format!(
            "the limit of processes and threads (pids.max of the control group) lets this container start {tasks} more, and \
             {shards} shard{} on {} cores need {needed}; allow more: docker run --pids-limit 512, or TasksMax= of systemd",
            if shards == 1 { "" } else { "s" },
            machine.cores
        ))),
        _ => Ok(()),
    }
}

/// Counted where nothing is asked for: the launcher, what cleans up after it, the router (a thread for each core, and those
/// that tokenize); of each shard those of Python, gRPC and grammars, and those that compute. Answers take some more.
fn tasks_needed(shards: u32, cores: u32) -> u64 {
    let threads = (cores / shards).max(1);
    u64::from(14 + cores.min(8)) + u64::from(shards) * u64::from(14 + threads)
}

type Flag = (&'static str, Option<u32>);

fn less(smaller: Flag, larger: Flag, why: &str) -> Result<(), PlanError> {
    match (smaller, larger) {
        ((name, Some(value)), (other, Some(limit))) if value >= limit => {
            usage(format!("{name} {value} must be less than {other} {limit}: {why}"))
        }
        _ => Ok(()),
    }
}

fn at_most(smaller: Flag, larger: Flag, why: &str) -> Result<(), PlanError> {
    match (smaller, larger) {
        ((name, Some(value)), (other, Some(limit))) if value > limit => {
            usage(format!("{name} {value} must not exceed {other} {limit}: {why}"))
        }
        _ => Ok(()),
    }
}

fn max_input_tokens(args: &Args) -> Option<u32> {
    args.max_input_tokens.or(args.max_input_length)
}

/// What to run before anything else, to learn where a model from the hub lies.
pub fn download_command(args: &Args, programs: &Programs) -> CommandLine {
    let mut command = CommandLine::new(&programs.server);
    command.word("download-weights").word(&args.model_id).optional("--revision", args.revision.as_deref());
    command.switch("--trust-remote-code", args.trust_remote_code);
    command.env.extend(args.hf_api_token.iter().map(|token| ("HF_TOKEN", token.clone())));
    with_hub_cache(command, args)
}

/// What to run before anything else on GPUs, to learn which there are.
pub fn devices_command(args: &Args, programs: &Programs) -> Result<CommandLine, PlanError> {
    let mut command = CommandLine::new(&programs.server);
    command.word("devices").optional("--num-shard", num_shard(args)?);
    Ok(command)
}

/// The arguments, with the type that these GPUs multiply where none was asked for.
pub fn for_gpus(args: &Args, gpus: &[Gpu]) -> Args {
    let mut args = args.clone();
    if gpus.iter().any(|gpu| !gpu.has_bfloat16) {
        args.dtype = args.dtype.or(Some(Dtype::Float16));
    }
    args
}

/// What to run before ranks are spawned, to learn whether the model can be served at all.
pub fn preflight_command(args: &Args, programs: &Programs, model_dir: &Path, world_size: u32) -> CommandLine {
    let mut command = CommandLine::new(&programs.server);
    command.word("plan").word(model_dir.display()).flag("--num-shard", world_size);
    with_weights(&mut command, args);
    command.flag("--device", args.device.name()).word("--json");
    command
}

/// How weights are stored and computed with.
fn with_weights(command: &mut CommandLine, args: &Args) {
    command.optional("--dtype", args.dtype.map(crate::args::Dtype::name));
    command.optional("--quantize", args.quantize.map(crate::args::Quantize::name));
    command.optional("--gptq-bits", args.gptq_bits).optional("--gptq-groupsize", args.gptq_groupsize);
}

fn with_hub_cache(mut command: CommandLine, args: &Args) -> CommandLine {
    if let Some(cache) = &args.huggingface_hub_cache {
        command.env.push(("HF_HUB_CACHE", cache.clone()));
        command.env.push(("HUGGINGFACE_HUB_CACHE", cache.clone()));
    }
    command
}

/// Everything that is decided once and stays the same for every restart.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LaunchPlan {
    /// Ranks, each a process.
    pub world_size: u32,
    /// Threads that each rank computes with.
    pub threads_per_rank: u32,
    /// Memory that each rank may take for weights and cache.
    pub memory_bytes_per_rank: u64,
    /// How the router is started.
    pub router: CommandLine,
    /// Where the router answers, for people.
    pub url: String,
    /// How a rank is started, without its rank and socket.
    shard: CommandLine,
}

/// Decides what is started.
///
/// # Errors
///
/// When the model does not fit the arguments or the machine.
pub fn launch(
    args: &Args,
    (machine, gpus): (&Machine, &[Gpu]),
    model: &ModelPlan,
    programs: &Programs,
    sockets: (&Path, &Path),
) -> Result<LaunchPlan, PlanError> {
    let world_size = world_size(args, gpus)?;
    let threads_per_rank = (machine.cores / world_size).max(1);
    let memory_bytes_per_rank = memory_bytes_per_rank(args, machine, gpus, world_size);
    check_model(args, model, memory_bytes_per_rank)?;

    let mut shard = CommandLine::new(&programs.server);
    shard.word("serve").word(model.model_dir.display()).flag("--world-size", world_size);
    shard.flag("--num-threads", threads_per_rank).flag("--memory-bytes", memory_bytes_per_rank);
    with_weights(&mut shard, args);
    shard.optional("--revision", args.revision.as_deref()).switch("--trust-remote-code", args.trust_remote_code);
    shard.optional("--watermark-gamma", args.watermark_gamma).optional("--watermark-delta", args.watermark_delta);
    shard
        .optional("--cuda-graphs", args.cuda_graphs.as_deref())
        .flag("--device", args.device.name())
        .flag("--logger-level", logger_level(&args.log_level));
    shard.switch("--json-output", args.json_output).word("--exit-with-stdin");

    let host = if args.hostname.contains(':') { format!("[{}]", args.hostname) } else { args.hostname.clone() };
    Ok(LaunchPlan {
        world_size,
        threads_per_rank,
        memory_bytes_per_rank,
        router: router_command(args, model, programs, sockets),
        url: format!("http://{host}:{}", args.port),
        shard,
    })
}

impl LaunchPlan {
    /// How one process of a rank is started.
    pub fn shard(&self, rank: u32, socket: &Path) -> CommandLine {
        let mut command = self.shard.clone();
        command.flag("--rank", rank).flag("--uds-path", socket.display());
        command
    }

    /// What to run before ranks are spawned, to learn whether the router can use what it is to read.
    pub fn router_check(&self) -> CommandLine {
        let mut command = self.router.clone();
        command.word("--check");
        command
    }
}

/// The share of memory that was asked for, and the flag that says it.
fn memory_share(args: &Args) -> (&'static str, f64) {
    match (args.device, args.cuda_memory_fraction) {
        (_, Some(share)) => ("--cuda-memory-fraction", share),
        (Device::Cuda, None) => ("--memory-fraction", args.memory_fraction.unwrap_or(0.9)),
        (Device::Cpu, None) => ("--memory-fraction", args.memory_fraction.unwrap_or(0.5)),
    }
}

/// Ranks share this machine's memory, but each has a GPU of its own: then the one with the least counts.
fn memory_bytes_per_rank(args: &Args, machine: &Machine, gpus: &[Gpu], world_size: u32) -> u64 {
    let (_, share) = memory_share(args);
    match gpus.iter().map(|gpu| gpu.free_bytes).min() {
        Some(free) => (free as f64 * share) as u64,
        None => (machine.memory_bytes as f64 * share) as u64 / u64::from(world_size),
    }
}

fn check_model(args: &Args, model: &ModelPlan, memory_bytes_per_rank: u64) -> Result<(), PlanError> {
    if let (Some(total), Some(positions)) = (args.max_total_tokens, model.max_positions)
        && total > positions
    {
        return Err(PlanError::Model(format!(
            "--max-total-tokens {total} exceeds the {positions} positions of {}; use {positions} or less",
            model.model_dir.display()
        )));
    }
    if let (Some(input), Some(positions)) = (max_input_tokens(args), model.max_positions)
        && input >= positions
    {
        return Err(PlanError::Model(format!(
            "--max-input-tokens {input} and one token of the answer exceed the {positions} positions of {}; use {} or less",
            model.model_dir.display(),
            positions.saturating_sub(1)
        )));
    }
    if let Some(weights) = model.weight_bytes_per_rank.filter(|weights| *weights > memory_bytes_per_rank) {
        let (flag, share) = memory_share(args);
        let (of, instead) = match args.device {
            Device::Cpu => ("this machine, divided by its shards", "serve a smaller model"),
            Device::Cuda => ("what its GPU has free", "use more shards or a smaller model"),
        };
        return Err(PlanError::Model(format!(
            "{}: the weights take {} per shard, but each shard may take {} ({flag} {share} of {of}); raise {flag}, or \
             {instead}",
            model.model_dir.display(),
            bytes(weights),
            bytes(memory_bytes_per_rank),
        )));
    }
    Ok(())
}

fn router_command(
    args: &Args,
    model: &ModelPlan,
    programs: &Programs,
    (control, admin): (&Path, &Path),
) -> CommandLine {
    let mut router = CommandLine::new(&programs.router);
    router.flag("--tokenizer-name", model.model_dir.display()).flag("--model-id", &args.model_id);
    router.optional("--revision", args.revision.as_deref());
    router
        .flag("--control-socket", control.display())
        .flag("--admin-socket", admin.display())
        .word("--exit-with-stdin");
    router.flag("--hostname", &args.hostname).flag("--port", args.port);
    router.flag("--max-concurrent-requests", args.max_concurrent_requests);
    router.flag("--max-stop-sequences", args.max_stop_sequences).flag("--max-best-of", args.max_best_of);
    router.flag("--max-top-n-tokens", args.max_top_n_tokens);
    router.flag("--max-client-batch-size", args.max_client_batch_size);
    router.switch("--disable-grammar-support", args.disable_grammar_support);
    router.optional("--max-input-tokens", max_input_tokens(args));
    router.optional("--max-total-tokens", args.max_total_tokens);
    router.optional("--max-batch-prefill-tokens", args.max_batch_prefill_tokens);
    router.optional("--max-batch-total-tokens", args.max_batch_total_tokens);
    router.optional("--max-batch-size", args.max_batch_size).optional("--block-size", args.block_size);
    router.optional("--pipeline-depth", args.pipeline_depth);
    router.optional("--queue-timeout", args.queue_timeout).optional("--step-timeout", args.step_timeout);
    router.flag("--validation-workers", args.validation_workers).flag("--payload-limit", args.payload_limit);
    router.flag("--graceful-termination-timeout", args.graceful_termination_timeout);
    router.optional("--compute-type", args.compute_type.as_deref());
    router.optional("--chat-template", args.chat_template.as_deref());
    router.optional("--tokenizer-config-path", args.tokenizer_config_path.as_deref());
    router.optional("--api-key-file", args.api_key_file.as_deref());
    if !args.api_key.is_empty() {
        // Everybody may read the arguments of a process.
        router.env.push(("API_KEY", args.api_key.join("\n")));
        router.env_remove.retain(|name| *name != "API_KEY");
    }
    if let Some(endpoint) = &args.otlp_endpoint {
        router.flag("--otlp-endpoint", endpoint).flag("--otlp-service-name", &args.otlp_service_name);
    }
    for origin in &args.cors_allow_origin {
        router.flag("--cors-allow-origin", origin);
    }
    router.flag("--log-level", &args.log_level).switch("--json-output", args.json_output);
    router
}

/// The level of a Python logger nearest to the launcher's.
fn logger_level(filter: &str) -> &'static str {
    match filter.to_lowercase().as_str() {
        "error" => "ERROR",
        "warn" | "warning" => "WARNING",
        "debug" => "DEBUG",
        "trace" => "TRACE",
        _ => "INFO",
    }
}

/// A number of bytes for people.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

#[cfg(test)]
mod tests {
    use text_generation_router::args as router;

    use super::*;
    use crate::args::parse;

    fn args(flags: &str) -> Args {
        parse(["launcher", "--model-id", "models/m"].into_iter().chain(flags.split_whitespace()), None).unwrap()
    }

    fn machine() -> Machine {
        Machine { cores: 8, memory_bytes: 16_000_000, tasks: None, processor: String::new() }
    }

    fn model() -> ModelPlan {
        serde_json::from_str(
            r#"{"model_dir": "/m", "max_positions": 2048, "weight_bytes_per_rank": 3000000, "vocab_size": 7}"#,
        )
        .unwrap()
    }

    fn programs() -> Programs {
        Programs { server: "/bin/server".into(), router: "/bin/router".into() }
    }

    fn planned(flags: &str) -> Result<LaunchPlan, PlanError> {
        let args = args(flags);
        check(&args)?;
        launch(&args, (&machine(), &[]), &model(), &programs(), (Path::new("/r/control"), Path::new("/r/admin")))
    }

    fn gpu(free_bytes: u64, has_bfloat16: bool) -> Gpu {
        Gpu { name: String::new(), free_bytes, has_bfloat16 }
    }

    fn planned_on(gpus: &[Gpu], flags: &str) -> Result<LaunchPlan, PlanError> {
        let args = for_gpus(&args(&format!("--device cuda {flags}")), gpus);
        check(&args)?;
        launch(&args, (&machine(), gpus), &model(), &programs(), (Path::new("/r/control"), Path::new("/r/admin")))
    }

    #[test]
    fn on_gpus_each_shard_gets_a_share_of_what_the_fullest_has_free() {
        let gpus = [gpu(50_000_000, true), gpu(40_000_000, true)];
        let plan = planned_on(&gpus, "--num-shard 2").unwrap();
        assert_eq!((plan.world_size, plan.threads_per_rank, plan.memory_bytes_per_rank), (2, 4, 36_000_000));
        let shard = plan.shard(1, Path::new("/s"));
        assert!(shard.args.windows(2).any(|pair| pair == ["--device", "cuda"]), "{shard:?}");
        assert!(!shard.args.contains(&"--dtype".to_owned()));
        for flags in ["--cuda-memory-fraction 0.5", "--memory-fraction 0.5"] {
            assert_eq!(planned_on(&gpus[..1], flags).unwrap().memory_bytes_per_rank, 25_000_000);
        }
        assert_eq!(planned_on(&gpus, "--sharded true").unwrap().world_size, 2);
        let shard = planned_on(&gpus, "--cuda-graphs 1,2,64").unwrap().shard(0, Path::new("/s"));
        assert!(shard.args.windows(2).any(|pair| pair == ["--cuda-graphs", "1,2,64"]), "{shard:?}");
    }

    #[test]
    fn gpus_that_do_not_multiply_bfloat16_are_given_float16_unless_a_type_was_asked_for() {
        let gpus = [gpu(50_000_000, true), gpu(40_000_000, false)];
        let dtype = |flags| {
            let plan = planned_on(&gpus, flags).unwrap().shard(0, Path::new("/s")).args;
            plan[plan.iter().position(|word| word == "--dtype").unwrap() + 1].clone()
        };
        assert_eq!(dtype("--num-shard 2"), "float16");
        assert_eq!(dtype("--num-shard 2 --dtype bfloat16"), "bfloat16");
    }

    #[test]
    fn what_gpus_do_not_allow_is_refused_by_name() {
        let error = planned_on(&[gpu(1_000_000, true)], "--cuda-memory-fraction 0.5").unwrap_err();
        assert_eq!(error, PlanError::Model(
            "/m: the weights take 3.0 MB per shard, but each shard may take 500.0 kB (--cuda-memory-fraction 0.5 of what \
             its GPU has free); raise --cuda-memory-fraction, or use more shards or a smaller model".into()));
        let error = planned_on(&[gpu(50_000_000, true)], "--sharded true").unwrap_err();
        assert!(matches!(&error, PlanError::Model(message) if message.contains("one GPU is visible")), "{error}");
    }

    #[test]
    fn the_driver_is_asked_for_as_many_gpus_as_there_will_be_shards() {
        for (flags, words) in
            [("", "devices --num-shard 1"), ("--num-shard 4", "devices --num-shard 4"), ("--sharded true", "devices")]
        {
            let command = devices_command(&args(&format!("--device cuda {flags}")), &programs()).unwrap();
            assert_eq!(command.args, words.split(' ').collect::<Vec<_>>());
        }
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn by_default_one_shard_gets_all_cores_and_half_of_the_memory() {
        let shard = planned("").unwrap().shard(0, Path::new("/r/rank-0-1"));
        assert_eq!(shard.program, Path::new("/bin/server"));
        assert_eq!(
            shard.args,
            words(
                "serve /m --world-size 1 --num-threads 8 --memory-bytes 8000000 --device cpu --logger-level INFO \
                 --exit-with-stdin --rank 0 --uds-path /r/rank-0-1"
            )
        );
    }

    #[test]
    fn cores_and_memory_are_divided_by_the_shards() {
        let plan = planned("--num-shard 3 --memory-fraction 0.75").unwrap();
        assert_eq!((plan.world_size, plan.threads_per_rank, plan.memory_bytes_per_rank), (3, 2, 4_000_000));
    }

    #[test]
    fn more_shards_than_cores_get_a_thread_each() {
        assert_eq!(planned("--num-shard 16 --memory-fraction 1").unwrap_err(), PlanError::Model(
            "/m: the weights take 3.0 MB per shard, but each shard may take 1.0 MB (--memory-fraction 1 of this machine, \
             divided by its shards); raise --memory-fraction, or serve a smaller model".into()));
        let small = ModelPlan { weight_bytes_per_rank: Some(10), ..model() };
        let sockets = (Path::new("/r/control"), Path::new("/r/admin"));
        let plan = launch(&args("--num-shard 16"), (&machine(), &[]), &small, &programs(), sockets).unwrap();
        assert_eq!(plan.threads_per_rank, 1);
    }

    #[test]
    fn a_limit_of_processes_that_nothing_can_run_in_is_refused() {
        let check = |tasks, flags| check_machine(&args(flags), &Machine { tasks, ..machine() });
        let (one, two) = (22 + 22, 22 + 2 * 18);
        assert_eq!(check(None, "--num-shard 8"), Ok(()));
        assert_eq!((check(Some(one), ""), check(Some(two), "--num-shard 2")), (Ok(()), Ok(())));
        for (tasks, flags, words) in [
            (one - 1, "", "start 43 more, and 1 shard on 8 cores need 44"),
            (two - 1, "--num-shard 2", "start 57 more, and 2 shards on 8 cores need 58"),
        ] {
            let PlanError::Model(message) = check(Some(tasks), flags).unwrap_err() else { panic!("a usage error") };
            assert!(message.contains(words) && message.contains("--pids-limit"), "{message}");
        }
    }

    #[test]
    fn every_flag_of_the_shards_reaches_them() {
        let plan =
            planned("--dtype bfloat16 --quantize bitsandbytes-nf4 --revision main --trust-remote-code --json-output --log-level debug \
                     --watermark-gamma 0.25 --watermark-delta -1.5").unwrap();
        assert_eq!(
            plan.shard(0, Path::new("/s")).args,
            words(
                "serve /m --world-size 1 --num-threads 8 --memory-bytes 8000000 --dtype bfloat16 --quantize bitsandbytes-nf4 \
                 --revision main --trust-remote-code --watermark-gamma 0.25 --watermark-delta=-1.5 --device cpu --logger-level DEBUG \
                 --json-output --exit-with-stdin --rank 0 --uds-path /s"
            )
        );
    }

    #[test]
    fn by_default_the_router_gets_the_limits_of_tgi() {
        assert_eq!(
            planned("").unwrap().router.args,
            words(
                "--tokenizer-name /m --model-id models/m --control-socket /r/control --admin-socket /r/admin \
                 --exit-with-stdin --hostname 0.0.0.0 --port 3000 --max-concurrent-requests 128 \
                 --max-stop-sequences 4 --max-best-of 2 --max-top-n-tokens 5 --max-client-batch-size 4 --validation-workers 2 --payload-limit 2000000 --graceful-termination-timeout 90 \
                 --log-level info"
            )
        );
    }

    #[test]
    fn every_flag_of_the_router_reaches_it() {
        let plan = planned(
            "--revision r --hostname ::1 -p 8080 --max-concurrent-requests 9 --max-stop-sequences 2 --max-best-of 3 \
             --max-top-n-tokens 7 --max-client-batch-size 5 --chat-template t --tokenizer-config-path c --api-key k \
             --api-key l --api-key-file f --otlp-endpoint http://o --otlp-service-name s \
             --max-input-length 10 --max-total-tokens 20 --max-batch-prefill-tokens 30 --max-batch-total-tokens 40 \
             --max-batch-size 6 --block-size 8 --pipeline-depth 2 --queue-timeout 0.5 --step-timeout 60 --validation-workers 3 --payload-limit 70 -g 8 \
             --compute-type 2-a100 --cors-allow-origin a --cors-allow-origin b --log-level debug --json-output",
        )
        .unwrap();
        assert_eq!(plan.url, "http://[::1]:8080");
        assert_eq!(
            plan.router.args,
            words(
                "--tokenizer-name /m --model-id models/m --revision r --control-socket /r/control --admin-socket \
                 /r/admin --exit-with-stdin --hostname ::1 --port 8080 --max-concurrent-requests 9 \
                 --max-stop-sequences 2 --max-best-of 3 --max-top-n-tokens 7 --max-client-batch-size 5 --max-input-tokens 10 --max-total-tokens 20 --max-batch-prefill-tokens 30 \
                 --max-batch-total-tokens 40 --max-batch-size 6 --block-size 8 --pipeline-depth 2 --queue-timeout 0.5 --step-timeout 60 --validation-workers 3 --payload-limit 70 \
                 --graceful-termination-timeout 8 --compute-type 2-a100 --chat-template t --tokenizer-config-path c --api-key-file f --otlp-endpoint http://o \
                 --otlp-service-name s --cors-allow-origin a --cors-allow-origin b --log-level debug --json-output"
            )
        );
        assert_eq!(plan.router.env, [("API_KEY", "k\nl".to_owned())]);
        assert!(!plan.router.env_remove.contains(&"API_KEY") && !format!("{:?}", plan.router).contains("k\\nl"));
        assert!(plan.shard.env_remove.contains(&"API_KEY"), "no key reaches a shard");
    }

    #[test]
    fn the_preflight_asks_with_the_flags_that_change_the_answer() {
        let args = args("--dtype float32 --num-shard 2 --quantize gptq --gptq-bits 4 --gptq-groupsize -1");
        assert_eq!(
            preflight_command(&args, &programs(), Path::new("/m"), 2).args,
            words(
                "plan /m --num-shard 2 --dtype float32 --quantize gptq --gptq-bits 4 --gptq-groupsize=-1 --device cpu --json"
            )
        );
        let flags = "--revision v1 --huggingface-hub-cache /c --hf-api-token secret";
        let download = download_command(&super::tests::args(flags), &programs());
        assert_eq!(download.args, words("download-weights models/m --revision v1"));
        assert!(download.env.contains(&("HF_HUB_CACHE", "/c".into())));
        assert!(download.env.contains(&("HF_TOKEN", "secret".into())) && !format!("{download:?}").contains("secret"));
    }

    #[test]
    fn contradicting_arguments_are_usage_errors_that_name_the_flags() {
        for (flags, names) in [
            ("--sharded true", vec!["--sharded true", "--num-shard"]),
            ("--sharded true --num-shard 1", vec!["--sharded true", "--num-shard 1"]),
            ("--sharded false --num-shard 2", vec!["--sharded false", "--num-shard 2"]),
            (
                "--device cuda --cuda-memory-fraction 0.5 --memory-fraction 0.6",
                vec!["--cuda-memory-fraction 0.5", "--memory-fraction 0.6"],
            ),
            ("--max-input-tokens 10 --max-input-length 10", vec!["--max-input-tokens 10", "--max-input-length 10"]),
            ("--max-input-tokens 10 --max-total-tokens 5", vec!["--max-input-tokens 10", "--max-total-tokens 5"]),
            ("--max-input-tokens 10 --max-total-tokens 10", vec!["--max-input-tokens 10", "--max-total-tokens 10"]),
            ("--max-total-tokens 1", vec!["--max-total-tokens 1"]),
            (
                "--max-total-tokens 20 --max-batch-total-tokens 10",
                vec!["--max-total-tokens 20", "--max-batch-total-tokens 10"],
            ),
            ("--max-input-tokens 8 --max-batch-total-tokens 8", vec!["--max-input-tokens 8"]),
            ("--max-batch-size 9 --max-batch-prefill-tokens 8", vec!["--max-batch-size 9"]),
            ("--block-size 9 --max-batch-total-tokens 8", vec!["--block-size 9"]),
            ("--max-batch-total-tokens 10", vec!["--block-size 16", "default", "--max-batch-total-tokens 10"]),
            ("--api-key good --api-key=b\u{1}d", vec!["--api-key, key 2: expected a text without control characters"]),
        ] {
            match planned(flags) {
                Err(PlanError::Usage(message)) => {
                    assert!(names.iter().all(|name| message.contains(name)), "{flags}: {message}");
                    assert!(!message.contains("b\u{1}d"), "a key is shown");
                }
                other => panic!("{flags}: {other:?}"),
            }
        }
    }

    #[test]
    fn whatever_the_launcher_lets_pass_the_router_understands() {
        for flags in [
            "--max-batch-total-tokens 16",
            "--max-batch-total-tokens 1 --block-size 1",
            "--max-input-tokens 1 --max-total-tokens 2",
            "--revision=-r --compute-type=-c --cors-allow-origin=-o",
            "--log-level 3 --max-top-n-tokens 0 --graceful-termination-timeout 0.001 --queue-timeout 1e6",
            "--log-level INFO --max-stop-sequences 0 --payload-limit 1 --step-timeout 0.5 --pipeline-depth 4",
            "--log-level hyper=trace,info --hostname ::1 --port 65535 --block-size 1024 --max-batch-size 1",
        ] {
            use clap::Parser;
            let router = planned(flags).unwrap().router.args;
            let args = router::Args::try_parse_from(std::iter::once("router".to_owned()).chain(router));
            let args = args.unwrap_or_else(|error| panic!("{flags}: {error}"));
            assert_eq!(args.validate(), Ok(()), "{flags}");
            assert!(text_generation_router::telemetry::tracing::filter(&args.log_level).is_ok(), "{flags}");
        }
    }

    #[test]
    fn a_limit_beyond_the_positions_of_the_model_is_refused() {
        let error = planned("--max-total-tokens 2049").unwrap_err();
        assert!(matches!(&error, PlanError::Model(message) if message.contains("2049") && message.contains("2048")));
        assert!(planned("--max-total-tokens 2048").is_ok());
        let error = planned("--max-input-tokens 2048").unwrap_err();
        assert!(matches!(&error, PlanError::Model(message) if message.contains("--max-input-tokens 2048")));
        assert!(planned("--max-input-tokens 2047").is_ok());
    }

    #[test]
    fn bytes_are_written_for_people() {
        for (count, text) in [(0, "0 B"), (999, "999 B"), (13_600_000, "13.6 MB"), (2_500_000_000_000, "2.5 TB")] {
            assert_eq!(bytes(count), text);
        }
    }
}
