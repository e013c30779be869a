//! `tokenizer.json`, read by the `tokenizers` library.

use std::path::Path;

/// The tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TokenizerError(String);

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        tokenizers::Tokenizer::from_file(path).map(Self).map_err(|error| TokenizerError(format!("{path:?}: {error}")))
    }

    /// The text of one id alone.
    pub fn decode_one(&self, id: u32) -> String {
        self.decode(&[id], false)
    }

    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.0.decode(ids, skip_special).unwrap_or_default()
    }

    /// Whether an id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// Ids, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }
}
