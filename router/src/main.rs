//! The router's program.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Here, so that a new commit compiles nothing but this file again.
    text_generation_router::entry::main(option_env!("GIT_COMMIT"))
}
