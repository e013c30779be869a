//! An answer as its reader sees it: what was thought, what is said, which tools are called.

pub use super::piece::Piece;
use super::reasoning::{Marks, Part, Splitter};
use super::tools::{Format, Parser};

/// Reads one answer, token by token.
#[derive(Debug)]
pub struct Reader {
    splitter: Splitter,
    parser: Option<Parser>,
    /// Calls after the first are dropped.
    takes_one_call: bool,
    /// Of a call that is cut short before its name is known, nothing can be told: it is no text of the answer.
    takes_calls_alone: bool,
}

impl Reader {
    /// A reader of the answer to `prompt`, in a dialect. No tools: no calls are looked for.
    pub fn new(dialect: Dialect, prompt: &str, tools: &[String], takes_one_call: bool) -> Self {
        let parser = (!tools.is_empty()).then(|| Parser::new(dialect.format, tools.iter().cloned()));
        Self { splitter: Splitter::new(dialect.marks, prompt), parser, takes_one_call, takes_calls_alone: false }
    }

    /// A reader of an answer whose form is given: nothing in it is thought, and with tools it is a call and nothing else.
    pub fn of_form(tools: &[String]) -> Self {
        let dialect = Dialect { marks: None, format: Format::Json };
        Self { takes_calls_alone: true, ..Self::new(dialect, "", tools, true) }
    }

    /// Takes a token's text. Special tokens are no text, save for those that mark something.
    pub fn push(&mut self, text: &str, is_special: bool) -> Vec<Piece> {
        let is_mark = self.splitter.is_mark(text) || self.parser.as_ref().is_some_and(|parser| parser.is_mark(text));
        if is_special && !is_mark {
            return vec![];
        }
        let parts = self.splitter.push(text);
        self.read(parts)
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> Vec<Piece> {
        let rest = self.splitter.finish();
        let mut pieces = self.read(rest);
        if let Some(parser) = &mut self.parser {
            let last = parser.finish();
            pieces.extend(self.told(last));
        }
        pieces
    }

    /// Whether a tool was called.
    pub fn has_calls(&self) -> bool {
        self.parser.as_ref().is_some_and(|parser| parser.num_calls() > 0)
    }

    fn read(&mut self, parts: impl IntoIterator<Item = Part>) -> Vec<Piece> {
        let mut pieces = vec![];
        for part in parts {
            match (part, &mut self.parser) {
                (Part::Reasoning(text), _) => pieces.push(Piece::Reasoning(text)),
                (Part::Content(text), None) => pieces.push(Piece::Content(text)),
                (Part::Content(text), Some(parser)) => {
                    let found = parser.push(&text);
                    pieces.extend(self.told(found));
                }
            }
        }
        pieces
    }

    /// Those of a parser's that are told.
    fn told(&self, pieces: Vec<Piece>) -> impl Iterator<Item = Piece> + use<> {
        let (most, has_content) = (if self.takes_one_call { 1 } else { usize::MAX }, !self.takes_calls_alone);
        pieces.into_iter().filter(move |piece| match piece {
            Piece::Reasoning(_) => true,
            Piece::Content(_) => has_content,
            Piece::Call { index, .. } | Piece::Arguments { index, .. } => *index < most,
        })
    }
}

/// How a model marks what it thinks, and writes its calls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Dialect {
    /// Around what it thinks, if it marks that.
    pub marks: Option<Marks>,
    /// Of its calls.
    pub format: Format,
}

impl Dialect {
    /// What a template mentions.
    pub fn detect(mentions: impl Fn(&str) -> bool) -> Self {
        Self { marks: super::reasoning::detect(&mentions), format: Format::detect(&mentions) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(template: &str, tokens: &[(&str, bool)], takes_one_call: bool) -> Vec<Piece> {
        let dialect = Dialect::detect(|mark| template.contains(mark));
        let mut reader = Reader::new(dialect, "", &["f".into()], takes_one_call);
        let mut pieces: Vec<_> = tokens.iter().flat_map(|(text, special)| reader.push(text, *special)).collect();
        pieces.extend(reader.finish());
        pieces
    }

    #[test]
    fn special_tokens_are_marks_or_nothing() {
        let tokens =
            [("<s>", true), ("[TOOL_CALLS]", true), ("f", false), ("[ARGS]", true), ("{}", false), ("</s>", true)];
        let call = [Piece::Call { index: 0, name: "f".into() }, Piece::Arguments { index: 0, text: "{}".into() }];
        assert_eq!(read("[TOOL_CALLS]", &tokens, false), call);
        let hermes = [("<think>", true), ("hm", false), ("</think>", true), ("yes", false), ("<|im_end|>", true)];
        let pieces = read("<think> <tool_call>", &hermes, false);
        assert_eq!(pieces, [Piece::Reasoning("hm".into()), Piece::Content("yes".into())]);
    }

    #[test]
    fn a_forced_call_that_is_cut_short_is_no_text() {
        let read = |tools: &[String], text: &str| {
            let mut reader = Reader::of_form(tools);
            let mut pieces = reader.push(text, false);
            pieces.extend(reader.finish());
            (pieces, reader.has_calls())
        };
        let call = r#"{"name": "f", "parameters": {"a": 1}}"#;
        for end in 1..call.len() {
            let (pieces, has_calls) = read(&["f".into()], &call[..end]);
            assert!(pieces.iter().all(|piece| !matches!(piece, Piece::Content(_))), "{pieces:?}");
            assert_eq!(has_calls, !pieces.is_empty(), "{pieces:?}");
        }
        assert_eq!(read(&[], call), (vec![Piece::Content(call.into())], false), "without tools it is JSON");
    }

    #[test]
    fn calls_after_the_first_are_dropped_where_one_is_wanted() {
        let two = [(r#"{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 1}}"#, false)];
        let count = |pieces: Vec<Piece>| pieces.iter().filter(|piece| matches!(piece, Piece::Call { .. })).count();
        assert_eq!((count(read("", &two, false)), count(read("", &two, true))), (2, 1));
    }
}
