//! The router's program.

use std::process::ExitCode;

fn main() -> ExitCode {
    text_generation_router::entry::main()
}
