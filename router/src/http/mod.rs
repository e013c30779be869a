//! http

use std::sync::Arc;

use tokio::net::TcpListener;

use crate::args::Args;
use crate::engine::Engine;
use crate::text::tokenizer::Tokenizer;

/// Placeholder.
pub async fn serve(
    _listener: TcpListener,
    _args: Arc<Args>,
    _engine: Engine,
    _tokenizer: Arc<Tokenizer>,
    shutdown: impl Future<Output = ()>,
) -> std::io::Result<()> {
    shutdown.await;
    Ok(())
}
