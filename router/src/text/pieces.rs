//! What each id spells, as bytes: read off the vocabulary once, so that text is made without decoding anything again.
//!
//! That is possible where a token's bytes do not depend on its neighbours: byte-level vocabularies, and those that write
//! a space as `▁` and unknown characters as bytes. For any other decoder there is no table, and the library decodes.

use serde_json::Value;
use tokenizers::{Model, Tokenizer};

/// Ids beyond are no vocabulary but a broken file.
const MAX_ID: u32 = 1 << 24;

/// What is cut from the start of a text, where the space before its first word was put by the tokenizer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Cut {
    /// Nothing.
    None,
    /// One space, from the text.
    Space,
    /// All spaces, from the first token.
    FirstToken,
}

/// What an id spells.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Piece<'a> {
    /// May be part of a character.
    pub bytes: &'a [u8],
    /// It is whole characters: bytes before it that are none stay none.
    pub is_whole: bool,
}

/// What all ids spell.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Per id, where its bytes end, and whether they are whole characters.
    ends: Vec<(u32, bool)>,
    /// How a text begins.
    pub cut: Cut,
    /// Whether the library replaces each byte that belongs to no character, or each cut-off character as one.
    pub replaces_each_byte: bool,
}

impl Pieces {
    /// Reads the table, if there can be one.
    pub fn read(tokenizer: &Tokenizer) -> Option<Self> {
        let rules = Rules::read(&serde_json::to_value(tokenizer.get_decoder()?).ok()?)?;
        let num_ids = tokenizer.get_vocab(true).into_values().max().filter(|id| *id < MAX_ID)? + 1;
        let added = tokenizer.get_added_vocabulary();
        let spelling = |id| added.simple_id_to_token(id).or_else(|| tokenizer.get_model().id_to_token(id));
        let (mut bytes, mut ends) = (vec![], vec![]);
        for id in 0..num_ids {
            let is_whole = spelling(id).is_some_and(|token| rules.spell(&token, &mut bytes));
            ends.push((u32::try_from(bytes.len()).ok()?, is_whole));
        }
        Some(Self { bytes, ends, cut: rules.cut, replaces_each_byte: rules.has_byte_fallback })
    }

    /// What an id spells; nothing if it is not in the vocabulary.
    pub fn piece(&self, id: u32) -> Piece<'_> {
        let id = id as usize;
        let Some((end, is_whole)) = self.ends.get(id).copied() else { return Piece::default() };
        let start = if id == 0 { 0 } else { self.ends[id - 1].0 };
        Piece { bytes: &self.bytes[start as usize..end as usize], is_whole }
    }

    /// Bytes of the longest piece.
    pub fn longest(&self) -> usize {
        (0..self.ends.len() as u32).map(|id| self.piece(id).bytes.len()).max().unwrap_or(0)
    }

    /// Whether every byte is a piece, so that no text lacks tokens.
    pub fn has_all_bytes(&self) -> bool {
        let mut has = [false; 256];
        for id in 0..self.ends.len() as u32 {
            if let Piece { bytes: [byte], .. } = self.piece(id) {
                has[usize::from(*byte)] = true;
            }
        }
        has.iter().all(|has| *has)
    }
}

/// How a decoder makes bytes of a token.
struct Rules {
    is_byte_level: bool,
    has_byte_fallback: bool,
    replace: Vec<(String, String)>,
    cut: Cut,
}

impl Rules {
    /// The rules of a decoder as `tokenizer.json` writes it; `None` for one in which neighbours matter.
    fn read(decoder: &Value) -> Option<Self> {
        let mut rules = Self { is_byte_level: false, has_byte_fallback: false, replace: vec![], cut: Cut::None };
        let steps = match decoder["type"].as_str()? {
            "Sequence" => decoder["decoders"].as_array()?.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let mut is_fused = false;
        for (n, step) in steps.iter().enumerate() {
            match step["type"].as_str()? {
                "ByteLevel" if steps.len() == 1 => rules.is_byte_level = true,
                "Metaspace" if n == 0 && steps.len() == 1 => {
                    rules.replace.push((step["replacement"].as_str()?.into(), " ".into()));
                    rules.cut = if step["prepend_scheme"] == "never" { Cut::None } else { Cut::FirstToken };
                }
                "Replace" if !rules.has_byte_fallback && !is_fused => {
                    let replaced = step["pattern"]["String"].as_str().filter(|text| !text.is_empty())?;
                    rules.replace.push((replaced.into(), step["content"].as_str()?.into()));
                }
                "ByteFallback" if !is_fused => rules.has_byte_fallback = true,
                "Fuse" => is_fused = true,
                "Strip" if is_fused && step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => {
                    rules.cut = Cut::Space;
                }
                _ => return None,
            }
        }
        Some(rules)
    }

    /// Appends a token's bytes; whether they are whole characters.
    fn spell(&self, token: &str, bytes: &mut Vec<u8>) -> bool {
        if self.is_byte_level {
            let spelled: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            bytes.extend(spelled.unwrap_or_else(|| token.as_bytes().to_vec()));
            return false;
        }
        let mut text = token.to_owned();
        for (replaced, by) in &self.replace {
            text = text.replace(replaced, by);
        }
        let byte = self.has_byte_fallback.then(|| fallback_byte(&text)).flatten();
        match byte {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(text.as_bytes()),
        }
        byte.is_none()
    }
}

/// The byte that `<0x41>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of a byte-level vocabulary stands for: printable ones of Latin-1 stand for themselves, the
/// others follow from U+0100 on, in their order (GPT-2).
fn byte_of(c: char) -> Option<u8> {
    let is_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = u32::from(c);
    match u8::try_from(code) {
        Ok(byte) => is_itself(byte).then_some(byte),
        Err(_) => (0..=255).filter(|byte| !is_itself(*byte)).nth(usize::try_from(code - 256).ok()?),
    }
}
