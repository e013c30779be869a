//! Text in, ids out, and back: pure functions of their input, tested without a model.

pub mod detokenizer;
mod pieces;
pub mod stop_strings;
pub mod tokenizer;
mod words;
