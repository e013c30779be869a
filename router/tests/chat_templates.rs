//! Chat templates in the style of published families, rendered byte for byte as transformers renders them.
//!
//! `chat_templates/rendered.json` is written by `integration-tests/support/chat_templates.py`; a test there checks that it is
//! what the installed transformers renders.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use text_generation_router::chat::template::{Chat, ChatTemplate, DEFAULT, Source};

#[derive(Clone, Deserialize)]
struct Case {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    variables: Map<String, Value>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates")
}

fn read<T: for<'de> Deserialize<'de>>(file: &str) -> T {
    serde_json::from_slice(&std::fs::read(folder().join(file)).unwrap()).unwrap()
}

#[test]
fn every_template_renders_every_chat_as_transformers_does() {
    let chats: BTreeMap<String, Case> = read("chats.json");
    let rendered: BTreeMap<String, BTreeMap<String, Option<String>>> = read("rendered.json");
    assert!(rendered.len() >= 40, "{} templates", rendered.len());
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let mut wrong = vec![];
    for (name, expected) in &rendered {
        let text = std::fs::read_to_string(folder().join(format!("{name}.jinja"))).unwrap();
        let source = Source { name: DEFAULT.into(), text, file: format!("{name}.jinja") };
        let template = ChatTemplate::new(vec![source], tokens.as_object().unwrap().clone()).unwrap();
        for (title, expected) in expected {
            let Case { messages, tools, add_generation_prompt, continue_final_message, mut variables } =
                chats[title].clone();
            variables.insert("date_string".into(), "26 Jul 2024".into());
            let chat = Chat { messages, tools, add_generation_prompt, continue_final_message, variables };
            let got = template.render(&chat);
            if got.as_ref().ok() != expected.as_ref() {
                wrong.push(format!("{name}, {title}:\n expected {expected:?}\n got      {got:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of the prompts are others:\n{}", wrong.len(), wrong.join("\n"));
}
