//! A model's chat template, rendered as transformers renders it, within limits of work, memory and depth.

use std::fmt;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value};

use super::python::{self, Raised};

/// Instructions of one rendering, and as many times 64 bytes that it makes.
const FUEL: u64 = 1_000_000;

/// The same, of one that is brief: a few milliseconds. Chats take less.
const BRIEF_FUEL: u64 = 50_000;

/// Bytes of a rendered chat. The fuel bounds what a template makes on its way there.
const MAX_OUTPUT_BYTES: usize = 16 << 20;

/// Nested calls.
const MAX_RECURSION: usize = 200;

/// Stands behind the text of a message that is to be continued, as in transformers, which finds the place by it.
const CONTINUE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The template that is used unless another of the model's fits better.
pub const DEFAULT: &str = "default";
/// The one for chats with tools, where a model has it.
const TOOL_USE: &str = "tool_use";

/// A template cannot be used at all.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{file}, line {line} of its chat template {name:?}: {reason}")]
pub struct TemplateError {
    /// Where it stands.
    pub file: String,
    /// What the model calls it.
    pub name: String,
    /// Of the template's text, from 1 on.
    pub line: usize,
    /// In words.
    pub reason: String,
}

/// A chat cannot be rendered.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RenderError {
    /// The model has no template.
    #[error("the model has no chat template")]
    Absent,
    /// The template itself says that it does not take this chat.
    #[error("{0}")]
    Refused(String),
    /// It takes too long, becomes too long, or nests too deep.
    #[error("the chat template takes more than the work that a request may cost")]
    TooMuch,
    /// Something in the template does not fit the chat.
    #[error("{0}")]
    Failed(String),
    /// The message to be continued is not in what was rendered.
    #[error("the last message cannot be continued: it does not appear as it is in the rendered chat")]
    CannotContinue,
}

/// One template of a model: what it is called, its text and the file it stands in.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Source {
    /// What the model calls it; `default` if it has but one.
    pub name: String,
    /// Its text.
    pub text: String,
    /// For errors.
    pub file: String,
}

/// What is rendered.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// As the template gets them.
    pub messages: Vec<Value>,
    /// Definitions of tools; `None` is not the same as none of them.
    pub tools: Option<Vec<Value>>,
    /// Whether the beginning of the answer follows.
    pub add_generation_prompt: bool,
    /// Whether the last message is to be gone on with.
    pub continue_final_message: bool,
    /// Further variables.
    pub variables: Map<String, Value>,
}

/// Names that a request may not give to variables of its own.
const RESERVED: [&str; 13] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "loop",
];

/// The templates of a model. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Templates>);

struct Templates {
    environment: Environment<'static>,
    /// The same, with little fuel.
    brief: Environment<'static>,
    sources: Vec<Source>,
    /// `bos_token` and the like.
    tokens: Map<String, Value>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.sources.iter().map(|source| (&source.name, &source.file))).finish()
    }
}

/// What a template is given.
#[derive(Serialize)]
struct Context<'a> {
    #[serde(flatten)]
    tokens: &'a Map<String, Value>,
    #[serde(flatten)]
    variables: &'a Map<String, Value>,
    messages: &'a [Value],
    tools: &'a Option<Vec<Value>>,
    documents: Option<()>,
    add_generation_prompt: bool,
}

impl ChatTemplate {
    /// Compiles all templates of a model. `tokens`: the texts of special tokens by name. No source: nothing is rendered.
    pub fn new(sources: Vec<Source>, tokens: Map<String, Value>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        python::install(&mut environment);
        for source in &sources {
            let text = without_generation_marks(&source.text);
            environment.add_template_owned(source.name.clone(), text).map_err(|error| TemplateError {
                file: source.file.clone(),
                name: source.name.clone(),
                line: error.line().unwrap_or(1),
                reason: error.detail().map_or_else(|| error.kind().to_string(), str::to_owned),
            })?;
        }
        let mut brief = environment.clone();
        brief.set_fuel(Some(BRIEF_FUEL));
        Ok(Self(Arc::new(Templates { environment, brief, sources, tokens })))
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.0.sources.is_empty()
    }

    /// Whether some template names this: a field of messages, a variable, a mark.
    pub fn mentions(&self, what: &str) -> bool {
        self.0.sources.iter().any(|source| source.text.contains(what))
    }

    /// Whether a request may give this name to a variable.
    pub fn is_reserved(&self, name: &str) -> bool {
        RESERVED.contains(&name) || self.0.tokens.contains_key(name) || name.ends_with("_token")
    }

    /// What keeps it from rendering even a chat of one word, or renders nothing of it. A template may refuse one in its own words.
    pub fn flaw(&self) -> Option<String> {
        let of = |content: Value| {
            let messages = vec![serde_json::json!({"role": "user", "content": content})];
            self.render(&Chat { messages, add_generation_prompt: true, ..Chat::default() })
        };
        let words = || of("Hello".into());
        // Some take a message's text in parts alone.
        let parts = || of(serde_json::json!([{"type": "text", "text": "Hello"}]));
        let flaw_of = |rendered: Result<String, RenderError>| match rendered {
            Ok(text) if text.trim().is_empty() => Some("renders nothing of a chat".to_owned()),
            Ok(_) | Err(RenderError::Absent | RenderError::Refused(_)) => None,
            Err(error) => Some(format!("cannot render a chat: {error}")),
        };
        let flaw = flaw_of(words())?;
        flaw_of(parts()).map(|_| flaw)
    }

    /// The prompt. Takes up to a tenth of a second of one core.
    pub fn render(&self, chat: &Chat) -> Result<String, RenderError> {
        self.render_in(&self.0.environment, chat)
    }

    /// The same, within a few milliseconds: [`RenderError::TooMuch`] if it takes longer.
    pub fn render_briefly(&self, chat: &Chat) -> Result<String, RenderError> {
        self.render_in(&self.0.brief, chat)
    }

    fn render_in(&self, environment: &Environment<'static>, chat: &Chat) -> Result<String, RenderError> {
        let name = self.choose(chat.tools.is_some()).ok_or(RenderError::Absent)?;
        let mut messages = chat.messages.clone();
        if chat.continue_final_message {
            let content = messages.last_mut().and_then(|last| last.get_mut("content"));
            let Some(Value::String(content)) = content else { return Err(RenderError::CannotContinue) };
            content.push_str(CONTINUE);
        }
        let context = Context {
            tokens: &self.0.tokens,
            variables: &chat.variables,
            messages: &messages,
            tools: &chat.tools,
            documents: None,
            add_generation_prompt: chat.add_generation_prompt,
        };
        let template = environment.get_template(name).map_err(|error| describe(&error))?;
        let context = minijinja::Value::from(minijinja::value::Serde(&context));
        let mut out = Bounded(vec![]);
        template.render_captured_to(context, &mut out).map_err(|error| describe(&error))?;
        let text = String::from_utf8(out.0).map_err(|_| RenderError::TooMuch)?;
        if chat.continue_final_message { cut(text) } else { Ok(text) }
    }

    fn choose(&self, has_tools: bool) -> Option<&str> {
        let named = |name: &str| self.0.sources.iter().find(|source| source.name == name);
        let for_tools = named(TOOL_USE).filter(|_| has_tools);
        let only = self.0.sources.first().filter(|_| self.0.sources.len() == 1);
        for_tools.or_else(|| named(DEFAULT)).or(only).map(|source| source.name.as_str())
    }
}

/// Up to where the last message's text ends.
fn cut(mut text: String) -> Result<String, RenderError> {
    let at = text.rfind(CONTINUE.trim_end()).ok_or(RenderError::CannotContinue)?;
    // A template that trims the text of messages would have trimmed this one's.
    let is_trimmed = !text[at..].starts_with(CONTINUE);
    text.truncate(at);
    if is_trimmed {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// Text up to a limit.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn describe(error: &minijinja::Error) -> RenderError {
    let first: &dyn std::error::Error = error;
    let mut causes = std::iter::successors(Some(first), |cause| cause.source());
    if let Some(Raised(message)) = causes.find_map(|cause| cause.downcast_ref::<Raised>()) {
        return RenderError::Refused(message.clone());
    }
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => RenderError::TooMuch,
        ErrorKind::InvalidOperation if detail.contains("recursion limit") => RenderError::TooMuch,
        kind => {
            let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the chat template)"));
            let separator = if detail.is_empty() { "" } else { ": " };
            RenderError::Failed(format!("{kind}{separator}{detail}{line}"))
        }
    }
}

/// `{% generation %}` marks what a model is trained on. It changes nothing that is rendered.
fn without_generation_marks(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (inside, end) = (&rest[start + 2..start + length], start + length + 2);
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replaced = match word {
            "generation" => inside.replacen("generation", "if true", 1),
            "endgeneration" => inside.replacen("endgeneration", "endif", 1),
            _ => inside.to_owned(),
        };
        out.push_str(&rest[..start]);
        out.push_str("{%");
        out.push_str(&replaced);
        out.push_str("%}");
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;

    fn template(text: &str) -> ChatTemplate {
        let source = Source { name: DEFAULT.into(), text: text.into(), file: "chat_template.jinja".into() };
        ChatTemplate::new(vec![source], Map::new()).unwrap()
    }

    fn chat(content: &str) -> Chat {
        Chat { messages: vec![json!({"role": "user", "content": content})], ..Chat::default() }
    }

    #[test]
    fn a_template_that_does_not_parse_is_named_with_its_line() {
        let source =
            Source { name: DEFAULT.into(), text: "a\n{% if x %}\n{% endfor %}".into(), file: "f.jinja".into() };
        let error = ChatTemplate::new(vec![source], Map::new()).unwrap_err();
        assert_eq!((error.file.as_str(), error.line), ("f.jinja", 3), "{error}");
    }

    #[test]
    fn a_template_that_renders_no_chat_at_all_has_a_flaw() {
        for (text, expected) in [
            ("", "renders nothing of a chat"),
            (" \n{{ nothing }}", "renders nothing of a chat"),
            ("{{ messages[0].content | nosuchfilter }}", "unknown filter"),
            ("{{ nosuchfunction(messages) }}", "cannot render a chat"),
        ] {
            let found = template(text).flaw();
            assert!(found.as_ref().is_some_and(|flaw| flaw.contains(expected)), "{text:?}: {found:?}");
        }
        for text in [
            "{{ messages[0].content }}",
            "{{ raise_exception('first comes the system') }}",
            "{% for part in messages[0].content %}{{ part.text.strip() }}{% endfor %}",
        ] {
            assert_eq!(template(text).flaw(), None, "{text:?}");
        }
        assert_eq!(ChatTemplate::new(vec![], Map::new()).unwrap().flaw(), None);
    }

    #[test]
    fn what_stands_in_messages_is_never_a_template() {
        let text = "{{ 7*7 }}{% for i in range(10**9) %}";
        assert_eq!(template("[{{ messages[0].content }}]").render(&chat(text)).unwrap(), format!("[{text}]"));
    }

    #[test]
    fn a_template_may_refuse_a_chat_in_its_own_words() {
        let refused = template("{{ raise_exception('only ' + 'one') }}").render(&chat(""));
        assert_eq!(refused, Err(RenderError::Refused("only one".into())));
    }

    #[test]
    fn a_hostile_template_is_stopped_soon() {
        for text in [
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{{ 'x' * 10000000000 }}",
            "{{ messages[0].content.replace('a', messages[0].content) }}",
            "{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}",
        ] {
            let began = Instant::now();
            let refused = template(text).render(&chat(&"a".repeat(100_000)));
            assert!(matches!(refused, Err(RenderError::TooMuch | RenderError::Failed(_))), "{text}: {refused:?}");
            assert!(began.elapsed() < Duration::from_secs(5), "{text}: {:?}", began.elapsed());
        }
    }

    #[test]
    fn the_template_for_tools_is_taken_when_there_are_tools() {
        let source = |name: &str| Source { name: name.into(), text: name.into(), file: String::new() };
        let both = ChatTemplate::new(vec![source(DEFAULT), source(TOOL_USE)], Map::new()).unwrap();
        assert_eq!(both.render(&chat("")).unwrap(), DEFAULT);
        assert_eq!(both.render(&Chat { tools: Some(vec![]), ..chat("") }).unwrap(), TOOL_USE);
        let none = ChatTemplate::new(vec![], Map::new()).unwrap();
        assert_eq!(none.render(&chat("")), Err(RenderError::Absent));
    }

    #[test]
    fn what_takes_long_is_told_within_milliseconds_and_what_chats_are_is_not_stopped() {
        let usual =
            "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content | trim }}{% endif %}{% endfor %}";
        let many = Chat { messages: vec![json!({"role": "user", "content": "a".repeat(100)}); 500], ..Chat::default() };
        assert_eq!(template(usual).render_briefly(&many), template(usual).render(&many));
        let long = "{% for i in range(60000) %}x{% endfor %}";
        let began = Instant::now();
        assert_eq!(template(long).render_briefly(&chat("")), Err(RenderError::TooMuch));
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        assert_eq!(template(long).render(&chat("")).unwrap().len(), 60_000);
    }
}
