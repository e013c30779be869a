//! `tokenizer.json`, read by the `tokenizers` library.
