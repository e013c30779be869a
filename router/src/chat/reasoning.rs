//! Keeps what a model thinks apart from what it answers, where its template marks the difference.

use super::held::{Found, find};

/// The marks around what a model thinks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Marks {
    /// Before it.
    pub start: &'static str,
    /// Behind it.
    pub end: &'static str,
}

/// Those that are in use.
const KNOWN: [Marks; 2] = [Marks { start: "<think>", end: "</think>" }, Marks { start: "[THINK]", end: "[/THINK]" }];

/// The marks that a template mentions.
pub fn detect(mentions: impl Fn(&str) -> bool) -> Option<Marks> {
    KNOWN.into_iter().find(|marks| mentions(marks.start) || mentions(marks.end))
}

/// Some text, and which it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Part {
    /// Of what is thought.
    Reasoning(String),
    /// Of the answer.
    Content(String),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// It may begin with the mark.
    Start,
    Inside,
    Outside,
}

/// Splits one answer. White space next to a mark belongs to the mark.
#[derive(Debug)]
pub struct Splitter {
    marks: Option<Marks>,
    place: Place,
    held: String,
    /// Something was thought already.
    has_reasoning: bool,
    /// White space that comes next is dropped.
    skips_space: bool,
}

impl Splitter {
    /// A splitter for the answer to a prompt; without marks all is content.
    pub fn new(marks: Option<Marks>, prompt: &str) -> Self {
        let is_inside = marks.is_some_and(|marks| prompt.trim_end().ends_with(marks.start));
        let place = match marks {
            Some(_) if is_inside => Place::Inside,
            Some(_) => Place::Start,
            None => Place::Outside,
        };
        Self { marks, place, held: String::new(), has_reasoning: false, skips_space: is_inside }
    }

    /// Whether a special token stands for a mark.
    pub fn is_mark(&self, text: &str) -> bool {
        self.marks.is_some_and(|marks| text == marks.start || text == marks.end)
    }

    /// Takes more of the answer.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        let Some(marks) = self.marks.filter(|_| self.place != Place::Outside || self.skips_space) else {
            return if text.is_empty() { vec![] } else { vec![Part::Content(text.into())] };
        };
        self.held.push_str(text);
        let mut parts = vec![];
        if self.place == Place::Start {
            let begun = self.held.trim_start();
            if let Some(rest) = begun.strip_prefix(marks.start) {
                self.held = rest.to_owned();
                (self.place, self.skips_space) = (Place::Inside, true);
            } else if marks.start.starts_with(begun) {
                return parts;
            } else {
                self.place = Place::Outside;
            }
        }
        if self.place == Place::Inside {
            self.skip_space();
            let (end, is_over) = match find(&self.held, marks.end) {
                Found::At(at) => (at, true),
                Found::MayBeginAt(at) => (at, false),
            };
            let reasoning = self.held[..end].trim_end();
            if !reasoning.is_empty() {
                self.has_reasoning = true;
                parts.push(Part::Reasoning(reasoning.to_owned()));
            }
            let length = reasoning.len();
            if !is_over {
                self.held.drain(..length);
                return parts;
            }
            self.held.drain(..end + marks.end.len());
            (self.place, self.skips_space) = (Place::Outside, true);
        }
        self.skip_space();
        let content = std::mem::take(&mut self.held);
        if !content.is_empty() {
            parts.push(Part::Content(content));
        }
        parts
    }

    fn skip_space(&mut self) {
        if self.skips_space {
            let kept = self.held.trim_start().len();
            self.held.drain(..self.held.len() - kept);
            self.skips_space = self.held.is_empty();
        }
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> Option<Part> {
        let rest = std::mem::take(&mut self.held);
        match self.place {
            Place::Inside => {
                Some(rest.trim_end()).filter(|rest| !rest.is_empty()).map(|rest| Part::Reasoning(rest.into()))
            }
            _ => Some(rest).filter(|rest| !rest.is_empty()).map(Part::Content),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn split(prompt: &str, answer: &str, mut cut: impl FnMut() -> bool) -> (String, String) {
        let mut splitter = Splitter::new(detect(|mark| mark == "</think>"), prompt);
        let (mut reasoning, mut content, mut piece) = (String::new(), String::new(), String::new());
        let mut parts = vec![];
        for c in answer.chars() {
            piece.push(c);
            if cut() {
                parts.extend(splitter.push(&std::mem::take(&mut piece)));
            }
        }
        parts.extend(splitter.push(&piece));
        parts.extend(splitter.finish());
        for part in parts {
            match part {
                Part::Reasoning(text) => reasoning.push_str(&text),
                Part::Content(text) => content.push_str(&text),
            }
        }
        (reasoning, content)
    }

    #[test]
    fn however_it_is_cut_what_is_thought_is_kept_apart() {
        for (prompt, answer, reasoning, content) in [
            ("", "<think>\nhm\n ok </thin\n</think>\n\nYes.\n", "hm\n ok </thin", "Yes.\n"),
            ("", "\n <think></think>Yes", "", "Yes"),
            ("", "<thin", "", "<thin"),
            ("", " plain <think> text", "", " plain <think> text"),
            ("<think>\n", "hm</think> Yes", "hm", "Yes"),
            ("<think>\n", "never\n over </", "never\n over </", ""),
            ("<think>\n\n</think>\n\n", "Yes", "", "Yes"),
            ("", "  ", "", "  "),
        ] {
            for seed in 0..200 {
                let mut rng = StdRng::seed_from_u64(seed);
                let got = split(prompt, answer, || rng.random_bool(0.5));
                assert_eq!(got, (reasoning.to_owned(), content.to_owned()), "seed {seed}: {prompt:?} {answer:?}");
            }
        }
    }
}
