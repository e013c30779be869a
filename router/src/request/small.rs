//! Bodies of the routes for other people's platforms: Vertex AI, KServe, SageMaker; and of `/tokenize`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::chat::{self, Chat, ChatRequest};
use super::native::{self, CompatGenerateRequest, Delivery, GenerateParameters, GenerateRequest, WireRequest};
use super::{Limits, Refused, invalid, json};

/// The text of a body of `/tokenize`.
pub fn parse_tokenize(body: &[u8]) -> Result<String, Refused> {
    let request: GenerateRequest = json::read(body)?;
    match request.inputs {
        Some(inputs) if !inputs.is_empty() => Ok(inputs),
        Some(_) => Err(invalid("`inputs` cannot be empty")),
        None => Err(invalid("missing field `inputs`")),
    }
}

/// What a body of `/invocations` is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Invocation {
    /// As for `/`.
    Generate,
    /// As for `/v1/chat/completions`.
    Chat,
    /// As for `/v1/completions`.
    Completion,
}

/// Tells by its fields what a body is, in the order of TGI.
pub fn kind_of_invocation(body: &[u8]) -> Result<Invocation, Refused> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Fields {
        inputs: Option<Value>,
        messages: Option<Value>,
        prompt: Option<Value>,
    }
    let fields: Fields = json::read(body)?;
    match fields {
        Fields { inputs: Some(_), .. } => Ok(Invocation::Generate),
        Fields { messages: Some(_), .. } => Ok(Invocation::Chat),
        Fields { prompt: Some(_), .. } => Ok(Invocation::Completion),
        _ => Err(invalid("expected one of the fields `inputs`, `messages`, `prompt`")),
    }
}

/// Body of `/vertex`.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct VertexRequest {
    /// Bodies as for `/generate` or `/v1/chat/completions`.
    #[schema(value_type = Vec<Object>)]
    pub instances: Option<Vec<Value>>,
}

/// One of the requests of a body of `/vertex`.
#[derive(Clone, Debug, PartialEq)]
pub enum Instance {
    /// A prompt.
    Generate(Box<WireRequest>),
    /// A chat.
    Chat(Box<Chat>),
}

/// Judges a body of `/vertex`, all but the lengths of its prompts.
pub fn parse_vertex(body: &[u8], limits: &Limits) -> Result<Vec<Instance>, Refused> {
    let request: VertexRequest = json::read(body)?;
    let instances = request.instances.unwrap_or_default();
    if instances.is_empty() {
        let error_type = "Input validation error";
        return Err(Refused::Other { error_type, text: error_type.into() });
    }
    if instances.len() > limits.max_client_batch_size {
        return Err(Refused::BatchSize(limits.max_client_batch_size));
    }
    let one = |(n, instance): (usize, Value)| {
        let wrong = |error: serde_json::Error| invalid(format!("`instances[{n}]`: {}", json::in_words(&error)));
        if !instance.is_object() {
            return Err(invalid(format!("`instances[{n}]`: expected a JSON object")));
        }
        if instance.get("messages").is_some() {
            let request: ChatRequest = serde_json::from_value(instance).map_err(wrong)?;
            return Ok(Instance::Chat(Box::new(chat::check(request, limits)?)));
        }
        let mut request: CompatGenerateRequest = serde_json::from_value(instance).map_err(wrong)?;
        // As in TGI, this route always samples.
        request.parameters.do_sample = Some(true);
        Ok(Instance::Generate(Box::new(native::check(request, Delivery::Whole, limits)?)))
    };
    instances.into_iter().enumerate().map(one).collect()
}

/// Body of KServe's `infer`.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
#[schema(title = "InferenceRequest")]
pub struct InferenceRequest {
    /// Repeated in the answer.
    pub id: Option<String>,
    /// Prompts.
    pub inputs: Vec<Input>,
    /// What the answers are to be called: one for each prompt.
    pub outputs: Vec<Output>,
    /// How the answers are generated, as for `/generate`.
    #[serde(deserialize_with = "json::object")]
    #[schema(required = false)]
    pub parameters: GenerateParameters,
}

/// One prompt.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct Input {
    /// Not looked at.
    pub name: String,
    /// Not looked at.
    pub shape: Vec<u64>,
    /// Not looked at: bytes are expected.
    pub datatype: String,
    /// The bytes of a text, or texts.
    #[schema(value_type = Vec<u8>)]
    pub data: Vec<Value>,
}

/// What an answer is to be called.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct Output {
    /// The name.
    pub name: String,
}

/// A request of KServe within its limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Inference {
    /// Repeated in the answer.
    pub id: Option<String>,
    /// Prompts with the names of their answers.
    pub requests: Vec<(String, WireRequest)>,
}

/// Judges a body of KServe's `infer`, all but the lengths of its prompts.
pub fn parse_inference(body: &[u8], limits: &Limits) -> Result<Inference, Refused> {
    let InferenceRequest { id, inputs, outputs, parameters } = json::read(body)?;
    if inputs.len() != outputs.len() {
        let text = format!("Inputs and outputs length mismatch: {} and {}", inputs.len(), outputs.len());
        return Err(Refused::Other { error_type: "length mismatch", text });
    }
    if inputs.is_empty() {
        return Err(invalid("`inputs` cannot be empty"));
    }
    if inputs.len() > limits.max_client_batch_size {
        return Err(Refused::BatchSize(limits.max_client_batch_size));
    }
    let one = |(input, output): (Input, Output)| {
        let inputs = Some(text_of(&input.data)?);
        let request = CompatGenerateRequest { inputs, parameters: parameters.clone(), stream: None };
        Ok((output.name, native::check(request, Delivery::Whole, limits)?))
    };
    Ok(Inference { id, requests: inputs.into_iter().zip(outputs).map(one).collect::<Result<_, _>>()? })
}

fn text_of(data: &[Value]) -> Result<String, Refused> {
    let utf8 = |text: &str| Refused::Other { error_type: "utf8", text: text.into() };
    if data.iter().all(Value::is_string) {
        return Ok(data.iter().filter_map(Value::as_str).collect());
    }
    let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok());
    let bytes: Option<Vec<u8>> = data.iter().map(byte).collect();
    let bytes = bytes.ok_or_else(|| utf8("`data`: expected the bytes of a text, or texts"))?;
    String::from_utf8(bytes).map_err(|_| utf8("`data`: the bytes are not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::super::test_limits;
    use super::*;

    #[test]
    fn an_invocation_is_what_its_fields_say() {
        for (body, expected) in [
            (r#"{"inputs":"a","messages":[]}"#, Invocation::Generate),
            (r#"{"messages":[],"prompt":"a"}"#, Invocation::Chat),
            (r#"{"prompt":"a"}"#, Invocation::Completion),
        ] {
            assert_eq!(kind_of_invocation(body.as_bytes()), Ok(expected), "{body}");
        }
        assert!(matches!(kind_of_invocation(b"{}"), Err(Refused::Invalid(_))));
        assert!(matches!(kind_of_invocation(b"{"), Err(Refused::Malformed(_))));
    }

    #[test]
    fn an_instance_is_a_prompt_or_a_chat() {
        let parse = |body: &str| parse_vertex(body.as_bytes(), &test_limits());
        let chat = r#"{"messages":[{"role":"user","content":"a"}]}"#;
        let instances = parse(&format!(r#"{{"instances":[{{"inputs":"a"}},{chat}]}}"#)).unwrap();
        assert!(
            matches!(&instances[..], [Instance::Generate(one), Instance::Chat(_)] if one.options.sampling.do_sample)
        );
        assert!(matches!(parse(r#"{"instances":[]}"#), Err(Refused::Other { .. })));
        let error = parse(r#"{"instances":[{"inputs":7}]}"#).unwrap_err().to_string();
        assert!(error.contains("`instances[0]`: invalid type"), "{error}");
    }

    #[test]
    fn data_of_kserve_is_bytes_or_texts() {
        let parse = |data: &str, outputs: &str| {
            let body = format!(r#"{{"id":"7","inputs":[{{"name":"p","data":{data}}}],"outputs":{outputs}}}"#);
            parse_inference(body.as_bytes(), &test_limits())
        };
        for data in ["[104,105]", r#"["hi"]"#] {
            let inference = parse(data, r#"[{"name":"o"}]"#).unwrap();
            assert_eq!((inference.requests[0].0.as_str(), inference.requests[0].1.inputs.as_str()), ("o", "hi"));
        }
        let kind = |refused: Result<Inference, Refused>| match refused {
            Err(Refused::Other { error_type, .. }) => error_type,
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(parse("[255]", r#"[{"name":"o"}]"#)), "utf8");
        assert_eq!(kind(parse("[256]", r#"[{"name":"o"}]"#)), "utf8");
        assert_eq!(kind(parse("[104]", "[]")), "length mismatch");
    }
}
