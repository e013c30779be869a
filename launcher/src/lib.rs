//! Starts, watches and restarts the shards and the router.
//!
//! Two pure parts decide: `plan` turns arguments and machine into the commands to run, `supervisor` turns what happens
//! into what to do. The rest is a thin shell around them: processes, pipes, sockets, signals.
//!
//! The launcher is the only process that spawns and kills, and it kills only what it spawned.

pub mod args;
pub mod control;
pub mod entry;
pub mod events;
pub mod health;
pub mod logs;
pub mod losses;
pub mod machine;
pub mod plan;
pub mod process;
pub mod reaper;
pub mod run;
pub mod run_directory;
pub mod supervisor;
pub mod watch;
