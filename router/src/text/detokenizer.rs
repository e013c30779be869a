//! Ids to text, piece by piece: a piece is shown once no later id can complete it.
//!
//! Where the vocabulary says what each id spells, the text is these bytes one after another (`pieces`). For other
//! decoders the library decodes a short window of ids again and again.
//!
//! The text is what the library makes of all ids at once, with one deliberate exception: in a run of byte tokens
//! (`<0xE2>`) that is not UTF-8 as a whole, the library replaces every byte, while here characters that were complete
//! stay, because they have been shown.

use std::sync::Arc;

use super::pieces::{Cut, Pieces};
use super::tokenizer::Tokenizer;

/// The text of one sequence's generated ids, in the context of its prompt. Special ids are not part of it. The work for
/// an id does not grow with the sequence.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    state: State,
}

#[derive(Debug)]
enum State {
    Spelled(Spelled),
    Decoded(Window),
}

impl Detokenizer {
    /// The text that follows a prompt.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt_ids: &[u32]) -> Self {
        let state = match tokenizer.pieces() {
            Some(pieces) => State::Spelled(Spelled::new(pieces, &tokenizer, prompt_ids)),
            None => State::Decoded(Window::new(&tokenizer, prompt_ids)),
        };
        Self { tokenizer, state }
    }

    /// The text that became certain with this id: empty for a special id, or inside a character.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        match &mut self.state {
            State::Spelled(spelled) => spelled.push(self.tokenizer.pieces().expect("a tokenizer keeps its table"), id),
            State::Decoded(window) => window.push(&self.tokenizer, id),
        }
    }

    /// Whether `finish` would bring nothing: the text does not end inside a character.
    pub fn is_complete(&self) -> bool {
        match &self.state {
            State::Spelled(spelled) => spelled.characters.begun.is_empty(),
            State::Decoded(window) => window.ids.len() == window.num_clean,
        }
    }

    /// What is left: an incomplete character, as U+FFFD.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Spelled(spelled) => {
                let mut text = String::new();
                spelled.characters.give_up(&mut text);
                text
            }
            State::Decoded(window) => window.finish(&self.tokenizer),
        }
    }
}

/// Text as the bytes that ids spell.
#[derive(Debug)]
struct Spelled {
    characters: Characters,
    /// What is cut from the text that comes next: something only at its very start.
    cut: Cut,
}

impl Spelled {
    fn new(pieces: &Pieces, tokenizer: &Tokenizer, prompt_ids: &[u32]) -> Self {
        let mut text_ids = prompt_ids.iter().copied().filter(|id| !tokenizer.is_special(*id));
        let cut = match pieces.cut {
            Cut::Space if text_ids.clone().any(|id| !pieces.piece(id).bytes.is_empty()) => Cut::None,
            Cut::FirstToken if text_ids.next().is_some() => Cut::None,
            cut => cut,
        };
        let characters = Characters { begun: vec![], replaces_each_byte: pieces.replaces_each_byte };
        let mut spelled = Self { characters, cut: Cut::None };
        // A prompt may end inside a character; four bytes say whether it does.
        let text_ids = prompt_ids.iter().copied().filter(|id| !tokenizer.is_special(*id));
        let tail: Vec<u32> = text_ids.rev().take(4).collect();
        for id in tail.into_iter().rev() {
            spelled.push(pieces, id);
        }
        spelled.cut = cut;
        spelled
    }

    fn push(&mut self, pieces: &Pieces, id: u32) -> String {
        let piece = pieces.piece(id);
        let mut text = String::new();
        if piece.is_whole {
            self.characters.give_up(&mut text);
        }
        match self.cut {
            Cut::FirstToken if piece.is_whole => {
                self.cut = Cut::None;
                let kept: Vec<u8> = piece.bytes.iter().copied().filter(|byte| *byte != b' ').collect();
                self.characters.push(&kept, &mut text);
            }
            Cut::Space if !piece.bytes.is_empty() => {
                self.cut = Cut::None;
                self.characters.push(piece.bytes.strip_prefix(b" ").unwrap_or(piece.bytes), &mut text);
            }
            _ => self.characters.push(piece.bytes, &mut text),
        }
        text
    }
}

/// Bytes to characters.
#[derive(Debug)]
struct Characters {
    /// The beginning of one character.
    begun: Vec<u8>,
    replaces_each_byte: bool,
}

impl Characters {
    /// Takes bytes; appends the characters that are complete.
    fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.begun.is_empty()
            && let Ok(whole) = std::str::from_utf8(bytes)
        {
            text.push_str(whole);
            return;
        }
        self.begun.extend_from_slice(bytes);
        let joined = std::mem::take(&mut self.begun);
        let mut rest = joined.as_slice();
        while let Err(error) = std::str::from_utf8(rest) {
            let (valid, invalid) = rest.split_at(error.valid_up_to());
            text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
            let Some(length) = error.error_len() else {
                self.begun = invalid.to_vec();
                return;
            };
            self.replace(length, text);
            rest = &invalid[length..];
        }
        text.push_str(std::str::from_utf8(rest).expect("the loop ends with what is valid"));
    }

    /// Replaces the beginning of a character that will not be completed.
    fn give_up(&mut self, text: &mut String) {
        if !self.begun.is_empty() {
            self.replace(self.begun.len(), text);
            self.begun.clear();
        }
    }

    fn replace(&self, num_bytes: usize, text: &mut String) {
        text.extend(std::iter::repeat_n('\u{FFFD}', if self.replaces_each_byte { num_bytes } else { 1 }));
    }
}

/// Ids of the prompt's end that the first generated id is decoded with: some decoders treat the start of a text apart.
const CONTEXT: usize = 6;

/// After so many ids without a clean end the model writes invalid UTF-8: what there is, is shown as it is.
const MAX_UNCLEAN: usize = 32;

/// Text as the library decodes the ids since the last but one *clean end*: a place where it does not end in an
/// incomplete character.
#[derive(Debug)]
struct Window {
    /// From a clean end on, with the start of the sequence counting as one.
    ids: Vec<u32>,
    /// How many of them come before the latest clean end.
    num_clean: usize,
    /// Bytes of the text of `ids` that have been shown.
    shown: usize,
}

impl Window {
    fn new(tokenizer: &Tokenizer, prompt_ids: &[u32]) -> Self {
        let text_ids = prompt_ids.iter().rev().filter(|id| !tokenizer.is_special(**id)).take(CONTEXT);
        let mut ids: Vec<u32> = text_ids.copied().collect();
        ids.reverse();
        let shown = tokenizer.decode(&ids, true).len();
        Self { num_clean: ids.len(), ids, shown }
    }

    fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, true);
        let is_clean = !text.ends_with('\u{FFFD}');
        if !is_clean && self.ids.len() - self.num_clean <= MAX_UNCLEAN {
            return String::new();
        }
        let piece = self.piece(&text);
        // The next id is decoded together with what is between the last two clean ends.
        self.ids.drain(..self.num_clean);
        self.num_clean = self.ids.len();
        self.shown = tokenizer.decode(&self.ids, true).len();
        piece
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let text = tokenizer.decode(&self.ids, true);
        let piece = self.piece(&text);
        self.shown = text.len();
        piece
    }

    /// What lies behind the shown bytes; where a decoder changed what was shown, from the next character on.
    fn piece(&self, text: &str) -> String {
        let start = (self.shown..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
        text[start..].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use serde_json::{Value, json};

    use super::*;

    fn shipped() -> Arc<Tokenizer> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
        Arc::new(Tokenizer::from_file(&path).unwrap())
    }

    fn tokenizer(decoder: &Value, model: &Value, pieces: &[&str]) -> Arc<Tokenizer> {
        let mut vocab = serde_json::Map::new();
        for piece in ["<unk>", "<s>", "</s>"] {
            vocab.insert(piece.into(), vocab.len().into());
        }
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
        }
        for piece in pieces {
            vocab.insert((*piece).into(), vocab.len().into());
        }
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let mut model = model.clone();
        model["vocab"] = vocab.into();
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "post_processor": null, "decoder": decoder, "model": model
        });
        Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap())
    }

    const WORDS: [&str; 8] = ["▁", "▁a", "a", "b", "▁the", "é", "▁▁", "🙂"];

    /// In the manner of Llama 2: a byte for every character that is not in the vocabulary, `▁` for a space.
    fn with_byte_fallback() -> Arc<Tokenizer> {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let model = json!({"type": "BPE", "merges": [], "unk_token": "<unk>", "byte_fallback": true});
        tokenizer(&decoder, &model, &WORDS[..7])
    }

    /// In the manner of T5.
    fn with_metaspace() -> Arc<Tokenizer> {
        let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        tokenizer(&decoder, &json!({"type": "BPE", "merges": [], "unk_token": "<unk>"}), &WORDS)
    }

    /// In the manner of the first GPT: a word's last token is marked, which the library alone decodes.
    fn with_word_ends() -> Arc<Tokenizer> {
        let decoder = json!({"type": "BPEDecoder", "suffix": "</w>"});
        let model = json!({"type": "BPE", "merges": [], "unk_token": "<unk>"});
        tokenizer(&decoder, &model, &["a", "b", "a</w>", "the</w>", "é", "🙂</w>"])
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

    fn check_random(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: impl Fn(&mut StdRng) -> Vec<u32>) {
        for seed in 0..300 {
            let mut rng = StdRng::seed_from_u64(seed);
            let generated: Vec<u32> = (0..rng.random_range(1..60)).flat_map(|_| ids(&mut rng)).collect();
            let (pieces, expected) = pieces(tokenizer, prompt, &generated);
            assert_eq!(pieces.concat(), expected, "seed {seed}: {generated:?}");
        }
    }

    #[test]
    fn pieces_of_any_ids_make_the_text_that_the_library_decodes() {
        let tokenizer = shipped();
        for prompt in [vec![], vec![1], tokenizer.encode("a b", true).unwrap()] {
            check_random(&tokenizer, &prompt, |rng| vec![rng.random_range(0..4100)]);
            // Bytes alone: the worst that a byte-level vocabulary can do.
            check_random(&tokenizer, &prompt, |rng| vec![rng.random_range(10..266)]);
        }
        let (metaspace, word_ends) = (with_metaspace(), with_word_ends());
        for prompt in [vec![], vec![1], vec![260, 259], vec![1, 261]] {
            check_random(&metaspace, &prompt, |rng| vec![rng.random_range(0..267)]);
        }
        check_random(&word_ends, &[259, 261], |rng| vec![rng.random_range(259..265)]);
    }

    #[test]
    fn pieces_of_words_and_bytes_make_the_text_that_the_library_decodes() {
        let tokenizer = with_byte_fallback();
        let byte = |byte: u8| u32::from(byte) + 3;
        for prompt in [vec![], vec![1], vec![260, 259], vec![1, 259]] {
            // Whole characters as bytes, or bytes that are no characters, with a word between runs.
            check_random(&tokenizer, &prompt, |rng| match rng.random_range(0..3) {
                0 => vec![rng.random_range(259..266)],
                1 => rng.random::<char>().to_string().bytes().map(byte).collect(),
                _ => {
                    let stray = (0..rng.random_range(1..5)).map(|_| byte(rng.random_range(0x80..0xC0)));
                    [262].into_iter().chain(stray).chain([261]).collect()
                }
            });
        }
    }

    #[test]
    fn a_complete_character_stays_what_it_was_when_stray_bytes_follow() {
        let tokenizer = with_byte_fallback();
        let ids: Vec<u32> = "é".bytes().chain([0xF0, 0x9F]).map(|byte| u32::from(byte) + 3).chain([262]).collect();
        let mut detokenizer = Detokenizer::new(tokenizer, &[262]);
        let pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        assert_eq!(pieces, ["", "é", "", "", "\u{FFFD}\u{FFFD}b"]);
    }

    #[test]
    fn one_id_alone_reads_as_inside_a_text() {
        assert_eq!(with_byte_fallback().decode_one(260), " a");
        assert_eq!(with_metaspace().decode_one(263), " the");
        assert_eq!(shipped().decode_one(2), "</s>");
        assert_eq!(shipped().decode_one(1 << 20), "");
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
