//! HTTP in front of the engine: an accept loop with deadlines, and one file for each family of routes.

mod app;
mod connection;
mod error;
mod generate;
mod health;
mod sse;

use std::sync::Arc;

use tokio::net::TcpListener;

use crate::engine::Engine;
use crate::telemetry::metrics::Rendered;
use crate::text::tokenizer::{Tokenizer, TokenizerPool};

/// What the routes must know beside the engine.
#[derive(Clone, Debug)]
pub struct Config {
    /// How the served model is called.
    pub model_id: String,
    /// Its revision, where one was named.
    pub revision: Option<String>,
    /// Requests at once.
    pub max_concurrent_requests: usize,
    /// Stop strings of a request.
    pub max_stop_sequences: usize,
    /// Most probable ids that a request may have reported beside each chosen one.
    pub max_top_n_tokens: u32,
    /// Threads that tokenize.
    pub validation_workers: usize,
    /// Bytes of a body.
    pub payload_limit: usize,
    /// Origins that browsers may call from; empty: any.
    pub cors_allow_origin: Vec<String>,
    /// The text of `/metrics`.
    pub metrics: Rendered,
}

/// Everything that a handler needs. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct State {
    config: Arc<Config>,
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    pool: TokenizerPool,
}

/// Serves until `shutdown`, then lets open connections finish what they are answering.
pub async fn serve(
    listener: TcpListener,
    config: Config,
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let pool = TokenizerPool::new(Arc::clone(&tokenizer), config.validation_workers);
    let app = app::router(State { config: Arc::new(config), engine, tokenizer, pool });
    connection::accept(listener, app, shutdown).await
}
