//! A shorter way to the ids of plain text: cut into words, each of which is looked up.
//!
//! Most of what the library does for a text serves what plain text does not need: normalizing, places of tokens, tokens that
//! are cut out first. For ASCII text without the name of an added token, in a byte-level BPE vocabulary whose pattern is one of
//! those that most models share, the ids are those of its words one after the other. Everything else is left to the library.

use std::collections::HashMap;
use std::sync::RwLock;

use regex_automata::Input;
use regex_automata::meta::Regex;
use regex_syntax::escape;
use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::{Model, Tokenizer};

/// The pattern of GPT-2, which the pre-tokenizer `ByteLevel` has built in; those of Llama 3 and Qwen 2.
const PATTERNS: [&str; 3] = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];
/// What all of them end with: spaces, but the last only if nothing follows. Automata do not look ahead: [`Words::cut`] does.
const SPACES: &str = r"|\s+(?!\S)|\s+";
const SPACE: usize = 1;

/// Words whose ids are kept, and the bytes of the longest.
const MAX_KEPT: usize = 16_384;
const MAX_KEPT_BYTES: usize = 48;

/// What is needed of a tokenizer.
#[derive(Debug)]
pub(super) struct Words {
    pattern: Regex,
    /// The names of added tokens.
    added: Option<Regex>,
    /// The special tokens before and after a text.
    around: (Vec<u32>, Vec<u32>),
    kept: RwLock<HashMap<Box<str>, Box<[u32]>>>,
}

impl Words {
    /// `None`: the tokenizer is of another kind.
    pub fn read(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        if model.dropout.is_some() || model.continuing_subword_prefix.is_some() || model.end_of_word_suffix.is_some() {
            return None;
        }
        let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
        // ASCII is normalized as it is.
        if !normalizer.is_null() && normalizer["type"] != "NFC" {
            return None;
        }
        let pattern = pattern(&serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?)?;
        let words = pattern.strip_suffix(SPACES)?;
        let added: Vec<String> =
            tokenizer.get_added_tokens_decoder().values().map(|token| escape(&token.content)).collect();
        Some(Self {
            pattern: Regex::new_many(&[words, r"\s+"]).ok()?,
            added: if added.is_empty() { None } else { Some(Regex::new(&added.join("|")).ok()?) },
            around: around(tokenizer)?,
            kept: RwLock::default(),
        })
    }

    /// The ids of a text, as the library would find them; `None` where it has to.
    pub fn encode(&self, tokenizer: &Tokenizer, text: &str, add_special: bool) -> Option<Vec<u32>> {
        if !text.is_ascii() || self.added.as_ref().is_some_and(|added| added.is_match(text)) {
            return None;
        }
        let mut ids = Vec::with_capacity(text.len() / 2 + 4);
        if add_special {
            ids.extend_from_slice(&self.around.0);
        }
        let mut unknown = vec![];
        let mut at = 0;
        while at < text.len() {
            let kept = self.kept.read().expect("nothing panics while it holds the lock");
            let mut missing = None;
            while at < text.len() && missing.is_none() {
                let word = self.cut(text, at);
                at += word.len();
                match kept.get(word) {
                    Some(known) => ids.extend_from_slice(known),
                    None => missing = Some(word),
                }
            }
            drop(kept);
            if let Some(word) = missing {
                let from = ids.len();
                ids.extend(tokenizer.get_model().tokenize(&spelled(word)).ok()?.into_iter().map(|token| token.id));
                if word.len() <= MAX_KEPT_BYTES {
                    unknown.push((Box::from(word), Box::from(&ids[from..])));
                }
            }
        }
        if !unknown.is_empty() {
            let mut kept = self.kept.write().expect("nothing panics while it holds the lock");
            if kept.len() + unknown.len() > MAX_KEPT {
                kept.clear();
            }
            kept.extend(unknown.into_iter().take(MAX_KEPT));
        }
        if add_special {
            ids.extend_from_slice(&self.around.1);
        }
        Some(ids)
    }

    /// The word that begins there.
    fn cut<'a>(&self, text: &'a str, at: usize) -> &'a str {
        let Some(found) = self.pattern.find(Input::new(text).range(at..)) else { return &text[at..] };
        if found.start() > at {
            return &text[at..found.start()];
        }
        let is_followed = found.pattern().as_usize() == SPACE && found.end() < text.len();
        // The last of several spaces belongs to what follows.
        let end = if is_followed && found.len() > 1 { found.end() - 1 } else { found.end() };
        &text[at..end]
    }
}

/// What a text is cut into words by, if it is one of those that are known, and nothing else happens to the text.
fn pattern(pre_tokenizer: &Value) -> Option<&'static str> {
    let is_byte_level = |part: &Value, cuts: bool| {
        part["type"] == "ByteLevel" && part["add_prefix_space"] == false && part["use_regex"] == cuts
    };
    if is_byte_level(pre_tokenizer, true) {
        return Some(PATTERNS[0]);
    }
    let [split, byte_level] = pre_tokenizer["pretokenizers"].as_array()?.as_slice() else { return None };
    let isolates = split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
    let named = split["pattern"]["Regex"].as_str()?;
    PATTERNS.into_iter().find(|pattern| isolates && is_byte_level(byte_level, false) && *pattern == named)
}

/// The special tokens around a text; `None` where they depend on it.
fn around(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let ids = |text: &str, add_special| Some(tokenizer.encode_fast(text, add_special).ok()?.get_ids().to_vec());
    let empty = ids("", true)?;
    let around = |text: &str| {
        let (with, without) = (ids(text, true)?, ids(text, false)?);
        let before = (0..=empty.len()).find(|before| with[*before..].starts_with(&without))?;
        (with.len() == without.len() + empty.len())
            .then(|| (with[..before].to_vec(), with[before + without.len()..].to_vec()))
    };
    let found = around("a")?;
    (around("b c")? == found).then_some(found)
}

/// As a byte-level vocabulary writes a word of ASCII: what cannot be printed is moved beyond Latin-1.
fn spelled(word: &str) -> String {
    let spell = |byte: u8| match byte {
        0x21..=0x7e => char::from(byte),
        0x7f => '\u{121}',
        _ => char::from_u32(0x100 + u32::from(byte)).unwrap_or_default(),
    };
    word.bytes().map(spell).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use serde_json::json;

    use super::*;

    const PARTS: [&str; 40] = [
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\n\n",
        "\t",
        " \n ",
        "a",
        "The",
        "the",
        " function",
        "returns",
        "x",
        "I",
        "'s",
        "'S",
        "'re",
        "'LL",
        "'",
        "'x",
        "1",
        "12",
        "123",
        "2024",
        "3.14",
        ".",
        ",",
        "...",
        "!?",
        " (",
        "foo_bar",
        "--",
        "\x00",
        "\x7f",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1f",
        "<",
    ];

    fn made(change: impl Fn(&mut Value)) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        change(&mut file);
        Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap()
    }

    fn random(rng: &mut StdRng) -> String {
        let count = rng.random_range(0..30);
        (0..count)
            .map(|_| match rng.random_range(0..8) {
                0 => char::from(rng.random_range(0..0x80)).to_string(),
                _ => PARTS[rng.random_range(0..PARTS.len())].into(),
            })
            .collect()
    }

    #[test]
    fn ids_equal_those_of_the_library() {
        let byte_level =
            |cuts| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": cuts});
        let split = |pattern| {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
        };
        let mut rng = StdRng::seed_from_u64(1);
        for pre_tokenizer in [byte_level(true), split(PATTERNS[0]), split(PATTERNS[1]), split(PATTERNS[2])] {
            for normalizer in [Value::Null, json!({"type": "NFC"})] {
                let tokenizer = made(|file| {
                    file["pre_tokenizer"] = pre_tokenizer.clone();
                    file["normalizer"] = normalizer.clone();
                });
                let words = Words::read(&tokenizer).unwrap();
                for n in 0..3000 {
                    let (text, add_special) = (random(&mut rng), n % 2 == 0);
                    let expected = tokenizer.encode_fast(text.as_str(), add_special).unwrap();
                    let found = words.encode(&tokenizer, &text, add_special).unwrap();
                    assert_eq!(found, expected.get_ids(), "{text:?} by {pre_tokenizer}");
                }
            }
        }
    }

    #[test]
    fn special_tokens_stand_on_both_sides() {
        let tokenizer = made(|file| {
            let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
            file["post_processor"]["single"] =
                json!([special("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, special("</s>")]);
            file["post_processor"]["special_tokens"]["</s>"] = json!({"id": "</s>", "ids": [2], "tokens": ["</s>"]});
        });
        let words = Words::read(&tokenizer).unwrap();
        for text in ["", "a", "The function returns"] {
            let expected = tokenizer.encode_fast(text, true).unwrap();
            assert_eq!(words.encode(&tokenizer, text, true).unwrap(), expected.get_ids());
            assert_eq!((expected.get_ids()[0], *expected.get_ids().last().unwrap()), (1, 2));
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_the_library() {
        let tokenizer = made(|_| ());
        let words = Words::read(&tokenizer).unwrap();
        for text in ["caf\u{e9}", "a</s>b", "\u{3000}", "<s>"] {
            assert!(words.encode(&tokenizer, text, true).is_none(), "{text}");
        }
        for (field, value) in [
            ("normalizer", json!({"type": "Lowercase"})),
            ("pre_tokenizer", json!({"type": "Whitespace"})),
            (
                "pre_tokenizer",
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            ),
        ] {
            assert!(Words::read(&made(|file| file[field] = value.clone())).is_none(), "{field} {value}");
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let tokenizer = made(|_| ());
        let words = Words::read(&tokenizer).unwrap();
        for n in 0..3 * MAX_KEPT {
            // Digits stand alone: numbers in letters.
            let word: String = n.to_string().bytes().map(|byte| char::from(byte - b'0' + b'k')).collect();
            words.encode(&tokenizer, &word, false).unwrap();
        }
        assert!(words.kept.read().unwrap().len() <= MAX_KEPT);
        words.encode(&tokenizer, &"z".repeat(MAX_KEPT_BYTES + 1), false).unwrap();
        assert!(words.kept.read().unwrap().keys().all(|word| word.len() <= MAX_KEPT_BYTES));
    }
}
