//! A grammar is made, and its first steps are taken.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::ensure;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value};

use super::bounds;
use crate::request::form::{Grammar, Kind};

/// Steps of one byte that a text of the grammar must allow, if it is not over before: what costs too much does so early.
const NUM_STEPS: usize = 24;

/// How long they may take.
const STEPPING: Duration = Duration::from_millis(250);

/// How much more time may be spent to find the part of a schema that is refused.
const LOCATING: Duration = Duration::from_millis(200);

/// How a reason begins that is about cost.
const COMPLEX: &str = "it is too complex";

/// Characters of a reason.
const MAX_REASON: usize = 160;

/// How much a grammar may cost, here and in the shards: `text_generation_server/sampling/grammar.py` has the same numbers.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 20_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// Tries grammars, over single bytes: whether there is a text does not depend on how a model cuts it.
pub(super) struct Trials {
    factory: ParserFactory,
}

impl Trials {
    pub fn new() -> anyhow::Result<Self> {
        let mut factory =
            ParserFactory::new(&ApproximateTokEnv::single_byte_env(), InferenceCapabilities::default(), &[])?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory })
    }

    /// Why a grammar cannot be used, and where, if it cannot.
    pub fn judge(&self, grammar: &Grammar) -> Result<(), String> {
        if grammar.kind == Kind::Regex {
            bounds::check_regex(&grammar.source)?;
            return self.make(TopLevelGrammar::from_regex(&grammar.source));
        }
        let schema = serde_json::from_str::<Value>(&grammar.source).map_err(|error| error.to_string())?;
        bounds::check_schema(&schema)?;
        let judgement = self.make(TopLevelGrammar::from_json_schema(schema.clone()));
        judgement.map_err(|reason| {
            // What costs too much is the whole, and has cost enough.
            if reason.starts_with(COMPLEX) {
                return reason;
            }
            let (place, reason) = self.locate(&schema, reason);
            if place.is_empty() { reason } else { format!("at {place}: {reason}") }
        })
    }

    /// Makes a grammar and takes its first steps.
    fn make(&self, grammar: TopLevelGrammar) -> Result<(), String> {
        let tried = catch_unwind(AssertUnwindSafe(|| step(Matcher::new(self.factory.create_parser(grammar)))));
        match tried {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(in_words(&error.to_string())),
            Err(_) => Err("it cannot be made sense of".into()),
        }
    }

    /// The smallest part of a schema that is refused by itself, as a JSON pointer, and why.
    fn locate(&self, root: &Value, reason: String) -> (String, String) {
        let started = Instant::now();
        let (mut place, mut at, mut found) = (String::new(), root, reason);
        loop {
            let mut refused = None;
            for (path, part) in parts(at) {
                if started.elapsed() > LOCATING {
                    return (place, found);
                }
                let Some(alone) = alone(root, part) else { continue };
                if let Err(reason) = self.make(TopLevelGrammar::from_json_schema(alone)) {
                    refused = Some((path, part, reason));
                    break;
                }
            }
            let Some((path, part, reason)) = refused else { return (place, found) };
            place.push_str(&path);
            (at, found) = (part, reason);
        }
    }
}

/// Writes the first bytes of a text, always the least that is allowed and no control character or space.
fn step(mut matcher: Matcher) -> anyhow::Result<()> {
    let started = Instant::now();
    let eos = matcher.tok_env()?.tok_trie().eos_token();
    for n in 0..NUM_STEPS {
        let mask = matcher.compute_mask_or_eos()?;
        ensure!(!mask.is_zero(), "no text satisfies it");
        let next = (u32::from(b'!')..eos).find(|byte| mask.is_allowed(*byte));
        let Some(next) = next.or_else(|| (0..u32::from(b'!')).find(|byte| mask.is_allowed(*byte))) else { break };
        ensure!(started.elapsed() < STEPPING, "{COMPLEX}: its first {n} steps took too long");
        if matcher.is_stopped() {
            break;
        }
        matcher.consume_token(next)?;
    }
    Ok(())
}

/// What the library says, in the words of a client's.
fn in_words(error: &str) -> String {
    let lines: Vec<&str> = error.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    // Of a regular expression, the last line but those that show the place says what is wrong.
    let cause = lines.iter().find_map(|line| line.strip_prefix("error: ").map(|cause| format!("regex: {cause}")));
    let cause = cause.unwrap_or_else(|| lines.first().copied().unwrap_or("it cannot be used").to_owned());
    let of_size = ["fuel", "too large", "too many", "too big", "current row has", "limit", "complex"];
    match cause.to_lowercase() {
        lower if lower.contains("oneof constraints are not supported") => {
            "`oneOf` of schemas that may hold for the same value is not supported; use `anyOf`".into()
        }
        lower if lower.contains("noextension") => "no text satisfies it".into(),
        lower if lower.starts_with(COMPLEX) => cause,
        lower if of_size.iter().any(|word| lower.contains(word)) => format!("{COMPLEX} ({})", cut(&cause)),
        _ => cut(&cause),
    }
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_REASON).collect()
}

/// Keywords whose value is a schema, or has schemas as its values.
const OF_ONE: [&str; 2] = ["items", "additionalProperties"];
const OF_SEVERAL: [&str; 8] =
    ["properties", "patternProperties", "anyOf", "oneOf", "allOf", "prefixItems", "$defs", "definitions"];

fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let Some(object) = schema.as_object() else { return vec![] };
    let escaped = |name: &str| cut(&name.replace('~', "~0").replace('/', "~1"));
    let mut parts = vec![];
    for (key, value) in object {
        match value {
            value if OF_ONE.contains(&key.as_str()) => parts.push((format!("/{key}"), value)),
            Value::Object(named) if OF_SEVERAL.contains(&key.as_str()) => {
                parts.extend(named.iter().map(|(name, part)| (format!("/{key}/{}", escaped(name)), part)));
            }
            Value::Array(listed) if OF_SEVERAL.contains(&key.as_str()) => {
                parts.extend(listed.iter().enumerate().map(|(n, part)| (format!("/{key}/{n}"), part)));
            }
            _ => {}
        }
    }
    parts
}

/// A part of a schema with what it may refer to.
fn alone(root: &Value, part: &Value) -> Option<Value> {
    let mut schema: Map<String, Value> = part.as_object()?.clone();
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = root.get(key) {
            schema.insert(key.into(), definitions.clone());
        }
    }
    Some(Value::Object(schema))
}
