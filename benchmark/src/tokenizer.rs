//! A tokenizer with more entries than the shipped models have.

use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

/// The text of a byte-level BPE `tokenizer.json` whose vocabulary is filled up to `vocab_size` entries.
///
/// A new entry is a space, a letter run that no other entry has, and no merge leads to it: prompts are tokenized as
/// before, and every id below `vocab_size` has a text.
pub fn extend(tokenizer: &str, vocab_size: u32) -> anyhow::Result<String> {
    let mut tokenizer: Value = serde_json::from_str(tokenizer).context("tokenizer.json: not JSON")?;
    anyhow::ensure!(
        tokenizer["model"]["type"] == "BPE" && tokenizer["decoder"]["type"] == "ByteLevel",
        "tokenizer.json: found model {} with decoder {}, expected byte-level BPE",
        tokenizer["model"]["type"],
        tokenizer["decoder"]["type"]
    );
    let vocab = tokenizer["model"]["vocab"].as_object_mut().context("tokenizer.json: no vocabulary")?;
    let highest = vocab.values().filter_map(Value::as_u64).max().context("tokenizer.json: an empty vocabulary")?;
    let first = highest + 1;
    anyhow::ensure!(
        first <= u64::from(vocab_size),
        "tokenizer.json: found {first} entries, expected {vocab_size} at most; ask for a larger vocabulary"
    );
    for id in first..u64::from(vocab_size) {
        vocab.insert(format!("Ġxq{}", letters(id)), json!(id));
    }
    Ok(tokenizer.to_string())
}

/// Copies the tokenizer and configuration files of a model, with its vocabulary filled up to `vocab_size`; no weights.
pub fn copy_extended(model_dir: &Path, vocab_size: u32, target: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(model_dir).with_context(|| format!("reading the model {}", model_dir.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|extension| extension == "json"))
        else {
            continue;
        };
        if name == "tokenizer.json" {
            let text = std::fs::read_to_string(&path)?;
            std::fs::write(target.join(name), extend(&text, vocab_size)?)?;
        } else if name != "reference.json" {
            std::fs::copy(&path, target.join(name))?;
        }
    }
    anyhow::ensure!(
        target.join("tokenizer.json").exists(),
        "{}: found no tokenizer.json, expected a model folder",
        model_dir.display()
    );
    Ok(())
}

fn letters(mut number: u64) -> String {
    let mut text = String::new();
    loop {
        text.push(char::from(b'a' + (number % 26) as u8));
        number /= 26;
        if number == 0 {
            return text;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_of_the_larger_vocabulary_has_one_text_and_the_old_ones_stay() {
        let shipped = include_str!("../../models/docs-llama-7m/tokenizer.json");
        let before: Value = serde_json::from_str(shipped).unwrap();
        let after: Value = serde_json::from_str(&extend(shipped, 32_000).unwrap()).unwrap();
        let vocab = after["model"]["vocab"].as_object().unwrap();
        let mut ids: Vec<u64> = vocab.values().map(|id| id.as_u64().unwrap()).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..32_000));
        for (text, id) in before["model"]["vocab"].as_object().unwrap() {
            assert_eq!(&vocab[text], id);
        }
    }

    #[test]
    fn a_vocabulary_cannot_shrink_and_other_tokenizers_are_refused() {
        let shipped = include_str!("../../models/docs-llama-7m/tokenizer.json");
        assert!(extend(shipped, 100).unwrap_err().to_string().contains("found 4096 entries"));
        assert!(extend(r#"{"model":{"type":"Unigram"}}"#, 100).unwrap_err().to_string().contains("Unigram"));
    }
}
