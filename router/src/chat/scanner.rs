//! One tool call as a JSON object that arrives in pieces: its name as soon as that is known, its arguments as they come.

/// What became known of a call.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Known {
    /// It has a name, and its arguments begin.
    Name(String),
    /// More of its arguments.
    Arguments(String),
}

/// How far a value reaches: brackets and strings, nothing else.
#[derive(Debug, Default)]
pub(super) struct Extent {
    depth: usize,
    is_string: bool,
    is_escaped: bool,
}

impl Extent {
    /// Takes the next character; whether an object or list ends with it.
    pub fn push(&mut self, c: char) -> bool {
        if self.is_string {
            match c {
                _ if self.is_escaped => self.is_escaped = false,
                '\\' => self.is_escaped = true,
                '"' => self.is_string = false,
                _ => {}
            }
            return false;
        }
        match c {
            '"' => self.is_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// `{"name": …, "arguments": …}`, or `parameters`, in any order, among other keys.
#[derive(Debug, Default)]
pub(super) struct Call {
    raw: String,
    extent: Extent,
    /// The key whose value comes, or has begun.
    key: Option<String>,
    /// Where the key or value that is being read begins.
    start: Option<usize>,
    name: Option<String>,
    /// Where the arguments begin and, once they do, end.
    arguments: Option<(usize, Option<usize>)>,
    is_named: bool,
    /// How much of the arguments was told.
    told: usize,
    is_complete: bool,
}

impl Call {
    /// All of it so far.
    pub fn raw(&self) -> &str {
        &self.raw
    }

    /// Its name, once that is known.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whether [`Known::Name`] was told.
    pub fn is_named(&self) -> bool {
        self.is_named
    }

    /// Whether the object has ended.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Takes what belongs to the call from the front of `text`; how many bytes that was.
    pub fn push(&mut self, text: &str) -> usize {
        for (at, c) in text.char_indices() {
            self.take(c);
            if self.is_complete {
                return at + c.len_utf8();
            }
        }
        text.len()
    }

    fn take(&mut self, c: char) {
        let at = self.raw.len();
        let (was_deep, was_string) = (self.extent.depth, self.extent.is_string);
        self.raw.push(c);
        self.is_complete = self.extent.push(c);
        if was_deep != 1 {
            // Inside a value, or just out of one.
            if was_deep == 2 && self.extent.depth == 1 {
                self.end_value(at + c.len_utf8());
            }
            return;
        }
        if was_string {
            if !self.extent.is_string {
                self.end_string(at + 1);
            }
            return;
        }
        match c {
            '"' | '{' | '[' => self.begin(at),
            ',' | '}' => {
                if self.start.is_some() {
                    self.end_value(at);
                }
                self.key = None;
            }
            ':' => {}
            c if !c.is_whitespace() && self.key.is_some() => self.begin(at),
            _ => {}
        }
    }

    fn begin(&mut self, at: usize) {
        if self.start.is_some() {
            return;
        }
        self.start = Some(at);
        if matches!(self.key.as_deref(), Some("arguments" | "parameters")) {
            self.arguments = Some((at, None));
        }
    }

    fn end_string(&mut self, end: usize) {
        if self.key.is_some() {
            return self.end_value(end);
        }
        let start = self.start.take().unwrap_or(end);
        self.key = serde_json::from_str(&self.raw[start..end]).ok();
    }

    fn end_value(&mut self, end: usize) {
        let Some(start) = self.start.take() else { return };
        match self.key.as_deref() {
            Some("name") => self.name = serde_json::from_str(&self.raw[start..end]).ok(),
            Some("arguments" | "parameters") => self.arguments = Some((start, Some(end))),
            _ => {}
        }
        self.key = Some(String::new());
    }

    /// What became known since it was last asked.
    pub fn tell(&mut self) -> Vec<Known> {
        let mut known = vec![];
        let has_arguments = self.arguments.is_some() || self.is_complete;
        if let (false, true, Some(name)) = (self.is_named, has_arguments, &self.name) {
            known.push(Known::Name(name.clone()));
            self.is_named = true;
        }
        if self.is_named {
            let more = self.more_arguments();
            if !more.is_empty() {
                known.push(Known::Arguments(more));
            }
        }
        known
    }

    fn more_arguments(&mut self) -> String {
        let Some((start, end)) = self.arguments else {
            // A tool without arguments.
            return if std::mem::replace(&mut self.told, 1) == 0 { "{}".into() } else { String::new() };
        };
        if self.raw[start..].starts_with('{') {
            let until = end.unwrap_or(self.raw.len());
            let more = self.raw[start + self.told..until].to_owned();
            self.told = until - start;
            return more;
        }
        // Some models write the object as a string, or nothing.
        let (Some(end), 0) = (end, self.told) else { return String::new() };
        self.told = end - start;
        let value = &self.raw[start..end];
        match serde_json::from_str(value) {
            Ok(serde_json::Value::String(text)) => text,
            Ok(serde_json::Value::Null) => "{}".into(),
            _ => value.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str, size: usize) -> (Vec<Known>, usize, bool) {
        let (mut call, mut known, mut taken) = (Call::default(), vec![], 0);
        let chars: Vec<char> = text.chars().collect();
        for chunk in chars.chunks(size) {
            let piece: String = chunk.iter().collect();
            taken += call.push(&piece);
            known.extend(call.tell());
            if call.is_complete() {
                break;
            }
        }
        (known, taken, call.is_complete())
    }

    #[test]
    fn name_and_arguments_are_told_whatever_their_order_and_form() {
        for (text, name, arguments) in [
            (r#"{"name": "f", "arguments": {"a": "}\"{", "b": [1, {}]}}"#, "f", r#"{"a": "}\"{", "b": [1, {}]}"#),
            (r#"{"arguments":{"a":1},"id":7,"name":"f"}"#, "f", r#"{"a":1}"#),
            (r#"{"type": "function", "name": "é", "parameters": {}}"#, "é", "{}"),
            (r#"{"name": "f", "x": {"name": "g", "arguments": 3}, "arguments": "{\"a\": 1}"}"#, "f", r#"{"a": 1}"#),
            (r#"{"name": "f"}"#, "f", "{}"),
            (r#"{"name": "f", "arguments": null}"#, "f", "{}"),
            (r#"{"name": "f", "n": 1.5, "arguments" : {"a": true} }"#, "f", r#"{"a": true}"#),
        ] {
            for size in [1, 2, 3, 7, 1000] {
                let (known, taken, is_complete) = scan(&format!("{text} rest"), size);
                assert!(is_complete && taken == text.len(), "{text} in pieces of {size}");
                assert_eq!(known[0], Known::Name(name.into()), "{text}");
                let told: String = known[1..]
                    .iter()
                    .map(|known| match known {
                        Known::Arguments(more) => more.as_str(),
                        Known::Name(again) => panic!("named twice: {again}"),
                    })
                    .collect();
                assert_eq!(told, arguments, "{text} in pieces of {size}");
            }
        }
    }

    #[test]
    fn arguments_are_told_before_they_end() {
        let (known, _, is_complete) = scan(r#"{"name": "f", "arguments": {"a": [1, 2"#, 1000);
        assert_eq!(known, [Known::Name("f".into()), Known::Arguments(r#"{"a": [1, 2"#.into())]);
        assert!(!is_complete);
    }

    #[test]
    fn what_has_no_name_is_no_call() {
        for text in [r#"{"a": 1}"#, "{}", r#"{"name": 7, "arguments": {}}"#, r#"{"x": {"name": "f"}}"#] {
            let (known, _, is_complete) = scan(text, 1);
            assert_eq!((known, is_complete), (vec![], true), "{text}");
        }
    }
}
