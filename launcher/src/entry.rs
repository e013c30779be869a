//! The launcher process: reads its arguments and ends with a meaningful code. It stands in the library, where it is compiled
//! once.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::logs::{Format, Output};
use crate::run::{self, Failure};
use crate::{args, logs, reaper};

/// What the end of the log is given to be written.
const FLUSH: Duration = Duration::from_secs(2);

/// All of it. `commit` is what the program was built from, where that is known.
pub fn main(commit: Option<&'static str>) -> ExitCode {
    let argv: Vec<_> = std::env::args_os().collect();
    if let [_, word, directory] = argv.as_slice()
        && word == reaper::ARGUMENT
    {
        return match reaper::reap(Path::new(directory)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("reaper: {error}")),
        };
    }
    let args = args::parse(argv, commit).unwrap_or_else(|error| error.exit());
    let format = if args.json_output { Format::Json } else { Format::Text };
    let output = match Output::start(format, std::io::stdout()) {
        Ok(output) => output,
        Err(error) => return fail(&format!("the log's thread cannot be started: {error}")),
    };
    logs::init(&output, &args.log_level).unwrap_or_else(|message| args::usage(message).exit());

    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("no runtime: {error}")),
    };
    let result = runtime.block_on(run::launch(&args, &output));
    runtime.shutdown_background();
    output.flush(FLUSH);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => args::usage(message).exit(),
        Err(Failure::Failed(message)) if format == Format::Json => {
            tracing::error!("{message}");
            output.flush(FLUSH);
            ExitCode::FAILURE
        }
        Err(Failure::Failed(message)) => fail(&message),
    }
}

/// The last word, in the form of every program here, and of clap for a wrong flag.
fn fail(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}
