//! The form that an answer may be bound to: TGI's `grammar`, `OpenAI`'s `response_format`, a tool that must be called.

use serde_json::Value;

use super::{Refused, invalid};

/// What a request wants its answer to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Any JSON object.
    AnyObject,
    /// JSON of this schema.
    Schema(Value),
    /// A text that this regular expression matches, all of it.
    Regex(String),
    /// A call of one of the request's tools: of this one, or of any.
    Call(Option<String>),
}

/// The one place where a form is taken up, or not: none is served yet.
pub fn bind(form: Option<&Form>, field: &str) -> Result<(), Refused> {
    match form {
        None => Ok(()),
        Some(Form::Call(_)) => Err(Refused::Tool(format!("`{field}` that forces a call is not served yet"))),
        Some(_) => Err(invalid(format!("`{field}`: grammars are not served yet"))),
    }
}

/// TGI's `{"type": "json" | "json_object" | "json_schema" | "regex", "value": …}` and, where `is_open`, `OpenAI`'s
/// `{"type": "text" | "json_object"}` and `{"type": "json_schema", "json_schema": {"schema": …}}`.
pub(super) fn read(value: Option<&Value>, field: &str, is_open: bool) -> Result<Option<Form>, Refused> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let wrong = |what: &str| invalid(format!("`{field}`: {what}"));
    let Some(object) = value.as_object() else { return Err(wrong("expected a JSON object")) };
    let kind = object.get("type").and_then(Value::as_str).ok_or_else(|| wrong("`type` must be a text"))?;
    let given = object.get("value").filter(|value| !value.is_null());
    match (kind, given) {
        ("text", None) if is_open => Ok(None),
        ("json_object", None) if is_open => Ok(Some(Form::AnyObject)),
        ("json_schema", None) if is_open => {
            let schema = object.get("json_schema").and_then(|named| named.get("schema"));
            let schema = schema.ok_or_else(|| wrong("`json_schema.schema` is missing"))?;
            schema_form(schema.clone(), field)
        }
        ("regex", Some(Value::String(regex))) => Ok(Some(Form::Regex(regex.clone()))),
        ("regex", _) => Err(wrong("`value` must be a text")),
        ("json" | "json_object", Some(Value::String(text))) => {
            let schema = serde_json::from_str(text).map_err(|_| wrong("`value` is a text that is not JSON"))?;
            schema_form(schema, field)
        }
        ("json" | "json_object", Some(schema)) => schema_form(schema.clone(), field),
        ("json_schema", Some(named)) => {
            let schema = named.get("schema").ok_or_else(|| wrong("`value.schema` is missing"))?;
            schema_form(schema.clone(), field)
        }
        ("json" | "json_object" | "json_schema", None) => Err(wrong("`value` is missing")),
        _ => Err(wrong("`type` must be one of json, json_object, json_schema, regex")),
    }
}

fn schema_form(schema: Value, field: &str) -> Result<Option<Form>, Refused> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Some(Form::Schema(schema))),
        _ => Err(invalid(format!("`{field}`: the schema must be a JSON object"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn forms_of_tgi_and_of_openai_are_told_from_what_is_none() {
        let schema = json!({"type": "object", "properties": {}});
        for (value, expected) in [
            (json!(null), Ok(None)),
            (json!({"type": "text"}), Ok(None)),
            (json!({"type": "json_object"}), Ok(Some(Form::AnyObject))),
            (json!({"type": "json", "value": schema}), Ok(Some(Form::Schema(schema.clone())))),
            (json!({"type": "json_object", "value": schema.to_string()}), Ok(Some(Form::Schema(schema.clone())))),
            (
                json!({"type": "json_schema", "value": {"name": "x", "schema": schema, "strict": true}}),
                Ok(Some(Form::Schema(schema.clone()))),
            ),
            (
                json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
                Ok(Some(Form::Schema(schema.clone()))),
            ),
            (json!({"type": "regex", "value": "a+"}), Ok(Some(Form::Regex("a+".into())))),
            (json!([]), Err(())),
            (json!("json"), Err(())),
            (json!({"type": "xml"}), Err(())),
            (json!({"type": "regex"}), Err(())),
            (json!({"type": "json_schema", "json_schema": {}}), Err(())),
            (json!({"type": "json", "value": "{"}), Err(())),
            (json!({"type": "json", "value": [1]}), Err(())),
        ] {
            let got = read(Some(&value), "response_format", true);
            assert_eq!(
                got.map_err(|refused| assert!(refused.to_string().contains("response_format"))),
                expected,
                "{value}"
            );
        }
        assert!(read(Some(&json!({"type": "text"})), "grammar", false).is_err(), "not TGI's");
    }

    #[test]
    fn no_form_is_served_yet() {
        assert!(bind(None, "grammar").is_ok());
        assert!(bind(Some(&Form::AnyObject), "grammar").is_err());
        assert!(matches!(bind(Some(&Form::Call(None)), "tool_choice"), Err(Refused::Tool(_))));
    }
}
