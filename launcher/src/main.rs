//! Starts, watches and restarts the shards and the router.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use text_generation_launcher::logs::{Format, Output};
use text_generation_launcher::run::{self, Failure};
use text_generation_launcher::{args, logs, reaper};

/// What the end of the log is given to be written.
const FLUSH: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<ExitCode> {
    let argv: Vec<_> = std::env::args_os().collect();
    if let [_, word, directory] = argv.as_slice()
        && word == reaper::ARGUMENT
    {
        reaper::reap(Path::new(directory)).context("reaper")?;
        return Ok(ExitCode::SUCCESS);
    }
    let args = args::parse(argv).unwrap_or_else(|error| error.exit());
    let format = if args.json_output { Format::Json } else { Format::Text };
    let output = Output::start(format, std::io::stdout()).context("the log's thread cannot be started")?;
    logs::init(&output, &args.log_level).unwrap_or_else(|message| args::usage(message).exit());

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    let result = runtime.block_on(run::launch(&args, &output));
    runtime.shutdown_background();
    output.flush(FLUSH);
    match result {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(Failure::Usage(message)) => args::usage(message).exit(),
        Err(Failure::Failed(message)) => {
            if format == Format::Json {
                tracing::error!("{message}");
                output.flush(FLUSH);
            } else {
                eprintln!("Error: {message}");
            }
            Ok(ExitCode::FAILURE)
        }
    }
}
