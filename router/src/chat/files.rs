//! Where a model keeps its chat templates, and the texts of its special tokens.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::template::{ChatTemplate, DEFAULT, Source, TemplateError};

/// Bytes of a file that holds templates; settings of a tokenizer list every added token.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Bytes of a template.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// Why the templates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file cannot be read, or holds something else.
    #[error("{name}: {reason}")]
    File {
        /// Which, after the flag that named it, if one did.
        name: String,
        /// In words.
        reason: String,
    },
    /// A template does not parse.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// What the operator says about them.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// A template to use whatever the model has: `--chat-template`.
    pub chat_template: Option<PathBuf>,
    /// In place of the model's own `tokenizer_config.json`: `--tokenizer-config-path`.
    pub tokenizer_config: Option<PathBuf>,
}

/// A file, and who named it.
#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    /// The model's own; it may be missing.
    Model(&'a Path),
    /// A flag, which says what it expects.
    Flag { flag: &'static str, path: &'a Path, expected: &'static str },
}

impl<'a> Place<'a> {
    fn chat_template(path: &'a Path) -> Self {
        Self::Flag {
            flag: "--chat-template",
            path,
            expected: "a file with a template of Jinja, or one of JSON, named *.json, with `chat_template`",
        }
    }

    fn tokenizer_config(path: &'a Path) -> Self {
        Self::Flag { flag: "--tokenizer-config-path", path, expected: "a file like a model's tokenizer_config.json" }
    }

    fn path(&self) -> &'a Path {
        match self {
            Self::Model(path) | Self::Flag { path, .. } => path,
        }
    }

    fn error(&self, reason: impl std::fmt::Display) -> FilesError {
        let reason = match self {
            Self::Model(_) => reason.to_string(),
            Self::Flag { expected, .. } => format!("{reason}; expected {expected}"),
        };
        FilesError::File { name: self.to_string(), reason }
    }
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Model(path) => write!(f, "{}", path.display()),
            Self::Flag { flag, path, .. } => write!(f, "{flag} {}", path.display()),
        }
    }
}

/// Reads what a model's folder has: the first of `chat_template.jinja` (with `additional_chat_templates/`),
/// `chat_template.json`, `tokenizer_config.json` and `processor_config.json` that has any template. No template is no error.
pub fn read(folder: &Path, overrides: &Overrides) -> Result<ChatTemplate, FilesError> {
    let own = folder.join("tokenizer_config.json");
    let config_place = match &overrides.tokenizer_config {
        Some(path) => Place::tokenizer_config(path),
        None => Place::Model(&own),
    };
    let config = json_file(config_place)?;
    let sources = sources(folder, overrides, (config_place, config.as_ref()))?;
    let legacy = json_file(Place::Model(&folder.join("special_tokens_map.json")))?;
    let tokens = tokens(&[config, legacy]);
    let template = ChatTemplate::new(sources, tokens)?;
    // One that a model has may be of no use; one that somebody names is meant.
    if let Some(path) = &overrides.chat_template
        && let Some(flaw) = template.flaw()
    {
        return Err(Place::chat_template(path).error(flaw));
    }
    Ok(template)
}

fn sources(
    folder: &Path,
    overrides: &Overrides,
    (config_place, config): (Place<'_>, Option<&Value>),
) -> Result<Vec<Source>, FilesError> {
    if let Some(path) = &overrides.chat_template {
        let place = Place::chat_template(path);
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let found = if is_json { in_json(place, json_file(place)?.as_ref())? } else { plain(place, DEFAULT)? };
        return if found.is_empty() { Err(place.error("has no `chat_template`")) } else { Ok(found) };
    }
    if overrides.tokenizer_config.is_some() {
        let found = in_json(config_place, config)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let mut found = plain(Place::Model(&folder.join("chat_template.jinja")), DEFAULT)?;
    found.extend(additional(&folder.join("additional_chat_templates"))?);
    if !found.is_empty() {
        return Ok(found);
    }
    let legacy = folder.join("chat_template.json");
    let found = in_json(Place::Model(&legacy), json_file(Place::Model(&legacy))?.as_ref())?;
    if !found.is_empty() {
        return Ok(found);
    }
    let found = in_json(config_place, config)?;
    if !found.is_empty() {
        return Ok(found);
    }
    let processor = folder.join("processor_config.json");
    in_json(Place::Model(&processor), json_file(Place::Model(&processor))?.as_ref())
}

/// The text of a file; `None` if the model has none.
fn text_file(place: Place<'_>) -> Result<Option<String>, FilesError> {
    let path = place.path();
    if matches!(place, Place::Model(_)) && !path.exists() {
        return Ok(None);
    }
    let unreadable = |error: std::io::Error| place.error(format!("cannot be read: {error}"));
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    // Others, such as a pipe, may never come to an end.
    if !metadata.is_file() {
        return Err(place.error("is no regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(place.error(format!("has {} bytes, of which {MAX_FILE_BYTES} are allowed", metadata.len())));
    }
    std::fs::read_to_string(path).map(Some).map_err(unreadable)
}

fn json_file(place: Place<'_>) -> Result<Option<Value>, FilesError> {
    let Some(text) = text_file(place)? else { return Ok(None) };
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(Some(Value::Object(object))),
        Ok(_) => Err(place.error("is not a JSON object")),
        Err(error) => Err(place.error(format!("is not JSON: {error}"))),
    }
}

/// A file that is a template, if it is there.
fn plain(place: Place<'_>, name: &str) -> Result<Vec<Source>, FilesError> {
    let text = text_file(place)?;
    text.map(|text| source(place, name, text)).into_iter().collect()
}

fn source(place: Place<'_>, name: &str, text: String) -> Result<Source, FilesError> {
    if text.len() > MAX_TEMPLATE_BYTES {
        let bytes = text.len();
        return Err(place.error(format!(
            "the chat template {name:?} has {bytes} bytes, of which {MAX_TEMPLATE_BYTES} are allowed"
        )));
    }
    Ok(Source { name: name.into(), text, file: place.to_string() })
}

/// `additional_chat_templates/NAME.jinja`, as transformers saves them.
fn additional(folder: &Path) -> Result<Vec<Source>, FilesError> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(vec![]) };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    let name = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let found: Result<Vec<_>, _> = paths.iter().map(|path| plain(Place::Model(path), &name(path))).collect();
    Ok(found?.into_iter().flatten().collect())
}

/// `chat_template`: a text, or a list of `{"name", "template"}`.
fn in_json(place: Place<'_>, json: Option<&Value>) -> Result<Vec<Source>, FilesError> {
    let reason = "`chat_template` is neither a text nor a list of objects with `name` and `template`, each name once";
    match json.and_then(|json| json.get("chat_template")) {
        None | Some(Value::Null) => Ok(vec![]),
        Some(Value::String(text)) => Ok(vec![source(place, DEFAULT, text.clone())?]),
        Some(Value::Array(named)) => {
            let mut names = HashSet::new();
            let one = |one: &Value| {
                let (name, text) = (one["name"].as_str(), one["template"].as_str());
                let (Some(name), Some(text)) = (name, text) else { return Err(place.error(reason)) };
                if names.insert(name.to_owned()) { source(place, name, text.into()) } else { Err(place.error(reason)) }
            };
            named.iter().map(one).collect()
        }
        Some(_) => Err(place.error(reason)),
    }
}

/// `bos_token` and the like: a text, or an object with `content`.
fn tokens(files: &[Option<Value>]) -> Map<String, Value> {
    let mut tokens = Map::new();
    for (name, value) in files.iter().flatten().filter_map(Value::as_object).flatten() {
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        if let (true, Some(text)) = (name.ends_with("_token") && !tokens.contains_key(name), text) {
            tokens.insert(name.clone(), text.into());
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::template::Chat;
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let folder = std::env::temp_dir().join(format!("chat-files-{}-{name}", std::process::id()));
            std::fs::create_dir_all(folder.join("additional_chat_templates")).unwrap();
            for (file, text) in files {
                std::fs::write(folder.join(file), text).unwrap();
            }
            Self(folder)
        }

        fn read(&self) -> Result<String, String> {
            let template = read(&self.0, &Overrides::default()).map_err(|error| error.to_string())?;
            let chat = Chat { messages: vec![json!({"role": "user", "content": "hi"})], ..Chat::default() };
            template.render(&chat).map_err(|error| error.to_string())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_first_file_that_has_a_template_counts() {
        let named = r#"{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "list {{ bos_token }}"}]}"#;
        let files = [
            ("processor_config.json", r#"{"chat_template": "processor"}"#, "processor"),
            ("tokenizer_config.json", named, "list <s>"),
            ("chat_template.json", r#"{"chat_template": "json {{ bos_token }}"}"#, "json <s>"),
            ("chat_template.jinja", "jinja\n", "jinja"),
        ];
        for n in 1..=files.len() {
            let here: Vec<_> = files[..n].iter().map(|(file, text, _)| (*file, *text)).collect();
            let folder = Folder::new(&format!("order-{n}"), &here);
            assert_eq!(folder.read().unwrap(), files[n - 1].2);
        }
        assert_eq!(Folder::new("none", &[]).read().unwrap_err(), "the model has no chat template");
    }

    #[test]
    fn what_the_operator_names_comes_before_what_the_model_has() {
        let folder = Folder::new(
            "overrides",
            &[
                ("chat_template.jinja", "model"),
                ("mine.jinja", "mine"),
                ("mine.json", r#"{"chat_template": "config"}"#),
            ],
        );
        let rendered = |overrides: &Overrides| read(&folder.0, overrides).unwrap().render(&Chat::default()).unwrap();
        let config = Overrides { tokenizer_config: Some(folder.0.join("mine.json")), ..Overrides::default() };
        assert_eq!(rendered(&config), "config");
        assert_eq!(rendered(&Overrides { chat_template: Some(folder.0.join("mine.jinja")), ..config }), "mine");
        let missing = Overrides { chat_template: Some(folder.0.join("no.jinja")), ..Overrides::default() };
        let error = read(&folder.0, &missing).unwrap_err().to_string();
        assert!(error.starts_with("--chat-template ") && error.contains("no.jinja: cannot be read"), "{error}");
        assert!(error.contains("expected a file with a template of Jinja"), "{error}");
        let missing = Overrides { tokenizer_config: Some(folder.0.clone()), ..Overrides::default() };
        let error = read(&folder.0, &missing).unwrap_err().to_string();
        assert!(error.starts_with("--tokenizer-config-path ") && error.contains("is no regular file"), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        for (name, file, text, expected) in [
            ("json", "tokenizer_config.json", "{", "tokenizer_config.json: is not JSON"),
            (
                "type",
                "tokenizer_config.json",
                r#"{"chat_template": 7}"#,
                "tokenizer_config.json: `chat_template` is neither",
            ),
            (
                "twice",
                "chat_template.json",
                r#"{"chat_template": [{"name": "a", "template": ""}, {"name": "a", "template": ""}]}"#,
                "each name once",
            ),
            ("syntax", "chat_template.jinja", "\n\n{% for %}", "chat_template.jinja, line 3 of its chat template"),
        ] {
            let error = Folder::new(name, &[(file, text)]).read().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
