//! `tokenizer.json`, read by the `tokenizers` library, and a bounded pool of threads that encode with it.

use std::collections::HashSet;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::pieces::Pieces;
use super::words::Words;

/// Texts that wait for a thread of a lane, beyond one for each.
const MAX_WAITING: usize = 64;

/// Texts up to so many bytes do not wait for longer ones. They take some milliseconds; the longest take a second.
pub const SHORT: usize = 32 << 10;

/// Whoever streams comes before long texts: what computes a step waits for the slowest of its threads.
const NICENESS_OF_LONG: i32 = 10;

/// Texts up to so many bytes are encoded where they are: that takes less than to wake a thread, and wait for it.
const AT_ONCE: usize = 512;

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
    #[error("`inputs` cannot be tokenized")]
    Text,
    /// The library panicked on the text.
    #[error("the tokenizer failed on this text")]
    Panicked,
    /// The pool has ended.
    #[error("the server is shutting down")]
    Ended,
}

/// Turns text into ids. A tokenizer, or what stands for one in a test.
pub trait Encode: Debug + Send + Sync + 'static {
    /// The ids of a text, with the special tokens that the model expects around it if `add_special`.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError>;

    /// No token stands for more bytes of text; `None` where that cannot be said.
    fn max_token_bytes(&self) -> Option<usize>;

    /// The ids of a text, and which bytes of it each stands for: none for what was added.
    fn places(&self, text: &str, add_special: bool) -> Result<Vec<Placed>, TokenizerError>;

    /// The text of some ids, special tokens included.
    fn decode(&self, ids: &[u32]) -> String;

    /// The bytes that an id stands for inside a text.
    fn spell(&self, id: u32) -> Vec<u8>;
}

/// A token of a text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Placed {
    /// In the vocabulary.
    pub id: u32,
    /// Of the text.
    pub bytes: std::ops::Range<usize>,
}

/// A model's tokenizer. Cheap to share, behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    pieces: Option<Pieces>,
    words: Option<Words>,
    max_token_bytes: Option<usize>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let file = |reason: String| TokenizerError::File { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| file(error.to_string()))?;
        Self::from_bytes(&bytes).map_err(file)
    }

    /// Reads what `tokenizer.json` holds; the library's words if it is no tokenizer.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        Ok(Self::new(inner))
    }

    fn new(mut inner: tokenizers::Tokenizer) -> Self {
        // Lengths are the request's business, not the file's.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let special =
            inner.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let pieces = Pieces::read(&inner);
        let max_token_bytes = pieces.as_ref().and_then(|pieces| max_token_bytes(&inner, pieces));
        let words = Words::read(&inner);
        Self { inner, special, pieces, words, max_token_bytes }
    }

    /// The ids of a text, with the special tokens that the model expects around it if `add_special`.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        if let Some(ids) = self.words.as_ref().and_then(|words| words.encode(&self.inner, text, add_special)) {
            return Ok(ids);
        }
        let encoding = self.inner.encode_fast(text, add_special).map_err(|error| {
            warn!(%error, "a text cannot be tokenized");
            TokenizerError::Text
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some ids; what no bytes of theirs spell is U+FFFD.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// What every id spells, where that can be said of an id alone.
    pub(super) fn pieces(&self) -> Option<&Pieces> {
        self.pieces.as_ref()
    }

    /// The text of one id alone, as it reads inside a text.
    pub fn decode_one(&self, id: u32) -> String {
        match &self.pieces {
            Some(pieces) => String::from_utf8_lossy(pieces.piece(id).bytes).into_owned(),
            None => self.decode(&[id], false),
        }
    }

    /// Whether an id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Ids, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

impl Encode for Tokenizer {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.encode(text, add_special)
    }

    fn max_token_bytes(&self) -> Option<usize> {
        self.max_token_bytes
    }

    fn places(&self, text: &str, add_special: bool) -> Result<Vec<Placed>, TokenizerError> {
        let encoding = self.inner.encode(text, add_special).map_err(|error| {
            warn!(%error, "a text cannot be tokenized");
            TokenizerError::Text
        })?;
        let places = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(places.map(|(id, (start, stop))| Placed { id: *id, bytes: *start..*stop }).collect())
    }

    fn decode(&self, ids: &[u32]) -> String {
        self.decode(ids, false)
    }

    fn spell(&self, id: u32) -> Vec<u8> {
        match &self.pieces {
            Some(pieces) => pieces.piece(id).bytes.to_vec(),
            None => self.decode(&[id], false).into_bytes(),
        }
    }
}

/// The bound, where the tokenizer neither drops text, nor joins what it does not know, nor absorbs spaces.
fn max_token_bytes(inner: &tokenizers::Tokenizer, pieces: &Pieces) -> Option<usize> {
    let ModelWrapper::BPE(model) = inner.get_model() else { return None };
    let as_json = |part: serde_json::Result<Value>| part.ok();
    let normalizer = as_json(serde_json::to_value(inner.get_normalizer()))?;
    let pre_tokenizer = as_json(serde_json::to_value(inner.get_pre_tokenizer()))?;
    let absorbs = inner.get_added_tokens_decoder().values().any(|token| token.lstrip || token.rstrip);
    let spells_bytes = model.byte_fallback || is_part(&pre_tokenizer, "ByteLevel");
    let keeps = spells_bytes && pieces.has_all_bytes() && !absorbs && keeps_text(&pre_tokenizer);
    Some(pieces.longest() * shrinks_by(&normalizer)?).filter(|bound| keeps && *bound > 0)
}

/// `{"type": "Sequence", …: [parts]}`, or a part alone.
fn parts(part: &Value) -> &[Value] {
    let listed = ["pretokenizers", "normalizers"].iter().find_map(|key| part[key].as_array());
    listed.map_or(std::slice::from_ref(part), Vec::as_slice)
}

fn is_part(whole: &Value, name: &str) -> bool {
    parts(whole).iter().any(|part| part["type"] == name)
}

fn keeps_text(pre_tokenizer: &Value) -> bool {
    pre_tokenizer.is_null()
        || parts(pre_tokenizer).iter().all(|part| match part["type"].as_str() {
            Some("ByteLevel" | "Metaspace" | "Digits") => true,
            Some("Split" | "Punctuation") => part["behavior"] != "Removed",
            _ => false,
        })
}

/// How many bytes of a text become one at most; `None` where that is unknown.
fn shrinks_by(normalizer: &Value) -> Option<usize> {
    if normalizer.is_null() {
        return Some(1);
    }
    let factors = parts(normalizer).iter().map(|part| match part["type"].as_str()? {
        // Three jamos of three bytes each make one syllable; the Kelvin sign makes a letter.
        "NFC" => Some(3),
        "Prepend" => Some(1),
        "Replace" => {
            let (from, to) = (part["pattern"]["String"].as_str()?, part["content"].as_str()?);
            (to.len() >= from.len()).then_some(1)
        }
        _ => None,
    });
    factors.product()
}

/// Work on its way to a thread. It sends its result itself, and does nothing if nobody waits for that.
type Job = Box<dyn FnOnce(&dyn Encode) + Send>;

/// Threads that work on texts, in two lanes, so that nobody's short text waits for somebody's long one. A text that makes the
/// library panic fails alone.
#[derive(Clone, Debug)]
pub struct TokenizerPool {
    encoder: Arc<dyn Encode>,
    short: mpsc::Sender<Job>,
    long: mpsc::Sender<Job>,
}

impl TokenizerPool {
    /// A pool of that many threads for short texts and half as many, but one at least, for long ones. They end when the
    /// last clone of the pool is dropped.
    pub fn new(encoder: &Arc<dyn Encode>, num_threads: usize) -> std::io::Result<Self> {
        let long = (num_threads / 2).max(1);
        let short = lane("tokenize", encoder, num_threads, 0)?;
        let long = lane("tokenize-long", encoder, long, NICENESS_OF_LONG)?;
        Ok(Self { encoder: Arc::clone(encoder), short, long })
    }

    /// The ids of a text, with the special tokens around it if `add_special`.
    pub async fn encode(&self, text: String, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        if text.len() <= AT_ONCE {
            let encoded = catch_unwind(AssertUnwindSafe(|| self.encoder.encode(&text, add_special)));
            return encoded.map_err(|_| TokenizerError::Panicked)?;
        }
        self.run(text.len(), move |encoder| encoder.encode(&text, add_special)).await?
    }

    /// Does some work on a text of `num_bytes`. Waits for a thread; a caller that is gone by then costs nothing.
    pub async fn run<T: Send + 'static>(
        &self,
        num_bytes: usize,
        work: impl FnOnce(&dyn Encode) -> T + Send + 'static,
    ) -> Result<T, TokenizerError> {
        let lane = if num_bytes <= SHORT { &self.short } else { &self.long };
        let (reply, result) = oneshot::channel();
        let job = move |encoder: &dyn Encode| {
            if !reply.is_closed() {
                let done = catch_unwind(AssertUnwindSafe(|| work(encoder)));
                // Whoever asked may be gone.
                let _ = reply.send(done.map_err(|_| TokenizerError::Panicked));
            }
        };
        lane.send(Box::new(job)).await.map_err(|_| TokenizerError::Ended)?;
        result.await.map_err(|_| TokenizerError::Ended)?
    }
}

fn lane(
    name: &str,
    encoder: &Arc<dyn Encode>,
    num_threads: usize,
    niceness: i32,
) -> std::io::Result<mpsc::Sender<Job>> {
    let (jobs, waiting) = mpsc::channel(MAX_WAITING);
    let waiting = Arc::new(Mutex::new(waiting));
    for n in 0..num_threads {
        let (waiting, encoder) = (Arc::clone(&waiting), Arc::clone(encoder));
        std::thread::Builder::new().name(format!("{name}-{n}")).spawn(move || {
            // On Linux, threads have priorities of their own. Without leave to lower it, it stays.
            let _ = rustix::process::nice(niceness);
            work(&waiting, &*encoder);
        })?;
    }
    Ok(jobs)
}

fn work(waiting: &Mutex<mpsc::Receiver<Job>>, encoder: &dyn Encode) {
    loop {
        let next = waiting.lock().expect("nothing panics while it holds the lock").blocking_recv();
        let Some(job) = next else { return };
        job(encoder);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    #[test]
    fn no_text_has_fewer_tokens_than_its_bytes_allow() {
        let tokenizer = shipped();
        let most = tokenizer.max_token_bytes.unwrap();
        for text in ["\n".repeat(5000), " ".repeat(5000), "a".repeat(5000), "é🙂".repeat(500), "<|end|>".repeat(500)]
        {
            let num_tokens = tokenizer.encode(&text, false).unwrap().len();
            assert!(num_tokens >= text.len().div_ceil(most), "{num_tokens} tokens, at most {most} bytes each");
        }
    }

    #[test]
    fn a_tokenizer_that_may_drop_text_gives_no_bound() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
        let shipped: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let bound = |change: &dyn Fn(&mut Value)| {
            let mut changed = shipped.clone();
            change(&mut changed);
            Tokenizer::from_bytes(changed.to_string().as_bytes()).unwrap().max_token_bytes
        };
        let plain = bound(&|_| {}).unwrap();
        assert_eq!(bound(&|t| t["normalizer"] = json!({"type": "NFC"})), Some(3 * plain));
        assert_eq!(bound(&|t| t["normalizer"] = json!({"type": "NFKC"})), None);
        assert_eq!(
            bound(&|t| t["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": true})),
            None
        );
        assert_eq!(bound(&|t| t["pre_tokenizer"]["pretokenizers"][0]["behavior"] = json!("Removed")), None);
        assert_eq!(bound(&|t| t["added_tokens"][6]["rstrip"] = json!(true)), None);
    }

    /// Takes for ever over a long text.
    #[derive(Debug)]
    struct Slow(Mutex<std::sync::mpsc::Receiver<()>>);

    impl Encode for Slow {
        fn encode(&self, text: &str, _add_special: bool) -> Result<Vec<u32>, TokenizerError> {
            if text.len() > SHORT {
                let _ = self.0.lock().unwrap().recv();
            }
            Ok(vec![text.len() as u32])
        }

        fn max_token_bytes(&self) -> Option<usize> {
            None
        }

        fn places(&self, _text: &str, _add_special: bool) -> Result<Vec<Placed>, TokenizerError> {
            Ok(vec![])
        }

        fn decode(&self, _ids: &[u32]) -> String {
            String::new()
        }

        fn spell(&self, _id: u32) -> Vec<u8> {
            vec![]
        }
    }

    #[tokio::test]
    async fn short_texts_overtake_long_ones() {
        for num_threads in [1, 2, 4] {
            let (release, released) = std::sync::mpsc::channel();
            let encoder: Arc<dyn Encode> = Arc::new(Slow(Mutex::new(released)));
            let pool = TokenizerPool::new(&encoder, num_threads).unwrap();
            // More than threads and places to wait.
            let asked: Vec<_> = (0..2 * MAX_WAITING)
                .map(|_| {
                    let pool = pool.clone();
                    tokio::spawn(async move { pool.encode("a".repeat(SHORT + 1), true).await })
                })
                .collect();
            for length in [1, SHORT] {
                tokio::task::yield_now().await;
                let ids =
                    tokio::time::timeout(std::time::Duration::from_secs(10), pool.encode("a".repeat(length), true));
                assert_eq!(ids.await.expect("a short text does not wait").unwrap(), [length as u32]);
            }
            assert!(asked.iter().all(|asked| !asked.is_finished()));
            drop(release);
            for asked in asked {
                assert_eq!(asked.await.unwrap().unwrap(), [SHORT as u32 + 1]);
            }
        }
    }

    /// Panics on one text.
    #[derive(Debug)]
    struct Moody;

    impl Encode for Moody {
        fn encode(&self, text: &str, _add_special: bool) -> Result<Vec<u32>, TokenizerError> {
            assert_ne!(text, "bad");
            Ok(vec![7])
        }

        fn max_token_bytes(&self) -> Option<usize> {
            None
        }

        fn places(&self, _text: &str, _add_special: bool) -> Result<Vec<Placed>, TokenizerError> {
            Ok(vec![])
        }

        fn decode(&self, _ids: &[u32]) -> String {
            String::new()
        }

        fn spell(&self, _id: u32) -> Vec<u8> {
            vec![]
        }
    }

    #[tokio::test]
    async fn long_texts_give_way_to_streams_and_short_ones_do_not() {
        let encoder: Arc<dyn Encode> = Arc::new(Moody);
        let pool = TokenizerPool::new(&encoder, 2).unwrap();
        let niceness = || rustix::process::getpriority_process(None).unwrap();
        let usual = niceness();
        assert_eq!(pool.run(SHORT, move |_| niceness()).await.unwrap(), usual);
        let expected = (usual + NICENESS_OF_LONG).min(19);
        assert_eq!(pool.run(SHORT + 1, move |_| niceness()).await.unwrap(), expected);
    }

    #[tokio::test]
    async fn a_text_that_makes_the_library_panic_fails_alone() {
        let encoder: Arc<dyn Encode> = Arc::new(Moody);
        let pool = TokenizerPool::new(&encoder, 1).unwrap();
        for _ in 0..3 {
            assert!(matches!(pool.encode("bad".into(), true).await, Err(TokenizerError::Panicked)));
            assert_eq!(pool.encode("good".into(), true).await.unwrap(), [7]);
        }
    }
}
