//! The router: HTTP in front, shards behind, and between them a loop that batches continuously.
//!
//! A request becomes tokens over two channels and one stream:
//!
//! ```text
//! http ─▶ text (tokenize) ─▶ Engine::generate ─▶ driver: Scheduler::plan ─▶ Shards ─▶ Scheduler::commit
//!      ◀─────────────────── TokenStream ◀─── detokenize, stop strings ◀──────────────┘
//! ```

pub mod admin;
pub mod args;
pub mod chat;
pub mod control;
pub mod engine;
pub mod entry;
pub mod grammar;
pub mod http;
pub mod request;
pub mod shards;
pub mod telemetry;
pub mod text;
