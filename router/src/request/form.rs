//! The form that an answer may be bound to: TGI's `grammar`, `OpenAI`'s `response_format`, a tool that must be called.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::limits::MAX_FORM_BYTES;
use super::{Refused, invalid};

/// Between the tokens of JSON there may be one space, as in TGI: models that may write any number of them do.
const WHITE_SPACE: &str = r"\x20";

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

/// What a [`Grammar`]'s source is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Kind {
    /// A JSON schema; how it is taken stands in it.
    JsonSchema,
    /// A regular expression.
    Regex,
}

/// A form as the shards are told it, short enough to be looked at.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Grammar {
    /// What the source is.
    pub kind: Kind,
    /// At most [`MAX_FORM_BYTES`].
    pub source: Arc<str>,
    /// The field of the request that asks for it.
    pub field: &'static str,
}

impl Grammar {
    /// Why the request is refused, in words about this grammar.
    pub fn refused(&self, cause: &str) -> Refused {
        let text = format!("`{}`: {cause}", self.field);
        // A tool's parameters have their place among the definitions.
        if self.field == "tool_choice" { Refused::Tool(text.replace("/$defs/", "/tools/")) } else { invalid(text) }
    }
}

/// The one place where a form is taken up. `tools`: those of the request, by name. Whether there is a text of that form is
/// for [`crate::text::grammar`] to find out.
pub fn bind(form: Form, field: &'static str, tools: &[(String, Value)]) -> Result<Grammar, Refused> {
    let (kind, source) = match form {
        Form::AnyObject => (Kind::JsonSchema, schema_source(json!({"type": "object"}))),
        Form::Schema(schema) => (Kind::JsonSchema, schema_source(schema)),
        Form::Regex(regex) => (Kind::Regex, regex),
        Form::Call(name) => (Kind::JsonSchema, schema_source(call_schema(name.as_deref(), tools))),
    };
    let grammar = Grammar { kind, source: source.into(), field };
    match grammar.source.len() {
        length if length > MAX_FORM_BYTES => {
            Err(grammar.refused(&format!("it has {length} bytes, at most {MAX_FORM_BYTES} are taken")))
        }
        _ => Ok(grammar),
    }
}

/// The text of a schema, which says itself how it is taken, whatever the client says about that.
fn schema_source(schema: Value) -> String {
    let mut schema = match schema {
        Value::Object(schema) => schema,
        Value::Bool(true) => Map::new(),
        // There is no other: it was checked.
        _ => Map::from_iter([("enum".to_owned(), json!([]))]),
    };
    schema.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE}));
    Value::Object(schema).to_string()
}

/// A call as `Format::Json` reads it. What a tool's parameters refer to in themselves, they still do.
fn call_schema(name: Option<&str>, tools: &[(String, Value)]) -> Value {
    let callable = tools.iter().enumerate().filter(|(_, (tool, _))| name.is_none_or(|name| name == tool));
    let (mut calls, mut definitions) = (vec![], Map::new());
    for (n, (tool, definition)) in callable {
        let mut parameters = definition["function"]["parameters"].clone();
        if parameters.get("type").is_none() && parameters.get("$ref").is_none() {
            // Arguments are an object, whether the tool says so or not.
            match &mut parameters {
                Value::Object(parameters) => drop(parameters.insert("type".into(), json!("object"))),
                parameters => *parameters = json!({"type": "object"}),
            }
        }
        relocate(&mut parameters, &format!("#/$defs/{n}"));
        definitions.insert(n.to_string(), parameters);
        calls.push(json!({
            "type": "object",
            "properties": {"name": {"const": tool}, "arguments": {"$ref": format!("#/$defs/{n}")}},
            "required": ["name", "arguments"],
            "additionalProperties": false,
        }));
    }
    json!({"$defs": definitions, "anyOf": calls})
}

/// Lets references within a schema begin at its new place.
fn relocate(schema: &mut Value, root: &str) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                match (key.as_str(), value) {
                    ("$ref", Value::String(target)) => {
                        if let Some(pointer) =
                            target.strip_prefix('#').filter(|rest| rest.is_empty() || rest.starts_with('/'))
                        {
                            *target = format!("{root}{pointer}");
                        }
                    }
                    // Data, whatever it looks like.
                    ("const" | "enum" | "default" | "examples", _) => {}
                    (_, value) => relocate(value, root),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| relocate(value, root)),
        _ => {}
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
            let mut schema = schema.ok_or_else(|| wrong("`json_schema.schema` is missing"))?.clone();
            imply_objects(&mut schema, false);
            schema_form(schema, field)
        }
        ("regex", Some(Value::String(regex))) => Ok(Some(Form::Regex(regex.clone()))),
        ("regex", _) => Err(wrong("`value` must be a text")),
        ("json" | "json_object", Some(Value::String(text))) => {
            let schema = serde_json::from_str(text)
                .map_err(|error| wrong(&format!("`value` is a text that is not JSON: {error}")))?;
            schema_form(as_in_tgi(schema), field)
        }
        ("json" | "json_object", Some(schema)) => schema_form(as_in_tgi(schema.clone()), field),
        ("json_schema", Some(named)) => {
            let schema = named.get("schema").ok_or_else(|| wrong("`value.schema` is missing"))?;
            schema_form(as_in_tgi(schema.clone()), field)
        }
        ("json" | "json_object" | "json_schema", None) => Err(wrong("`value` is missing")),
        _ => Err(wrong("`type` must be one of json, json_object, json_schema, regex")),
    }
}

/// What stands beside `properties` where these do not tell alone what is meant.
const MORE_THAN_PROPERTIES: [&str; 8] = ["allOf", "anyOf", "oneOf", "not", "if", "$ref", "enum", "const"];

/// To TGI, what has `properties` is an object of these and no others, whether the schema says so or not: its own examples
/// do not. Every such object is one of the schema.
fn as_in_tgi(mut schema: Value) -> Value {
    let is_closed = !has_composed_objects(&schema);
    imply_objects(&mut schema, is_closed);
    schema
}

/// Whether an object's properties may stand in several places, so that in none of them are all.
fn has_composed_objects(schema: &Value) -> bool {
    match schema {
        Value::Object(object) => {
            let is_composed = object.contains_key("properties")
                && MORE_THAN_PROPERTIES.iter().any(|key| object.contains_key(*key))
                || object.get("allOf").and_then(Value::as_array).is_some_and(|parts| parts.len() > 1)
                || object.contains_key("unevaluatedProperties");
            is_composed || object.values().any(has_composed_objects)
        }
        Value::Array(values) => values.iter().any(has_composed_objects),
        _ => false,
    }
}

/// Says of whatever has `properties` that it is an object; if `is_closed`, that it has no others.
fn imply_objects(schema: &mut Value, is_closed: bool) {
    let Value::Object(object) = schema else { return };
    for (key, value) in object.iter_mut() {
        match (key.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(schemas)) => {
                schemas.values_mut().for_each(|schema| imply_objects(schema, is_closed));
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems", Value::Array(schemas)) => {
                schemas.iter_mut().for_each(|schema| imply_objects(schema, is_closed));
            }
            ("items" | "additionalProperties", schema) => imply_objects(schema, is_closed),
            _ => {}
        }
    }
    let has = |name: &str| object.contains_key(name);
    if !object.get("properties").is_some_and(Value::is_object) || MORE_THAN_PROPERTIES.iter().any(|key| has(key)) {
        return;
    }
    let is_there = |name: &Value| name.as_str().is_some_and(|name| object["properties"].get(name).is_some());
    let needs_others =
        object.get("required").and_then(Value::as_array).is_some_and(|names| !names.iter().all(is_there));
    let is_open = has("additionalProperties") || has("patternProperties") || needs_others;
    if !has("type") {
        object.insert("type".into(), json!("object"));
    }
    if is_closed && !is_open {
        object.insert("additionalProperties".into(), json!(false));
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
    use super::*;

    #[test]
    fn forms_of_tgi_and_of_openai_are_told_from_what_is_none() {
        let schema = json!({"type": "object", "properties": {}, "additionalProperties": false});
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
    fn a_schema_says_itself_how_it_is_taken() {
        let schema = json!({"type": "object", "x-guidance": {"lenient": true}});
        let Grammar { kind, source, .. } = bind(Form::Schema(schema), "grammar", &[]).unwrap();
        let written: Value = serde_json::from_str(&source).unwrap();
        assert_eq!((kind, &written["x-guidance"]), (Kind::JsonSchema, &json!({"whitespace_pattern": r"\x20"})));
    }

    #[test]
    fn a_source_that_is_too_long_is_refused_under_its_fields_name() {
        let long = "a".repeat(MAX_FORM_BYTES + 1);
        let error = bind(Form::Regex(long.clone()), "grammar", &[]).unwrap_err();
        assert!(error.to_string().contains("`grammar`: it has 65537 bytes, at most 65536"), "{error}");
        let tool = json!({"function": {"parameters": {"description": long}}});
        let error = bind(Form::Call(None), "tool_choice", &[("f".into(), tool)]).unwrap_err();
        assert!(matches!(error, Refused::Tool(_)), "{error}");
    }

    #[test]
    fn references_of_a_tools_parameters_lead_to_where_they_are() {
        let parameters = json!({"properties": {"a": {"$ref": "#/$defs/A"}, "$ref": {"enum": [{"$ref": "#"}]}},
            "$defs": {"A": {"items": {"$ref": "#"}}}});
        let tool = |parameters: Value| json!({"function": {"parameters": parameters}});
        let tools = [("f".to_owned(), tool(json!({"type": "object"}))), ("g".to_owned(), tool(parameters))];
        let schema = call_schema(None, &tools);
        let moved = &schema["$defs"]["1"];
        assert_eq!(moved["properties"]["a"]["$ref"], "#/$defs/1/$defs/A");
        assert_eq!(moved["properties"]["$ref"]["enum"][0]["$ref"], "#");
        assert_eq!((&moved["$defs"]["A"]["items"]["$ref"], &moved["type"]), (&json!("#/$defs/1"), &json!("object")));
        let names = |schema: &Value| -> Vec<Value> {
            schema["anyOf"].as_array().unwrap().iter().map(|call| call["properties"]["name"]["const"].clone()).collect()
        };
        assert_eq!(names(&schema), ["f", "g"]);
        assert_eq!(names(&call_schema(Some("g"), &tools)), ["g"]);
    }

    #[test]
    fn what_has_properties_is_an_object_of_these_alone_where_tgi_takes_it_so() {
        let read = |value: Value| match read(Some(&value), "f", true) {
            Ok(Some(Form::Schema(schema))) => schema,
            other => panic!("{other:?}"),
        };
        let open = json!({"properties": {"properties": {"type": "string"}, "b": {"properties": {"c": true}}}});
        let b = json!({"properties": {"c": true}, "type": "object", "additionalProperties": false});
        let closed = json!({
            "properties": {"properties": {"type": "string"}, "b": b}, "type": "object", "additionalProperties": false
        });
        assert_eq!(read(json!({"type": "json", "value": open})), closed);
        assert_eq!(read(json!({"type": "json", "value": open.to_string()})), closed);
        assert_eq!(read(json!({"type": "json_schema", "value": {"schema": open}})), closed);
        let b = json!({"properties": {"c": true}, "type": "object"});
        let implied = json!({"properties": {"properties": {"type": "string"}, "b": b}, "type": "object"});
        assert_eq!(read(json!({"type": "json_schema", "json_schema": {"schema": open}})), implied);
        // Elsewhere properties are not all that is said of an object, or of no object at all.
        let parts =
            json!([{"properties": {"a": true}, "type": "object"}, {"properties": {"b": true}, "type": "object"}]);
        for schema in [
            json!({"allOf": parts}),
            json!({"properties": {"a": true}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}),
            json!({"properties": {"a": true}, "enum": [1, 2]}),
            json!({"properties": {"a": true}, "type": "object", "additionalProperties": {"type": "string"}}),
            json!({"properties": {"a": true}, "type": "object", "required": ["b"]}),
            json!({"const": {"properties": {}}}),
            json!({"type": "string"}),
            json!(true),
        ] {
            assert_eq!(read(json!({"type": "json", "value": schema})), schema);
        }
    }
}
