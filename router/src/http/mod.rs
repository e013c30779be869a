//! HTTP in front of the engine: an accept loop with deadlines, and one file for each family of routes.

mod app;
pub mod auth;
mod body;
mod connection;
mod docs;
mod entry;
mod error;
mod generate;
mod health;
mod openai;
mod page;
mod platforms;
mod sse;
mod streams;
mod ticket;
mod tokenize;
mod wire;

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderValue;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::net::TcpListener;

use crate::chat::ChatTemplate;
use crate::chat::answer::Dialect;
use crate::engine::{Engine, ModelFacts};
use crate::grammar::Judge;
use crate::telemetry::metrics::Exporter;
use crate::telemetry::requests::RequestMetrics;
use crate::telemetry::traces::Traces;
use crate::text::tokenizer::{Encode, TokenizerPool};

/// What the routes must know beside the engine.
#[derive(Clone, Debug)]
pub struct Config {
    /// How the served model is called.
    pub model_id: String,
    /// Its revision, where one was named.
    pub revision: Option<String>,
    /// The commit that this program was built from, where that is known.
    pub commit: Option<&'static str>,
    /// What the header `x-compute-type` says, if not the shards' device.
    pub compute_type: Option<HeaderValue>,
    /// Requests at once.
    pub max_concurrent_requests: usize,
    /// Candidates of which the best is answered.
    pub max_best_of: usize,
    /// Prompts of a request.
    pub max_client_batch_size: usize,
    /// Stop strings of a request.
    pub max_stop_sequences: usize,
    /// Most probable ids that a request may have reported beside each chosen one.
    pub max_top_n_tokens: u32,
    /// Whether answers may be bound to a form.
    pub has_grammars: bool,
    /// Threads that tokenize.
    pub validation_workers: usize,
    /// Bytes of a body.
    pub payload_limit: usize,
    /// Origins that browsers may call from; empty: any.
    pub cors_allow_origin: Vec<String>,
    /// How long clients may take.
    pub deadlines: Deadlines,
    /// The text of `/metrics`.
    pub metrics: Exporter,
    /// Where traces of requests go.
    pub traces: Traces,
    /// Turns messages into prompts.
    pub template: ChatTemplate,
    /// Who may call.
    pub api_keys: auth::ApiKeys,
}

impl Config {
    /// A server of this name with the limits that TGI has by default, open to anybody, for a model without a template.
    pub fn of(model_id: &str) -> Self {
        let template =
            ChatTemplate::new(vec![], serde_json::Map::new()).expect("there is no template that could be wrong");
        Self {
            model_id: model_id.into(),
            revision: None,
            commit: None,
            compute_type: None,
            max_concurrent_requests: 128,
            max_best_of: 2,
            max_client_batch_size: 4,
            max_stop_sequences: 4,
            max_top_n_tokens: 5,
            has_grammars: true,
            validation_workers: 2,
            payload_limit: 2_000_000,
            cors_allow_origin: vec![],
            deadlines: Deadlines::default(),
            metrics: Exporter::default(),
            traces: Traces::default(),
            template,
            api_keys: auth::ApiKeys::default(),
        }
    }
}

/// How long clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For the head of a request, from its first byte on; on a new connection, from the start.
    pub head: Duration,
    /// For the next request on a connection that is kept alive.
    pub idle: Duration,
    /// For the body of a request.
    pub body: Duration,
    /// To read anything at all of what is written to them.
    pub write: Duration,
    /// The server's own: a stream that waits for its next token is told at this interval that it is waited for.
    pub comment: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        // TGI comments after 15 s; who breaks off after 15 s without a byte has one by then.
        let [head, idle, body, write, comment] = [10, 75, 30, 30, 14].map(Duration::from_secs);
        Self { head, idle, body, write, comment }
    }
}

/// Everything that a handler needs. Cheap to clone: a request is handed several.
#[derive(Clone, Debug)]
pub(crate) struct State(Arc<Parts>);

impl Deref for State {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

#[derive(Debug)]
pub(crate) struct Parts {
    config: Arc<Config>,
    engine: Engine,
    tokenizer: Arc<dyn Encode>,
    pool: TokenizerPool,
    judge: Judge,
    template: ChatTemplate,
    /// What the template tells about the model's answers.
    dialect: Dialect,
    metrics: RequestMetrics,
}

impl State {
    /// The model, once it is known.
    fn model(&self) -> Option<Arc<ModelFacts>> {
        let model = self.engine.model()?;
        self.config.metrics.know(model.max_input_tokens, model.max_total_tokens);
        Some(model)
    }
}

/// Serves until `shutdown`, then lets open connections finish what they are answering.
pub fn serve(
    listener: TcpListener,
    config: Config,
    engine: Engine,
    tokenizer: Arc<dyn Encode>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> BoxFuture<'static, io::Result<()>> {
    serve_until(listener, config, engine, tokenizer, shutdown.boxed())
}

/// Without type parameters, so that it is compiled once and not by all who call it.
fn serve_until(
    listener: TcpListener,
    config: Config,
    engine: Engine,
    tokenizer: Arc<dyn Encode>,
    shutdown: BoxFuture<'static, ()>,
) -> BoxFuture<'static, io::Result<()>> {
    accept(listener, config, engine, tokenizer, shutdown).boxed()
}

async fn accept(
    listener: TcpListener,
    config: Config,
    engine: Engine,
    tokenizer: Arc<dyn Encode>,
    shutdown: BoxFuture<'static, ()>,
) -> io::Result<()> {
    let pool = TokenizerPool::new(&tokenizer, config.validation_workers)?;
    let judge = Judge::new()?;
    let deadlines = config.deadlines;
    let template = config.template.clone();
    let dialect = Dialect::detect(|mark| template.mentions(mark));
    let parts = Parts {
        config: Arc::new(config),
        engine,
        tokenizer,
        pool,
        judge,
        template,
        dialect,
        metrics: RequestMetrics::default(),
    };
    let app = app::App::new(State(Arc::new(parts)));
    connection::accept(listener, app, deadlines, shutdown).await
}
