//! Decides what every step computes and which KV-cache blocks it uses.
//!
//! This crate is a state machine: it performs no I/O, reads no clock, draws no random numbers and spawns nothing. The
//! same calls in the same order always give the same plans, which is what lets `tests/simulation.rs` repeat any failure
//! from a seed. Time enters only as an argument of [`Scheduler::expire`].
//!
//! ```text
//!  add ──▶ waiting ──plan──▶ running ──commit──▶ finished
//!             ▲                 │
//!             ├── preempted ────┤           abort: from anywhere
//!             └── lose_shards ──┘           a row already sent goes on to its commit and is dropped there
//! ```
//!
//! It never names a position or an input token of a running sequence, never sees a tensor, and never judges text: stop
//! strings end a sequence by [`Scheduler::abort`].

mod blocks;
mod planted;
mod scheduler;
mod sequence;
mod step;

pub use blocks::{BlockId, Namespace};
#[cfg(feature = "planted-bugs")]
pub use planted::Bug;
pub use scheduler::{Limits, Rejected, Scheduler, Stats};
pub use sequence::{FinishReason, Millis, Request, SequenceId, TokenId};
pub use step::{Admission, Event, Extent, RowError, RowId, RowResult, ShardFault, StepPlan, StepResult, Work};
