//! Ids to text, piece by piece: a piece is shown once no later id can change it.

use std::sync::Arc;

use super::tokenizer::Tokenizer;

/// Ids of the prompt's end that the first generated id is decoded with: some decoders treat the start of a text apart.
const CONTEXT: usize = 6;

/// After so many ids without a clean end the model writes invalid UTF-8: what there is, is shown as it is.
const MAX_UNCLEAN: usize = 32;

/// The text of one sequence's generated ids, in the context of its prompt. Special ids are not part of it.
///
/// The ids since the last but one clean end are decoded again for each new one; a *clean end* is a place where the text
/// does not end in an incomplete character. So the work for an id does not grow with the sequence.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// From a clean end on, with the start of the sequence counting as one.
    ids: Vec<u32>,
    /// How many of them come before the latest clean end.
    num_clean: usize,
    /// Bytes of the text of `ids` that have been shown.
    shown: usize,
}

impl Detokenizer {
    /// The text that follows a prompt.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt_ids: &[u32]) -> Self {
        let text_ids = prompt_ids.iter().rev().filter(|id| !tokenizer.is_special(**id)).take(CONTEXT);
        let mut ids: Vec<u32> = text_ids.copied().collect();
        ids.reverse();
        let shown = tokenizer.decode(&ids, true).len();
        Self { tokenizer, num_clean: ids.len(), ids, shown }
    }

    /// The text that became certain with this id: empty for a special id, or inside a character.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, true);
        let is_clean = !text.ends_with('\u{FFFD}');
        if !is_clean && self.ids.len() - self.num_clean <= MAX_UNCLEAN {
            return String::new();
        }
        let piece = self.piece(&text);
        // The next id is decoded together with what is between the last two clean ends.
        self.ids.drain(..self.num_clean);
        self.num_clean = self.ids.len();
        self.shown = self.tokenizer.decode(&self.ids, true).len();
        piece
    }

    /// What is left: an incomplete character, as U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.ids, true);
        let piece = self.piece(&text);
        self.shown = text.len();
        piece
    }

    /// What lies behind the shown bytes. A prompt that ends inside a character may have it completed, so the
    /// first byte to show may lie inside a character: that is shown whole.
    fn piece(&self, text: &str) -> String {
        let mut start = self.shown.min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        text[start..].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn shipped() -> Arc<Tokenizer> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
        Arc::new(Tokenizer::from_file(&path).unwrap())
    }

    /// A tokenizer in the manner of Llama 2: a byte for every character that is not in the vocabulary, `▁` for a space.
    fn with_byte_fallback() -> Arc<Tokenizer> {
        let mut vocab = serde_json::Map::new();
        for piece in ["<unk>", "<s>", "</s>"] {
            vocab.insert(piece.into(), vocab.len().into());
        }
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
        }
        for piece in ["▁", "▁a", "a", "b", "▁the", "é", "▁▁"] {
            vocab.insert(piece.into(), vocab.len().into());
        }
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true}
        });
        let path = std::env::temp_dir().join(format!(
            "tokenizer-{}-{:?}.json",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        Arc::new(tokenizer)
    }

    /// All pieces, and what the library says of the whole.
    fn pieces(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> (Vec<String>, String) {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt);
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        pieces.push(detokenizer.finish());
        let before = tokenizer.decode(prompt, true);
        let whole = tokenizer.decode(&[prompt, ids].concat(), true);
        (pieces, whole[before.len()..].to_owned())
    }

    fn check_random(tokenizer: &Arc<Tokenizer>, ids: impl Fn(&mut StdRng) -> u32) {
        for seed in 0..300 {
            let mut rng = StdRng::seed_from_u64(seed);
            let prompt = tokenizer.encode("a b", true).unwrap();
            let generated: Vec<u32> = (0..rng.random_range(1..60)).map(|_| ids(&mut rng)).collect();
            let (pieces, expected) = pieces(tokenizer, &prompt, &generated);
            assert_eq!(pieces.concat(), expected, "seed {seed}: {generated:?}");
        }
    }

    #[test]
    fn pieces_of_any_ids_make_the_text_that_the_library_decodes() {
        check_random(&shipped(), |rng| rng.random_range(0..4096));
        // Bytes alone: the worst that a byte-level vocabulary can do.
        check_random(&shipped(), |rng| rng.random_range(10..266));
    }

    #[test]
    fn no_piece_ends_inside_a_character() {
        for tokenizer in [shipped(), with_byte_fallback()] {
            let text = "naïve 🙂🙂 é the 👨‍👩‍👧 a";
            let ids = tokenizer.encode(text, false).unwrap();
            let (pieces, expected) = pieces(&tokenizer, &tokenizer.encode("a", true).unwrap(), &ids);
            assert_eq!(pieces.concat(), expected);
            assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        }
    }

    #[test]
    fn text_with_byte_fallback_is_what_the_library_decodes() {
        let tokenizer = with_byte_fallback();
        for text in ["the a b", " a 🙂 b é🙂", "ab  the", "\u{10FFFF}\u{80}a", "   a"] {
            let ids = tokenizer.encode(text, false).unwrap();
            let (pieces, expected) = pieces(&tokenizer, &tokenizer.encode("a", true).unwrap(), &ids);
            assert_eq!(pieces.concat(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_character_cut_off_at_the_end_is_shown_at_the_end_alone() {
        let tokenizer = with_byte_fallback();
        let ids = tokenizer.encode("a🙂", false).unwrap();
        let (pieces, _) = pieces(&tokenizer, &[], &ids[..ids.len() - 1]);
        let (last, before) = pieces.split_last().unwrap();
        assert!(before.iter().all(|piece| !piece.contains('\u{FFFD}')) && last.contains('\u{FFFD}'), "{pieces:?}");
    }

    #[test]
    fn special_ids_are_not_part_of_the_text() {
        let tokenizer = shipped();
        let ids = tokenizer.encode("a list", false).unwrap();
        let with_special: Vec<u32> = ids.iter().flat_map(|id| [2, *id, 6]).collect();
        assert_eq!(pieces(&tokenizer, &[], &with_special).0.concat(), "a list");
    }

    #[test]
    fn invalid_bytes_without_end_are_shown_in_bounded_time() {
        let tokenizer = with_byte_fallback();
        let lone = tokenizer.encode("🙂", false).unwrap()[1];
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &[]);
        let shown: usize = (0..200).map(|_| detokenizer.push(lone).chars().count()).sum();
        assert!(shown > 100, "{shown}");
    }
}
