//! `tokenizer.json`, read by the `tokenizers` library, and a bounded pool of threads that encode with it.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::{mpsc, oneshot};

/// Texts that wait for a thread, beyond one for each.
const MAX_WAITING: usize = 64;

/// Why a tokenizer, or a text, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing or is not a tokenizer.
    #[error("{path}: cannot be read as a tokenizer: {reason}; expected the tokenizer.json of the model")]
    File {
        /// Which.
        path: PathBuf,
        /// What the library says.
        reason: String,
    },
    /// The library refuses the text.
    #[error("the text cannot be tokenized: {0}")]
    Text(String),
    /// The library panicked on the text.
    #[error("the tokenizer failed on this text")]
    Panicked,
    /// The pool has ended.
    #[error("the server is shutting down")]
    Ended,
}

/// A model's tokenizer. Cheap to share, behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    max_token_bytes: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let file = |reason: String| TokenizerError::File { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| file(error.to_string()))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| file(error.to_string()))?;
        Ok(Self::new(inner))
    }

    fn new(mut inner: tokenizers::Tokenizer) -> Self {
        // Lengths are the request's business, not the file's.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let special =
            inner.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        // A character of the vocabulary's own spelling stands for at least one byte of text.
        let longest = inner.get_vocab(true).keys().map(|token| token.len()).max();
        Self { inner, special, max_token_bytes: longest.unwrap_or(1).max(1) }
    }

    /// The ids of a text, with the special tokens that the model expects around it if `add_special`.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| TokenizerError::Text(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some ids; what no bytes of theirs spell is U+FFFD.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// The text of one id alone.
    pub fn decode_one(&self, id: u32) -> String {
        self.decode(&[id], false)
    }

    /// Whether an id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Ids, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// No token spells more bytes of text than this.
    pub fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }
}

/// A text on its way to a thread.
struct Job {
    text: String,
    reply: oneshot::Sender<Result<Vec<u32>, TokenizerError>>,
}

/// Threads that encode. A text that makes the library panic fails alone.
#[derive(Clone, Debug)]
pub struct TokenizerPool {
    jobs: mpsc::Sender<Job>,
}

impl TokenizerPool {
    /// A pool of that many threads.
    pub fn new(tokenizer: Arc<Tokenizer>, num_threads: usize) -> Self {
        Self::with_encoder(num_threads, move |text| tokenizer.encode(text, true))
    }

    /// A pool that encodes with `encode`.
    fn with_encoder(
        num_threads: usize,
        encode: impl Fn(&str) -> Result<Vec<u32>, TokenizerError> + Clone + Send + 'static,
    ) -> Self {
        let (jobs, waiting) = mpsc::channel(MAX_WAITING);
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..num_threads {
            let (waiting, encode) = (Arc::clone(&waiting), encode.clone());
            std::thread::spawn(move || work(&waiting, encode));
        }
        Self { jobs }
    }

    /// The ids of a text, special tokens included. Waits for a thread; a caller that is gone by then costs nothing.
    pub async fn encode(&self, text: String) -> Result<Vec<u32>, TokenizerError> {
        let (reply, ids) = oneshot::channel();
        self.jobs.send(Job { text, reply }).await.map_err(|_| TokenizerError::Ended)?;
        ids.await.map_err(|_| TokenizerError::Ended)?
    }
}

fn work(waiting: &Mutex<mpsc::Receiver<Job>>, encode: impl Fn(&str) -> Result<Vec<u32>, TokenizerError>) {
    loop {
        let next = waiting.lock().expect("nothing panics while it holds the lock").blocking_recv();
        let Some(job) = next else { return };
        if job.reply.is_closed() {
            continue;
        }
        let ids = catch_unwind(AssertUnwindSafe(|| encode(&job.text))).unwrap_or(Err(TokenizerError::Panicked));
        // Whoever asked may be gone.
        let _ = job.reply.send(ids);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
        Tokenizer::from_file(&path).unwrap()
    }

    #[test]
    fn ids_equal_those_recorded_by_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/reference.json");
        let reference: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for case in reference["greedy"].as_array().unwrap() {
            let expected: Vec<u32> = serde_json::from_value(case["prompt_ids"].clone()).unwrap();
            assert_eq!(shipped().encode(case["prompt"].as_str().unwrap(), true).unwrap(), expected);
        }
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let error = Tokenizer::from_file(Path::new("no/such/tokenizer.json")).unwrap_err().to_string();
        assert!(error.contains("no/such/tokenizer.json"), "{error}");
    }

    #[test]
    fn special_tokens_are_known() {
        let tokenizer = shipped();
        assert!(tokenizer.is_special(2) && !tokenizer.is_special(300));
        assert_eq!(tokenizer.vocab_size(), 4096);
    }

    #[tokio::test]
    async fn a_text_that_makes_the_library_panic_fails_alone() {
        std::panic::set_hook(Box::new(|_| {}));
        let pool = TokenizerPool::with_encoder(1, |text| if text == "bad" { panic!("oh") } else { Ok(vec![7]) });
        for _ in 0..3 {
            assert!(matches!(pool.encode("bad".into()).await, Err(TokenizerError::Panicked)));
            assert_eq!(pool.encode("good".into()).await.unwrap(), [7]);
        }
        let _ = std::panic::take_hook();
    }
}
