//! Finds tool calls in what a model writes, in the format that its family was trained on, while it is written.

use std::collections::HashSet;

use super::held::{Found, find};
use super::piece::Piece;
use super::scanner::{Call, Extent, Known};

/// How a family of models writes its calls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen.
    Hermes,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` or `[TOOL_CALLS]name[ARGS]{…}`: Mistral.
    Mistral,
    /// The answer is `{"name": …, "parameters": {…}}`, several with `;` between them: Llama 3, and what is asked for in
    /// words.
    Json,
}

impl Format {
    /// The format that a template mentions.
    pub fn detect(mentions: impl Fn(&str) -> bool) -> Self {
        match () {
            () if mentions("[TOOL_CALLS]") => Self::Mistral,
            () if mentions("<tool_call>") => Self::Hermes,
            () => Self::Json,
        }
    }

    /// What stands before a call, or the first of them.
    fn mark(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Json => "<|python_tag|>",
        }
    }

    /// Whether a special token stands for a mark of the format.
    fn has_mark(self, text: &str) -> bool {
        text == self.mark()
            || match self {
                Self::Hermes => text == "</tool_call>",
                Self::Mistral => matches!(text, "[ARGS]" | "[CALL_ID]"),
                Self::Json => false,
            }
    }
}

#[derive(Debug)]
enum Mode {
    /// The answer may be a call.
    Start,
    Text,
    /// After a mark.
    BeforeCall,
    Call(Box<Call>),
    /// After a call, where another may follow without a mark of its own.
    AfterCall,
    /// Mistral's name before its arguments.
    Name,
    /// Mistral's arguments behind their name.
    Arguments(Extent),
}

/// Splits one answer into text and calls. White space around calls belongs to them.
#[derive(Debug)]
pub struct Parser {
    format: Format,
    names: HashSet<String>,
    mode: Mode,
    held: String,
    /// What was read of a call that may turn out to be none.
    opened: String,
    is_list: bool,
    num_calls: usize,
    pieces: Vec<Piece>,
}

impl Parser {
    /// A parser for the answer to a request with tools of these names.
    pub fn new(format: Format, names: impl IntoIterator<Item = String>) -> Self {
        let mode = if format == Format::Json { Mode::Start } else { Mode::Text };
        Self {
            format,
            names: names.into_iter().collect(),
            mode,
            held: String::new(),
            opened: String::new(),
            is_list: false,
            num_calls: 0,
            pieces: vec![],
        }
    }

    /// Whether a special token is part of the format.
    pub fn is_mark(&self, text: &str) -> bool {
        self.format.has_mark(text)
    }

    /// Calls that were found.
    pub fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Takes more of the answer.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        while self.step() {}
        std::mem::take(&mut self.pieces)
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> Vec<Piece> {
        match std::mem::replace(&mut self.mode, Mode::Text) {
            Mode::Call(call) if call.is_named() => self.held.clear(),
            Mode::Arguments(_) => self.held.clear(),
            Mode::Call(call) => self.no_call(call.raw()),
            Mode::Start | Mode::Text | Mode::BeforeCall | Mode::AfterCall | Mode::Name => {}
        }
        let opened = std::mem::take(&mut self.opened);
        let rest = opened + &std::mem::take(&mut self.held);
        if self.num_calls == 0 || !rest.trim().is_empty() {
            self.content(rest);
        }
        std::mem::take(&mut self.pieces)
    }

    fn content(&mut self, text: String) {
        match self.pieces.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Content(before)) => before.push_str(&text),
            _ => self.pieces.push(Piece::Content(text)),
        }
    }

    /// What looked like a call is text.
    fn no_call(&mut self, raw: &str) {
        let text = std::mem::take(&mut self.opened) + raw;
        self.content(text);
        self.mode = Mode::Text;
    }

    /// Moves what was skipped from the front of the held text to what was opened.
    fn skip(&mut self, skipped: impl Fn(char) -> bool) {
        let length = self.held.len() - self.held.trim_start_matches(skipped).len();
        self.opened.extend(self.held.drain(..length));
    }

    /// Reads on; `false` if it takes more text to do so.
    fn step(&mut self) -> bool {
        match &mut self.mode {
            Mode::Text => self.text(),
            Mode::Start | Mode::BeforeCall => self.before_call(),
            Mode::Call(_) => self.call(),
            Mode::AfterCall => self.after_call(),
            Mode::Name => self.name(),
            Mode::Arguments(_) => self.arguments(),
        }
    }

    fn text(&mut self) -> bool {
        let mark = self.format.mark();
        let (end, is_found) = match find(&self.held, mark) {
            Found::At(at) => (at, true),
            Found::MayBeginAt(at) => (at, false),
        };
        let length = self.held[..end].trim_end().len();
        let text = self.held[..length].to_owned();
        let between_calls = self.num_calls > 0 && text.trim().is_empty();
        self.held.drain(..if is_found { end + mark.len() } else { length });
        if !between_calls {
            self.content(text);
        }
        if is_found {
            mark.clone_into(&mut self.opened);
            self.mode = Mode::BeforeCall;
        }
        is_found
    }

    fn before_call(&mut self) -> bool {
        self.skip(char::is_whitespace);
        let is_start = matches!(self.mode, Mode::Start);
        match self.held.chars().next() {
            None => false,
            Some('{') => {
                self.mode = Mode::Call(Box::default());
                true
            }
            Some('[') if self.format == Format::Mistral && !self.is_list => {
                self.is_list = true;
                self.opened.extend(self.held.drain(..1));
                true
            }
            Some(_) if self.format == Format::Mistral && !self.is_list => {
                self.mode = Mode::Name;
                true
            }
            // The mark may come first.
            Some(_) if is_start && self.format.mark().starts_with(&self.held) && self.held != self.format.mark() => {
                false
            }
            Some(_) => {
                self.is_list = false;
                self.no_call("");
                true
            }
        }
    }

    fn call(&mut self) -> bool {
        let Mode::Call(call) = &mut self.mode else { return false };
        let taken = call.push(&self.held);
        self.held.drain(..taken);
        let is_known = call.name().is_none_or(|name| self.names.contains(name));
        let is_complete = call.is_complete();
        // Nothing but its name tells such a call from an answer that is JSON.
        if self.format == Format::Json && !is_known {
            let raw = call.raw().to_owned();
            self.no_call(&raw);
            return true;
        }
        let was_named = call.is_named();
        let known = call.tell();
        let is_no_call = is_complete && !call.is_named();
        let raw = if is_no_call { call.raw().to_owned() } else { String::new() };
        let begins = !was_named && call.is_named();
        self.tell(known, begins);
        if is_no_call {
            self.no_call(&raw);
            return true;
        }
        if is_complete {
            self.mode = Mode::AfterCall;
        }
        is_complete
    }

    fn tell(&mut self, known: Vec<Known>, begins: bool) {
        if begins {
            self.num_calls += 1;
            self.opened.clear();
        }
        for known in known {
            let index = self.num_calls.saturating_sub(1);
            self.pieces.push(match known {
                Known::Name(name) => Piece::Call { index, name },
                Known::Arguments(text) => Piece::Arguments { index, text },
            });
        }
    }

    fn after_call(&mut self) -> bool {
        self.skip(char::is_whitespace);
        match self.format {
            Format::Hermes => {
                let mark = "</tool_call>";
                if self.held.len() < mark.len() && mark.starts_with(&self.held) {
                    return false;
                }
                if self.held.starts_with(mark) {
                    self.held.drain(..mark.len());
                }
                self.mode = Mode::Text;
            }
            Format::Mistral => match self.held.chars().next() {
                None => return false,
                Some(',') if self.is_list => {
                    self.held.drain(..1);
                    self.mode = Mode::BeforeCall;
                }
                Some(']') if self.is_list => {
                    self.held.drain(..1);
                    (self.is_list, self.mode) = (false, Mode::Text);
                }
                Some(_) => (self.is_list, self.mode) = (false, Mode::Text),
            },
            Format::Json => {
                self.skip(|c| c.is_whitespace() || matches!(c, ';' | ','));
                match self.held.chars().next() {
                    None => return false,
                    Some('{') => self.mode = Mode::Call(Box::default()),
                    Some(_) => self.mode = Mode::Text,
                }
            }
        }
        if !matches!(self.mode, Mode::Call(_)) {
            self.opened.clear();
        }
        true
    }

    fn name(&mut self) -> bool {
        let Some(at) = self.held.find('{') else { return false };
        let name = self.held[..at].split('[').next().unwrap_or_default().trim().to_owned();
        if name.is_empty() || name.contains(char::is_whitespace) {
            self.no_call("");
            return true;
        }
        self.held.drain(..at);
        self.tell(vec![Known::Name(name)], true);
        self.mode = Mode::Arguments(Extent::default());
        true
    }

    fn arguments(&mut self) -> bool {
        let Mode::Arguments(extent) = &mut self.mode else { return false };
        let end = self.held.char_indices().find_map(|(at, c)| extent.push(c).then_some(at + c.len_utf8()));
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        if !text.is_empty() {
            self.tell(vec![Known::Arguments(text)], false);
        }
        if end.is_some() {
            self.mode = Mode::Text;
        }
        end.is_some()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Content, and calls with their arguments.
    type Answer = (String, Vec<(String, String)>);

    fn parse(format: Format, text: &str, mut cut: impl FnMut() -> bool) -> Answer {
        let mut parser = Parser::new(format, ["f".to_owned(), "g".to_owned()]);
        let (mut events, mut piece) = (vec![], String::new());
        for c in text.chars() {
            piece.push(c);
            if cut() {
                events.extend(parser.push(&std::mem::take(&mut piece)));
            }
        }
        events.extend(parser.push(&piece));
        events.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), vec![]);
        for event in events {
            match event {
                Piece::Content(text) => content.push_str(&text),
                Piece::Call { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                Piece::Arguments { index, text } => calls[index].1.push_str(&text),
                Piece::Reasoning(text) => panic!("no parser of calls knows thoughts: {text:?}"),
            }
        }
        (content, calls)
    }

    #[track_caller]
    fn check(format: Format, text: &str, content: &str, calls: &[(&str, &str)]) {
        let calls: Vec<_> =
            calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect();
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let got = parse(format, text, || rng.random_bool(0.4));
            assert_eq!(got, (content.to_owned(), calls.clone()), "seed {seed}: {text:?}");
        }
    }

    #[test]
    fn calls_of_hermes_and_qwen_are_found_however_the_text_is_cut() {
        let one = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\"}}\n</tool_call>";
        check(Format::Hermes, one, "", &[("f", r#"{"a": "</tool_call>"}"#)]);
        let two =
            format!("Let me see.\n{one}\n<tool_call>{{\"name\": \"unknown\", \"arguments\": {{}}}}</tool_call>\n");
        check(Format::Hermes, &two, "Let me see.", &[("f", r#"{"a": "</tool_call>"}"#), ("unknown", "{}")]);
        check(Format::Hermes, "no <tool_ call at all \n", "no <tool_ call at all \n", &[]);
        check(Format::Hermes, "<tool_call>sorry</tool_call>", "<tool_call>sorry</tool_call>", &[]);
        check(Format::Hermes, "<tool_call>{\"a\": 1", "<tool_call>{\"a\": 1", &[]);
        check(Format::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\"", "", &[("f", "{\"a\"")]);
    }

    #[test]
    fn calls_of_mistral_are_found_in_both_forms() {
        let list = r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]"#;
        check(Format::Mistral, list, "", &[("f", r#"{"a": [1]}"#), ("g", "{}")]);
        let named = r#"Sure.[TOOL_CALLS]f[ARGS]{"a": "}"}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}"#;
        check(Format::Mistral, named, "Sure.", &[("f", r#"{"a": "}"}"#), ("g", "{}")]);
        check(Format::Mistral, "plain [TOOL text", "plain [TOOL text", &[]);
        check(Format::Mistral, "[TOOL_CALLS]", "[TOOL_CALLS]", &[]);
    }

    #[test]
    fn an_answer_that_is_json_is_a_call_only_of_a_tool_that_exists() {
        check(Format::Json, r#"{"name": "f", "parameters": {"a": 1}}"#, "", &[("f", r#"{"a": 1}"#)]);
        let two =
            "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {\"b\": null}}";
        check(Format::Json, two, "", &[("f", "{}"), ("g", r#"{"b": null}"#)]);
        check(Format::Json, r#"{"name": "Bob", "age": 7} is it"#, r#"{"name": "Bob", "age": 7} is it"#, &[]);
        check(Format::Json, r#"{"age": 7}"#, r#"{"age": 7}"#, &[]);
        check(Format::Json, "text {\"name\": \"f\"}", "text {\"name\": \"f\"}", &[]);
        check(Format::Json, " \n", " \n", &[]);
        check(Format::Json, "<|python_tag|>f.call(1)", "<|python_tag|>f.call(1)", &[]);
    }

    #[test]
    fn nothing_is_held_back_that_cannot_be_a_call() {
        let mut parser = Parser::new(Format::Hermes, []);
        assert_eq!(parser.push("Hello <"), [Piece::Content("Hello".into())]);
        assert_eq!(parser.push("b> you"), [Piece::Content(" <b> you".into())]);
    }
}
