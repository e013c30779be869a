//! Bodies of `/v1/chat/completions` and `/chat_tokenize`.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat_checks::{check_messages, check_tools};
use super::completions::Stop;
use super::form::{self, Form};
use super::limits::MAX_TOP_LOGPROBS;
use super::openai::{Shared, StreamOptions, check_model, include_usage, options, shared};
use super::{Limits, Options, Refused, invalid, json};

/// Body of `/v1/chat/completions`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct ChatRequest {
    /// What was said so far.
    #[schema(value_type = Vec<Message>)]
    pub messages: Option<Vec<Value>>,
    /// The served model's name, or `tgi`.
    pub model: Option<String>,
    /// Lowers the logits of ids for each time that the answer has them already.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub frequency_penalty: Option<f64>,
    /// Lowers the logits of ids that the answer has already.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub presence_penalty: Option<f64>,
    /// Divides the logits of ids that have occurred, 1 for none.
    pub repetition_penalty: Option<f64>,
    /// Added to the logits of ids, -100 to 100 by id.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Tell the log-probability of every token.
    pub logprobs: Option<bool>,
    /// And so many alternatives.
    #[schema(maximum = 20)]
    pub top_logprobs: Option<u64>,
    /// Tokens to generate at most; as many as fit, if not given.
    pub max_tokens: Option<u64>,
    /// The same, under its newer name.
    pub max_completion_tokens: Option<u64>,
    /// Answers.
    pub n: Option<u64>,
    /// Texts that end the answer, which they are not part of.
    #[schema(value_type = Option<Stop>)]
    pub stop: Option<Value>,
    /// Whether tokens are sent as they come.
    pub stream: Option<bool>,
    /// What a stream ends with.
    pub stream_options: Option<StreamOptions>,
    /// Of the sampling.
    pub seed: Option<u64>,
    /// 0 takes the most probable tokens; anything else divides the logits before sampling.
    pub temperature: Option<f64>,
    /// Sample from the most probable ids that have this share of the probability.
    pub top_p: Option<f64>,
    /// Sample from so many most probable ids.
    pub top_k: Option<i64>,
    /// Functions that may be called.
    #[schema(value_type = Option<Vec<Tool>>)]
    pub tools: Option<Vec<Value>>,
    /// What is said about the tools to a model whose template knows none.
    pub tool_prompt: Option<String>,
    /// `auto`, `none`, `required`, the name of a tool, or `{"type": "function", "function": {"name"}}`.
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// Whether several tools may be called at once.
    pub parallel_tool_calls: Option<bool>,
    /// The form of the answer, as in `OpenAI`'s API or in TGI's.
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// Whether the last message is gone on with; as in TGI it is, unless this says no, if it is the assistant's.
    pub continue_final_message: Option<bool>,
    /// Whether the prompt ends with the beginning of an answer.
    pub add_generation_prompt: Option<bool>,
    /// Variables for the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Refused: the operator chooses the template.
    #[schema(value_type = Option<String>)]
    pub chat_template: Option<Value>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: Option<bool>,
    /// Tokens before the answer may end.
    pub min_tokens: Option<u64>,
    /// Tell the ids of prompt and answer.
    pub return_token_ids: Option<bool>,
}

/// What was said, as documented.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or what else the model's template knows.
    pub role: String,
    /// A text, or a list of texts.
    pub content: Option<MessageContent>,
    /// Calls that the assistant has made.
    pub tool_calls: Option<Vec<Value>>,
    /// The call that a tool's message answers.
    pub tool_call_id: Option<String>,
    /// Who says it.
    pub name: Option<String>,
}

/// A text, as documented.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code)]
#[serde(untagged)]
pub enum MessageContent {
    /// In one piece.
    SingleText(String),
    /// In several.
    MultipleChunks(Vec<MessageChunk>),
}

/// A part of a text, as documented.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code)]
pub struct MessageChunk {
    /// `text`.
    pub r#type: String,
    /// The text.
    pub text: String,
}

/// A function that may be called, as documented.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code)]
pub struct Tool {
    /// `function`.
    pub r#type: String,
    /// Its definition.
    pub function: FunctionDefinition,
}

/// A function, as documented.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code)]
pub struct FunctionDefinition {
    /// What it is called.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// A JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
}

/// What a chat wants of its template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompting {
    /// Checked, as they came.
    pub messages: Vec<Value>,
    /// Checked; none if they are not to be called.
    pub tools: Option<Vec<Value>>,
    /// Said to models whose template knows no tools.
    pub tool_prompt: Option<String>,
    /// Whether the last message is gone on with.
    pub continue_final_message: bool,
    /// Whether the beginning of an answer follows.
    pub add_generation_prompt: bool,
    /// Variables of the request's own.
    pub variables: Map<String, Value>,
}

/// A request within its limits; its prompt is still messages.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// What the prompt is made of.
    pub prompting: Prompting,
    /// The names of the tools.
    pub tool_names: Vec<String>,
    /// Whether more than one call is told.
    pub parallel_tool_calls: bool,
    /// How it is answered.
    pub options: Options,
    /// Whether tokens are sent as they come.
    pub stream: bool,
    /// Whether a stream tells how many tokens there were.
    pub include_usage: bool,
    /// Whether log-probabilities are told.
    pub logprobs: bool,
    /// Whether ids are told.
    pub return_token_ids: bool,
}

/// Judges a body, all but the length of its prompt.
pub fn parse(body: &[u8], limits: &Limits) -> Result<Chat, Refused> {
    check(json::read(body)?, limits)
}

/// Judges a request, all but the length of its prompt.
pub fn check(mut request: ChatRequest, limits: &Limits) -> Result<Chat, Refused> {
    check_model(request.model.as_deref(), limits)?;
    let messages = check_messages(request.messages.take().ok_or_else(|| invalid("missing field `messages`"))?)?;
    if request.chat_template.as_ref().is_some_and(|template| !template.is_null()) {
        return Err(invalid("`chat_template` cannot be chosen by a request"));
    }
    let response_format = form::read(request.response_format.as_ref(), "response_format", true)?;
    if request.tools.is_some() && response_format.is_some() {
        return Err(Refused::Tool("Grammar and tools are mutually exclusive".into()));
    }
    let tools = check_tools(request.tools.as_deref().unwrap_or_default())?;
    let choice = tool_choice(request.tool_choice.as_ref(), &tools)?;
    let top_n = top_logprobs(&request)?;
    let max_tokens = match (request.max_tokens, request.max_completion_tokens) {
        (Some(_), Some(_)) => return Err(invalid("`max_tokens` and `max_completion_tokens` are the same; give one")),
        (None, Some(most)) => ("max_completion_tokens", Some(most)),
        (most, None) => ("max_tokens", most),
    };
    let shared = Shared { max_tokens, top_n, prompt_name: "messages", ..shared!(request) };
    let mut options = options(&shared, limits)?;
    options.sampling.grammar = match (response_format, &choice) {
        (Some(form), _) => Some(form::bind(form, "response_format", &[])?),
        (None, Choice::Forced(form)) => Some(form::bind(form.clone(), "tool_choice", &tools)?),
        (None, _) => None,
    };
    // Where a form ends, there is nothing to go on with.
    options.ignore_eos &= options.sampling.grammar.is_none();
    let stream = request.stream.unwrap_or(false);
    let tools = if matches!(choice, Choice::None) { vec![] } else { tools };
    Ok(Chat {
        tool_names: tools.iter().map(|tool| tool.0.clone()).collect(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        options,
        stream,
        include_usage: include_usage(request.stream_options.as_ref(), stream)?,
        logprobs: request.logprobs.unwrap_or(false),
        return_token_ids: request.return_token_ids.unwrap_or(false),
        prompting: prompting(request, messages, tools)?,
    })
}

fn prompting(request: ChatRequest, messages: Vec<Value>, tools: Vec<(String, Value)>) -> Result<Prompting, Refused> {
    let is_assistant = messages.last().is_some_and(|last| last["role"] == "assistant");
    let has_text = messages.last().is_some_and(|last| last["content"].as_str().is_some_and(|text| !text.is_empty()));
    let continue_final_message = match request.continue_final_message {
        Some(true) if !has_text => return Err(invalid("`continue_final_message`: the last message has no text")),
        Some(wanted) => wanted,
        None => is_assistant && has_text && request.add_generation_prompt != Some(true),
    };
    let add_generation_prompt = request.add_generation_prompt.unwrap_or(!continue_final_message);
    if continue_final_message && add_generation_prompt {
        return Err(invalid("`continue_final_message` and `add_generation_prompt` exclude each other"));
    }
    Ok(Prompting {
        messages,
        tools: Some(tools.into_iter().map(|(_, tool)| tool).collect()).filter(|tools: &Vec<_>| !tools.is_empty()),
        tool_prompt: request.tool_prompt,
        continue_final_message,
        add_generation_prompt,
        variables: request.chat_template_kwargs.unwrap_or_default(),
    })
}

fn top_logprobs(request: &ChatRequest) -> Result<u64, Refused> {
    match request.top_logprobs {
        None => Ok(0),
        Some(_) if request.logprobs != Some(true) => {
            Err(invalid("`top_logprobs` is only allowed when `logprobs` is true"))
        }
        Some(n) if n > MAX_TOP_LOGPROBS => {
            Err(invalid(format!("`top_logprobs` must be <= {MAX_TOP_LOGPROBS}. Given: {n}")))
        }
        Some(n) => Ok(n),
    }
}

/// What `tool_choice` says.
enum Choice {
    Auto,
    None,
    Forced(Form),
}

fn tool_choice(value: Option<&Value>, tools: &[(String, Value)]) -> Result<Choice, Refused> {
    let names: HashSet<&str> = tools.iter().map(|(name, _)| name.as_str()).collect();
    let named = |name: &str| {
        if names.contains(name) {
            Ok(Choice::Forced(Form::Call(Some(name.to_owned()))))
        } else {
            Err(Refused::Tool(format!("Tool with name {:?} not found", name.chars().take(100).collect::<String>())))
        }
    };
    match value {
        None | Some(Value::Null) => Ok(Choice::Auto),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Ok(Choice::Auto),
            "none" => Ok(Choice::None),
            "required" if tools.is_empty() => {
                Err(Refused::Tool("`tool_choice` requires a tool and there is none".into()))
            }
            "required" => Ok(Choice::Forced(Form::Call(None))),
            name => named(name),
        },
        Some(choice) => match choice["function"]["name"].as_str() {
            Some(name) => named(name),
            None => Err(invalid("`tool_choice`: expected auto, none, required or {\"function\": {\"name\"}}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_limits;
    use super::*;

    const MESSAGES: &str = r#""messages":[{"role":"user","content":"a"}]"#;
    const TOOLS: &str = r#""tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]"#;

    fn parse(fields: &str) -> Result<Chat, Refused> {
        super::parse(format!("{{{MESSAGES}{fields}}}").as_bytes(), &test_limits())
    }

    #[test]
    fn the_assistants_last_message_is_gone_on_with() {
        let prompting = |fields: &str| {
            let messages = r#""messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]"#;
            let chat = super::parse(format!("{{{messages}{fields}}}").as_bytes(), &test_limits()).unwrap();
            (chat.prompting.continue_final_message, chat.prompting.add_generation_prompt)
        };
        assert_eq!(prompting(""), (true, false));
        assert_eq!(prompting(r#","continue_final_message":false"#), (false, true));
        assert_eq!(prompting(r#","add_generation_prompt":true"#), (false, true));
        assert_eq!(prompting(r#","add_generation_prompt":false"#), (true, false));
    }

    #[test]
    fn tools_that_are_not_to_be_called_are_not_told() {
        assert_eq!(parse(&format!(",{TOOLS}")).unwrap().tool_names, ["f"]);
        let none = parse(&format!(r#",{TOOLS},"tool_choice":"none""#)).unwrap();
        assert!(none.tool_names.is_empty() && none.prompting.tools.is_none());
    }

    #[test]
    fn a_form_of_the_answer_is_taken_up_and_its_end_is_the_answers() {
        let grammar = |fields: &str| parse(fields).unwrap().options.sampling.grammar;
        assert_eq!(grammar(&format!(",{TOOLS}")), None);
        assert_eq!(grammar(r#","response_format":{"type":"text"}"#), None);
        let object = grammar(r#","response_format":{"type":"json_object"}"#).unwrap();
        assert_eq!((object.kind, object.field), (form::Kind::JsonSchema, "response_format"));
        for choice in [r#""required""#, r#""f""#, r#"{"type":"function","function":{"name":"f"}}"#] {
            let call = grammar(&format!(r#",{TOOLS},"tool_choice":{choice}"#)).unwrap();
            assert!(call.field == "tool_choice" && call.source.contains(r#""name":{"const":"f"}"#), "{call:?}");
        }
        let ignoring = r#","ignore_eos":true,"response_format":{"type":"json_object"}"#;
        assert!(!parse(ignoring).unwrap().options.ignore_eos);
        assert!(parse(r#","ignore_eos":true"#).unwrap().options.ignore_eos);
    }

    #[test]
    fn what_is_refused_is_named() {
        for (fields, expected) in [
            (r#","max_tokens":1,"max_completion_tokens":1"#, "`max_tokens` and `max_completion_tokens`"),
            (r#","top_logprobs":3"#, "`top_logprobs` is only allowed when `logprobs` is true"),
            (r#","logprobs":true,"top_logprobs":21"#, "`top_logprobs` must be <= 20"),
            (r#","chat_template":"x""#, "`chat_template` cannot be chosen"),
            (r#","tool_choice":"f""#, "Tool error: Tool with name \"f\" not found"),
            (r#","tool_choice":"required""#, "Tool error: `tool_choice` requires a tool"),
            (r#","tool_choice":7"#, "`tool_choice`: expected auto"),
            (r#","tool_choice":{}"#, "`tool_choice`: expected auto"),
            (
                r#","tools":[],"response_format":{"type":"json_object"}"#,
                "Tool error: Grammar and tools are mutually exclusive",
            ),
            (r#","response_format":[]"#, "`response_format`: expected a JSON object"),
            (r#","presence_penalty":-2.1"#, "`presence_penalty` must be >= -2.0 and <= 2.0"),
            (r#","stream":"true""#, "`stream`: invalid type"),
            (r#","stream":1"#, "`stream`: invalid type"),
            (r#","continue_final_message":true,"add_generation_prompt":true"#, "exclude each other"),
        ] {
            let message = parse(fields).unwrap_err().to_string();
            assert!(message.contains(expected), "{fields}: {message}");
        }
    }
}
