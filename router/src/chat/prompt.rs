//! Messages fitted to what a template knows: tools told in words where it has none, calls as text where it knows none.

use serde_json::{Map, Value, json};

use super::template::{Chat, ChatTemplate, RenderError};

/// Said after the tools, unless the request says something else.
const TOOL_PROMPT: &str = "If one of these functions helps, answer with nothing but a JSON object of the form \
                           {\"name\": name of the function, \"parameters\": object of its arguments}.";

/// What a request wants rendered.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Checked messages.
    pub messages: Vec<Value>,
    /// Checked tools.
    pub tools: Option<Vec<Value>>,
    /// Said about the tools.
    pub tool_prompt: Option<String>,
    /// Whether the last message is gone on with.
    pub continue_final_message: bool,
    /// Whether the beginning of an answer follows.
    pub add_generation_prompt: bool,
    /// Variables of the request's own.
    pub variables: Map<String, Value>,
}

/// The chat as the template takes it.
pub fn fit(template: &ChatTemplate, wanted: Wanted) -> Result<Chat, RenderError> {
    if let Some(name) = wanted.variables.keys().find(|name| template.is_reserved(name)) {
        let name: String = name.chars().take(50).collect();
        return Err(RenderError::Refused(format!("`chat_template_kwargs` may not set {name:?}")));
    }
    let Wanted { mut messages, mut tools, tool_prompt, .. } = wanted;
    if !template.mentions("tool_calls") {
        messages.iter_mut().for_each(calls_as_text);
    }
    let knows_tools = template.mentions("tools");
    if let Some(list) = &tools
        && (!knows_tools || tool_prompt.is_some())
        && let Some(Value::String(content)) = messages.last_mut().and_then(|last| last.get_mut("content"))
    {
        if !knows_tools {
            content.push_str(&format!("\n---\n{}", Value::Array(list.clone())));
        }
        content.push('\n');
        content.push_str(tool_prompt.as_deref().unwrap_or(TOOL_PROMPT));
    }
    if !knows_tools {
        tools = None;
    }
    Ok(Chat {
        messages,
        tools,
        add_generation_prompt: wanted.add_generation_prompt,
        continue_final_message: wanted.continue_final_message,
        variables: wanted.variables,
    })
}

fn calls_as_text(message: &mut Value) {
    let Some(object) = message.as_object_mut() else { return };
    if let Some(calls) = object.remove("tool_calls") {
        object.insert("content".into(), json!(calls.to_string()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::template::{DEFAULT, Source};
    use super::*;

    fn render_with(template: &str, wanted: Wanted) -> Result<String, RenderError> {
        let source = Source { name: DEFAULT.into(), text: template.into(), file: String::new() };
        let tokens = json!({"bos_token": "<s>"}).as_object().unwrap().clone();
        let template = ChatTemplate::new(vec![source], tokens).unwrap();
        template.render(&fit(&template, wanted)?)
    }

    fn wanted() -> Wanted {
        let messages = vec![json!({"role": "user", "content": "hi"})];
        let tools = vec![json!({"type": "function", "function": {"name": "f"}})];
        Wanted { messages, tools: Some(tools), ..Wanted::default() }
    }

    #[test]
    fn tools_are_told_in_words_where_the_template_knows_none() {
        let plain = "{{ messages[-1].content }}";
        let told = render_with(plain, wanted()).unwrap();
        assert!(told.starts_with("hi\n---\n[{\"type\":\"function\"") && told.ends_with(TOOL_PROMPT), "{told}");
        let own = Wanted { tool_prompt: Some("Mine.".into()), ..wanted() };
        assert!(render_with(plain, own.clone()).unwrap().ends_with("\nMine."));
        assert_eq!(render_with("{{ tools[0].function.name }}{{ messages[-1].content }}", own).unwrap(), "fhi\nMine.");
    }

    #[test]
    fn calls_are_text_where_the_template_knows_none() {
        let calls = json!([{"function": {"name": "f"}}]);
        let message = json!({"role": "assistant", "content": "", "tool_calls": calls});
        let wanted = || Wanted { messages: vec![message.clone()], ..Wanted::default() };
        assert_eq!(render_with("{{ messages[0].content }}", wanted()).unwrap(), calls.to_string());
        assert_eq!(render_with("{{ messages[0].content }}{# tool_calls #}", wanted()).unwrap(), "");
    }

    #[test]
    fn a_request_may_set_variables_but_not_those_of_the_server() {
        let with = |name: &str| {
            let variables = [(name.to_owned(), json!("mine"))].into_iter().collect();
            render_with("{{ enable_thinking }}{{ bos_token }}", Wanted { variables, ..wanted() })
        };
        assert!(with("enable_thinking").unwrap().starts_with("mine"));
        for name in ["messages", "tokenize", "raise_exception", "bos_token", "eos_token"] {
            assert!(matches!(with(name), Err(RenderError::Refused(_))), "{name}");
        }
    }
}
