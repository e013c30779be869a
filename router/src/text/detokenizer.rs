//! Ids to text, piece by piece.

use std::sync::Arc;

use super::tokenizer::Tokenizer;

/// The text of one sequence's generated ids.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    ids: Vec<u32>,
    /// Ids from `prefix` on give the context of decoding; those before `read` are shown.
    prefix: usize,
    read: usize,
}

impl Detokenizer {
    /// Text after a prompt.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt_ids: &[u32]) -> Self {
        let ids = prompt_ids[prompt_ids.len().saturating_sub(5)..].to_vec();
        Self { tokenizer, prefix: 0, read: ids.len(), ids }
    }

    /// The text that became certain.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids[self.prefix..], true);
        if text.ends_with('\u{FFFD}') { String::new() } else { self.show(&text) }
    }

    /// What is left.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.ids[self.prefix..], true);
        self.show(&text)
    }

    fn show(&mut self, text: &str) -> String {
        let shown = self.tokenizer.decode(&self.ids[self.prefix..self.read], true);
        (self.prefix, self.read) = (self.read, self.ids.len());
        text.get(shown.len()..).unwrap_or_default().to_owned()
    }
}
