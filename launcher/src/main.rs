//! The launcher's program.

use std::process::ExitCode;

fn main() -> ExitCode {
    text_generation_launcher::entry::main()
}
