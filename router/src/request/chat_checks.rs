//! Messages and tools of a chat: their shapes, and what is made of them for a template.

use serde_json::{Map, Value, json};

use super::limits::{MAX_MESSAGES, MAX_NAME_CHARS, MAX_TOOLS};
use super::{Refused, invalid};

/// The types that a JSON schema knows.
const SCHEMA_TYPES: [&str; 7] = ["array", "boolean", "integer", "null", "number", "object", "string"];

/// Messages as templates expect them: content is one text, arguments of calls are objects where they are JSON.
pub(super) fn check_messages(messages: Vec<Value>) -> Result<Vec<Value>, Refused> {
    if messages.is_empty() {
        return Err(invalid("`messages` cannot be empty"));
    }
    if messages.len() > MAX_MESSAGES {
        return Err(invalid(format!("`messages` has {} messages, expected at most {MAX_MESSAGES}", messages.len())));
    }
    messages.into_iter().enumerate().map(|(n, message)| check_message(n, message)).collect()
}

fn check_message(n: usize, message: Value) -> Result<Value, Refused> {
    let wrong = |field: &str, expected: &str| invalid(format!("`messages[{n}]{field}`: expected {expected}"));
    let Value::Object(mut message) = message else { return Err(wrong("", "a JSON object")) };
    message.retain(|_, value| !value.is_null());
    for name in ["role", "name", "tool_call_id"] {
        let is_name = |value: &Value| value.as_str().is_some_and(|text| text.chars().count() <= MAX_NAME_CHARS);
        if message.get(name).is_some_and(|value| !is_name(value)) || name == "role" && !message.contains_key(name) {
            return Err(wrong(&format!(".{name}"), &format!("a text of at most {MAX_NAME_CHARS} characters")));
        }
    }
    let calls = match message.remove("tool_calls") {
        None => vec![],
        Some(Value::Array(calls)) => calls,
        Some(_) => return Err(wrong(".tool_calls", "a list")),
    };
    let content = match message.remove("content") {
        // A message of calls needs none, and templates that look for one do not expect a null.
        None if !calls.is_empty() => String::new(),
        None => return Err(wrong(".content", "a text or a list of texts")),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| {
                text_of(part).ok_or_else(|| wrong(".content", "parts of type text, the only one that is served"))
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong(".content", "a text or a list of texts")),
    };
    message.insert("content".into(), content.into());
    if !calls.is_empty() {
        let call = |call| check_call(call).ok_or_else(|| wrong(".tool_calls", "objects with function.name"));
        message.insert("tool_calls".into(), calls.into_iter().map(call).collect::<Result<_, _>>()?);
    }
    // What comes first stays first: templates may list the fields.
    let mut ordered = Map::new();
    for name in ["role", "content"] {
        ordered.extend(message.remove_entry(name));
    }
    ordered.extend(message);
    Ok(ordered.into())
}

fn text_of(part: &Value) -> Option<String> {
    if part.get("type").is_some_and(|kind| kind != "text") {
        return None;
    }
    part.get("text")?.as_str().map(str::to_owned)
}

fn check_call(mut call: Value) -> Option<Value> {
    let function = call.get_mut("function")?.as_object_mut()?;
    function.get("name")?.as_str()?;
    if let Some(Value::String(text)) = function.get("arguments")
        && let Ok(arguments @ Value::Object(_)) = serde_json::from_str(text)
    {
        function.insert("arguments".into(), arguments);
    }
    Some(call)
}

/// Tools with their names, as templates expect them: the schema is called `parameters`.
pub(super) fn check_tools(tools: &[Value]) -> Result<Vec<(String, Value)>, Refused> {
    if tools.len() > MAX_TOOLS {
        return Err(invalid(format!("`tools` has {} tools, expected at most {MAX_TOOLS}", tools.len())));
    }
    let tools: Vec<_> = tools.iter().enumerate().map(|(n, tool)| check_tool(n, tool)).collect::<Result<_, _>>()?;
    for (n, (name, _)) in tools.iter().enumerate() {
        if tools[..n].iter().any(|(other, _)| other == name) {
            return Err(invalid(format!("`tools[{n}].function.name`: {name:?} is another tool's name")));
        }
    }
    Ok(tools)
}

fn check_tool(n: usize, tool: &Value) -> Result<(String, Value), Refused> {
    let wrong = |field: &str, expected: &str| invalid(format!("`tools[{n}]{field}`: expected {expected}"));
    if tool.get("type").is_some_and(|kind| kind != "function") {
        return Err(wrong(".type", "function"));
    }
    let function =
        tool.get("function").and_then(Value::as_object).ok_or_else(|| wrong(".function", "a JSON object"))?;
    let is_name = |name: &&str| !name.is_empty() && name.chars().count() <= MAX_NAME_CHARS;
    let name = function.get("name").and_then(Value::as_str).filter(is_name);
    let name = name.ok_or_else(|| wrong(".function.name", &format!("a text of 1 to {MAX_NAME_CHARS} characters")))?;
    if function.get("description").is_some_and(|text| !text.is_string() && !text.is_null()) {
        return Err(wrong(".function.description", "a text"));
    }
    let parameters = function.get("parameters").or_else(|| function.get("arguments"));
    match parameters {
        None => {}
        Some(Value::Object(_)) => check_types(parameters.unwrap_or(&Value::Null))
            .map_err(|(at, found)| wrong(&format!(".function.parameters{at}"), &format!("a JSON schema; {found}")))?,
        Some(_) => return Err(wrong(".function.parameters", "a JSON schema")),
    }
    let mut function = function.clone();
    if let Some(arguments) = function.remove("arguments") {
        function.entry("parameters").or_insert(arguments);
    }
    Ok((name.to_owned(), json!({"type": "function", "function": function})))
}

/// Whether an expression is one, as far as the dialects agree: JSON schemas speak JavaScript's, which has more.
fn check_pattern(pattern: &str) -> Result<(), String> {
    use regex_syntax::ast::ErrorKind::{EscapeUnexpectedEof, GroupUnclosed, GroupUnopened, RepetitionMissing};
    match regex_syntax::ast::parse::Parser::new().parse(pattern) {
        Err(error)
            if matches!(error.kind(), EscapeUnexpectedEof | GroupUnclosed | GroupUnopened | RepetitionMissing) =>
        {
            let shown: String = pattern.chars().take(50).collect();
            Err(format!("the pattern {shown:?} is no regular expression: {}", error.kind()))
        }
        _ => Ok(()),
    }
}

/// Whether every `type` is one that JSON schemas know, and every `pattern` an expression; what speaks against it, if not.
/// Names of properties may be anything. An error is where, as a JSON pointer, and what.
fn check_types(schema: &Value) -> Result<(), (String, String)> {
    let Some(object) = schema.as_object() else { return Ok(()) };
    for (key, value) in object {
        match (key.as_str(), value) {
            ("type", Value::String(name)) if SCHEMA_TYPES.contains(&name.as_str()) => {}
            ("type", Value::Array(names))
                if names.iter().all(|name| name.as_str().is_some_and(|name| SCHEMA_TYPES.contains(&name))) => {}
            ("type", found) => {
                let found: String = found.to_string().chars().take(50).collect();
                return Err((String::new(), format!("{found} is no type in one")));
            }
            ("pattern", Value::String(pattern)) => check_pattern(pattern).map_err(|found| (String::new(), found))?,
            ("properties" | "$defs" | "definitions" | "patternProperties", Value::Object(schemas)) => {
                for (name, schema) in schemas {
                    check_types(schema).map_err(|(at, found)| (format!("/{key}/{name}{at}"), found))?;
                }
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems", Value::Array(schemas)) => {
                schemas.iter().try_for_each(check_types)?;
            }
            ("items" | "additionalProperties" | "not" | "contains", nested) => check_types(nested)?,
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(message: Value) -> Result<Value, String> {
        check_messages(vec![message]).map(|mut checked| checked.remove(0)).map_err(|refused| refused.to_string())
    }

    #[test]
    fn a_pattern_that_is_none_in_any_dialect_is_refused_and_what_javascript_has_beside_is_not() {
        let check = |pattern: &str| check_types(&json!({"properties": {"a": {"items": {"pattern": pattern}}}}));
        for pattern in ["(", "a)", "*a", "(?:b", "a\\"] {
            let (at, said) = check(pattern).unwrap_err();
            assert_eq!(at, "/properties/a");
            assert!(said.starts_with("the pattern ") && said.contains(" is no regular expression: "), "{said}");
        }
        for pattern in ["^(?!x)a", r"(a)\1", "[[]", r"\/", "a{", r"\u0041", "(?<=a)b", "^[^]$", ""] {
            assert_eq!(check(pattern), Ok(()), "{pattern}");
        }
        assert_eq!(check_types(&json!({"properties": {"pattern": {"type": "string"}}})), Ok(()));
    }

    #[test]
    fn content_becomes_one_text_and_arguments_become_objects() {
        let parts = json!({"content": [{"type": "text", "text": "a"}, {"text": "b"}], "role": "user", "name": null});
        assert_eq!(message(parts).unwrap().to_string(), r#"{"role":"user","content":"ab"}"#);
        let call = |arguments: Value| {
            let calls = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
            let checked = message(json!({"role": "assistant", "content": null, "tool_calls": calls})).unwrap();
            assert_eq!(checked["content"], "");
            checked["tool_calls"][0]["function"]["arguments"].clone()
        };
        assert_eq!(call(json!("{\"a\": 1}")), json!({"a": 1}));
        assert_eq!(call(json!("{")), json!("{"));
        assert_eq!(call(json!({"b": 2})), json!({"b": 2}));
    }

    #[test]
    fn a_message_of_another_shape_is_refused_by_its_place() {
        for (value, expected) in [
            (json!(7), "`messages[0]`: expected a JSON object"),
            (json!({"content": "a"}), "`messages[0].role`: expected a text"),
            (json!({"role": 7, "content": "a"}), "`messages[0].role`: expected a text"),
            (json!({"role": "a".repeat(257), "content": "a"}), "`messages[0].role`: expected a text"),
            (json!({"role": "user"}), "`messages[0].content`: expected a text"),
            (json!({"role": "user", "content": null}), "`messages[0].content`: expected a text"),
            (json!({"role": "user", "content": 5}), "`messages[0].content`: expected a text"),
            (json!({"role": "user", "content": {}}), "`messages[0].content`: expected a text"),
            (
                json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}),
                "`messages[0].content`: expected parts of type text",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {}}]}),
                "`messages[0].tool_calls`: expected objects",
            ),
        ] {
            let error = message(value.clone()).unwrap_err();
            assert!(error.contains(expected), "{value}: {error}");
        }
        assert!(check_messages(vec![]).is_err());
        assert!(check_messages(vec![json!({"role": "user", "content": "a"}); 1025]).is_err());
    }

    #[test]
    fn a_tool_of_another_shape_is_refused_by_its_place() {
        let tool = |parameters: Value| json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        let nested =
            json!({"type": "object", "properties": {"type": {"type": ["string", "null"]}, "a": {"items": {}}}});
        let checked = check_tools(&[tool(nested)]).unwrap();
        assert_eq!(checked[0].0, "f");
        let by_arguments = json!({"function": {"name": "g", "arguments": {"type": "object"}}});
        assert_eq!(check_tools(&[by_arguments]).unwrap()[0].1["function"]["parameters"], json!({"type": "object"}));
        for wrong in [
            tool(json!("x")),
            tool(json!(null)),
            tool(json!([])),
            tool(json!({"type": "strnig"})),
            tool(json!({"properties": {"a": {"anyOf": [{"type": 7}]}}})),
            json!({"type": "function"}),
            json!({"type": "retrieval", "function": {"name": "f"}}),
            json!({"function": {"name": ""}}),
            json!(7),
        ] {
            assert!(check_tools(std::slice::from_ref(&wrong)).is_err(), "{wrong}");
        }
        assert!(check_tools(&[tool(json!({})), tool(json!({}))]).is_err(), "a name twice");
    }
}
