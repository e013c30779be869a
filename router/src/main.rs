//! The router's program.

use std::process::ExitCode;

use mimalloc::MiMalloc;

// A request is some hundred small allocations, made and freed by several threads.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    // Here, so that a new commit compiles nothing but this file again.
    text_generation_router::entry::main(option_env!("GIT_COMMIT"))
}
