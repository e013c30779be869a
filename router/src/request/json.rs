//! A body of JSON as a value of a wire type, and what serde says in the words of JSON.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::limits::MAX_DEPTH;
use super::{Refused, invalid};

/// Reads a JSON object, or `null` for one without fields. Left alone, serde takes a list of the fields' values as well.
pub(super) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de> + Default> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a JSON object")
        }

        fn visit_unit<E>(self) -> Result<T, E> {
            Ok(T::default())
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(Object(PhantomData))
}

/// JSON to a body.
pub fn read<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, Refused> {
    // serde refuses what is nested deeper, but not in the fields that nobody reads.
    if let Ok(text) = std::str::from_utf8(body)
        && text.trim_start().starts_with('{')
        && let Ok(value) = serde_json::from_str(text)
        && depth(text) <= MAX_DEPTH
    {
        return Ok(value);
    }
    refuse_or_read(body)
}

/// The same, to tell what is wrong. First the whole is checked to be JSON, so that what is none is told from what asks for
/// something odd; that needs no memory and no stack, however deep it is.
fn refuse_or_read<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, Refused> {
    let malformed = |cause: &str| Refused::Malformed(format!("the body is not valid JSON: {cause}"));
    let text = std::str::from_utf8(body).map_err(|_| malformed("it is not UTF-8"))?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| malformed(&short(error.to_string(), 300)))?;
    if depth(text) > MAX_DEPTH {
        return Err(invalid(format!("the body is nested deeper than {MAX_DEPTH} levels")));
    }
    if !text.trim_start().starts_with('{') {
        return Err(invalid("the body must be a JSON object"));
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let cause = in_words(error.inner());
        let path = error.path();
        let is_field = path.iter().next().is_some();
        invalid(if is_field { format!("`{path}`: {cause}") } else { cause })
    })
}

/// How deep lists and objects are nested in a text that is JSON.
fn depth(json: &str) -> usize {
    let (json, mut at, mut depth, mut deepest) = (json.as_bytes(), 0, 0_usize, 0);
    while let Some(byte) = json.get(at) {
        at += 1;
        match byte {
            b'"' => at = behind_string(json, at),
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// Where a string has ended whose first character stands at `at`. Most of a long body is one string, which this leaps over.
fn behind_string(json: &[u8], mut at: usize) -> usize {
    while let Some(found) = json.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
        at += found + 1;
        if json[at - 1] == b'"' {
            return at;
        }
        at += 1;
    }
    json.len()
}

/// Without most of what the client has sent.
pub(super) fn short(mut text: String, most: usize) -> String {
    if let Some((at, _)) = text.char_indices().nth(most) {
        text.truncate(at);
    }
    text
}

/// What serde says, in the words of JSON rather than of Rust. What the client has sent stands before the last comma.
pub(super) fn in_words(error: &serde_json::Error) -> String {
    let cause = error.to_string();
    let Some((found, expected)) = cause.rsplit_once(", expected ") else { return short(cause, 300) };
    let (name, rest) = expected.split_once(' ').unwrap_or((expected, ""));
    let is_too_large = found.contains("invalid value: integer");
    let words = match name {
        "f64" => "a number",
        "i64" if is_too_large => "a smaller one",
        "i64" => "an integer",
        "u64" => "an integer from 0 to 18446744073709551615",
        other => other,
    };
    format!("{}, expected {words} {rest}", short(found.into(), 200)).trim_end().into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// As serde has read it.
    fn levels(value: &Value) -> usize {
        match value {
            Value::Array(values) => 1 + values.iter().map(levels).max().unwrap_or(0),
            Value::Object(fields) => 1 + fields.values().map(levels).max().unwrap_or(0),
            _ => 0,
        }
    }

    #[test]
    fn the_depth_of_a_text_is_that_of_the_value_that_serde_reads() {
        let odd = ["", "\"", "\\", "\\\"", "[{", "]}", "a\"]\\", "é\u{1f642}[", "\n\t\\\\\"{", &"x[".repeat(5000)];
        for text in odd {
            for after in odd {
                let value = json!({text: [after, {after: text}, [[text, 1.5, null]]], "b": [[[[after]]]]});
                assert_eq!(depth(&value.to_string()), levels(&value), "{value}");
                assert_eq!(depth(&Value::from(text).to_string()), 0);
            }
        }
    }
}
