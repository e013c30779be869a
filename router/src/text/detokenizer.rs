//! Ids to text, piece by piece.

use std::sync::Arc;

use super::tokenizer::Tokenizer;

/// The text of one sequence's generated ids.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    ids: Vec<u32>,
    prefix: String,
    shown: usize,
}

impl Detokenizer {
    /// Text after a prompt.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt_ids: &[u32]) -> Self {
        let ids = prompt_ids.to_vec();
        let prefix = tokenizer.decode(&ids, true);
        Self { tokenizer, shown: prefix.len(), prefix, ids }
    }

    /// The text that became certain.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        self.prefix = self.tokenizer.decode(&self.ids, true);
        if self.prefix.ends_with('\u{FFFD}') { String::new() } else { self.finish() }
    }

    /// What is left.
    pub fn finish(&mut self) -> String {
        let text = self.prefix.get(self.shown..).unwrap_or_default().to_owned();
        self.shown = self.prefix.len();
        text
    }
}
