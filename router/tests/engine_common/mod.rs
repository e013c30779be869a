//! What the tests of the engine share: a tokenizer, requests, and a client that checks what every stream promises.

#![allow(clippy::unwrap_used, dead_code)]

use std::path::Path;
use std::sync::{Arc, OnceLock};

use text_generation_router::engine::{Engine, FinishReason, GenerateError, TokenStream};
use text_generation_router::request::{Sampling, ValidRequest};
use text_generation_router::text::tokenizer::Tokenizer;

/// The tokenizer of a shipped model.
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
    Arc::clone(TOKENIZER.get_or_init(|| Arc::new(Tokenizer::from_file(&file).unwrap())))
}

/// A request whose prompt and sampling parameters follow from `seed`.
pub fn request(seed: u64, max_new_tokens: usize) -> ValidRequest {
    let num_prompt = 3 + seed % 40;
    let sampling = Sampling { do_sample: seed % 2 == 1, seed, ..Sampling::default() };
    let prompt_ids = (0..num_prompt).map(|i| 3 + ((seed + i * i) % 4000) as u32).collect();
    ValidRequest { prompt_ids, max_new_tokens, sampling, ..ValidRequest::default() }
}

/// What a client has seen of a whole stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub ids: Vec<u32>,
    pub texts: Vec<String>,
    pub text: String,
    pub reason: FinishReason,
}

/// Waits until requests are served.
pub async fn ready(engine: &Engine) {
    engine.status().wait_for(|status| status.is_ready).await.unwrap();
}

pub async fn submit(engine: &Engine, request: ValidRequest) -> TokenStream {
    engine.generate(request, engine.permit().unwrap()).await.unwrap()
}

/// Reads a stream to its end and checks it.
pub async fn read(mut stream: TokenStream) -> Result<Answer, GenerateError> {
    let (mut ids, mut texts, mut shown) = (vec![], vec![], String::new());
    loop {
        let output = stream.next().await.expect("a stream ends with a last output or an error")?;
        ids.push(output.token.id);
        assert!(output.started.is_some(), "a sequence with tokens was planned");
        if !output.token.special {
            shown.push_str(&output.token.text);
        }
        texts.push(output.token.text);
        if let Some(finished) = output.finished {
            assert_eq!(shown, finished.text, "the texts of the tokens are the text");
            assert_eq!(ids.len(), finished.num_tokens as usize);
            assert!(stream.next().await.is_none(), "nothing follows the last output");
            return Ok(Answer { ids, texts, text: finished.text, reason: finished.reason });
        }
    }
}

pub async fn generate(engine: &Engine, request: ValidRequest) -> Result<Answer, GenerateError> {
    read(submit(engine, request).await).await
}
