//! Whether a text of a wanted form exists and can be found within bounds: judged before a request is queued, by the library
//! that the shards generate with, on a thread of its own. It never sees a token of the model.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use self::trial::Trials;
use crate::request::form::{Grammar, Kind};

mod bounds;
mod trial;

/// How long a request waits for the judgement.
const DEADLINE: Duration = Duration::from_secs(1);

/// Grammars that wait to be judged.
const MAX_WAITING: usize = 64;

/// Judgements that are remembered, and the bytes of their sources.
const MAX_KNOWN: usize = 512;
const MAX_KNOWN_BYTES: usize = 8 << 20;

/// References in a schema may lead deep into each other.
const STACK_BYTES: usize = 64 << 20;

/// Why a grammar is not taken.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum GrammarError {
    /// There is no such text, or it cannot be found.
    #[error("{0}")]
    Refused(Arc<str>),
    /// Too many others wait.
    #[error("too many grammars are being checked")]
    Busy,
    /// The thread that judges is gone.
    #[error("the check of grammars has ended")]
    Ended,
}

type Judgement = Result<(), Arc<str>>;

struct Job {
    grammar: Grammar,
    has_begun: Arc<AtomicBool>,
    /// Whoever does not wait any more needs no answer.
    reply: oneshot::Sender<Judgement>,
}

/// Judges grammars and remembers what it found. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Judge {
    jobs: SyncSender<Job>,
    known: Arc<Mutex<Known>>,
}

impl Judge {
    /// Starts the thread, which ends with the last clone.
    pub fn new() -> io::Result<Self> {
        let (jobs, waiting) = sync_channel(MAX_WAITING);
        let known = Arc::new(Mutex::new(Known::default()));
        let judge = Self { jobs, known: Arc::clone(&known) };
        std::thread::Builder::new()
            .name("grammar".into())
            .stack_size(STACK_BYTES)
            .spawn(move || work(&waiting, &known))?;
        Ok(judge)
    }

    /// Waits for the judgement of a grammar, not longer than a second.
    pub async fn check(&self, grammar: &Grammar) -> Result<(), GrammarError> {
        if let Some(judgement) = lock(&self.known).get(grammar) {
            return judgement.map_err(GrammarError::Refused);
        }
        let (reply, judgement) = oneshot::channel();
        let has_begun = Arc::new(AtomicBool::new(false));
        let job = Job { grammar: grammar.clone(), has_begun: Arc::clone(&has_begun), reply };
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => GrammarError::Busy,
            TrySendError::Disconnected(_) => GrammarError::Ended,
        })?;
        match tokio::time::timeout(DEADLINE, judgement).await {
            Ok(Ok(judgement)) => judgement.map_err(GrammarError::Refused),
            Ok(Err(_)) => Err(GrammarError::Ended),
            // It is not to blame for those before it.
            Err(_) if !has_begun.load(Ordering::Relaxed) => Err(GrammarError::Busy),
            Err(_) => Err(GrammarError::Refused("it is too complex: it cannot be checked within a second".into())),
        }
    }

    /// Takes note that the shards could not go on with a grammar that was found good.
    pub fn disprove(&self, grammar: &Grammar, cause: &str) {
        lock(&self.known).insert(grammar, Err(cause.into()));
    }
}

fn lock(known: &Mutex<Known>) -> std::sync::MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was found, for as many grammars as fit; those that came first go first.
#[derive(Debug, Default)]
struct Known {
    judgements: HashMap<(Kind, Arc<str>), Judgement>,
    order: VecDeque<(Kind, Arc<str>)>,
    num_bytes: usize,
}

impl Known {
    fn get(&self, grammar: &Grammar) -> Option<Judgement> {
        self.judgements.get(&(grammar.kind, Arc::clone(&grammar.source))).cloned()
    }

    fn insert(&mut self, grammar: &Grammar, judgement: Judgement) {
        let key = (grammar.kind, Arc::clone(&grammar.source));
        if self.judgements.insert(key.clone(), judgement).is_none() {
            self.num_bytes += key.1.len();
            self.order.push_back(key);
        }
        while self.order.len() > MAX_KNOWN || self.num_bytes > MAX_KNOWN_BYTES {
            let Some(oldest) = self.order.pop_front() else { return };
            self.num_bytes -= oldest.1.len();
            self.judgements.remove(&oldest);
        }
    }
}

fn work(jobs: &Receiver<Job>, known: &Mutex<Known>) {
    // Whoever streams comes first. On Linux, threads have priorities of their own.
    let _ = rustix::process::nice(10);
    let trials = match Trials::new() {
        Ok(trials) => trials,
        Err(error) => return tracing::error!(%error, "grammars cannot be checked"),
    };
    while let Ok(Job { grammar, has_begun, reply }) = jobs.recv() {
        if reply.is_closed() {
            continue;
        }
        has_begun.store(true, Ordering::Relaxed);
        let seen = lock(known).get(&grammar);
        let judgement = seen.unwrap_or_else(|| trials.judge(&grammar).map_err(Arc::from));
        lock(known).insert(&grammar, judgement.clone());
        let _ = reply.send(judgement);
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use serde_json::{Value, json};

    use super::*;
    use crate::request::form::{Form, bind};

    fn regex(source: &str) -> Grammar {
        bind(Form::Regex(source.into()), "grammar", &[]).unwrap()
    }

    fn schema(schema: Value) -> Grammar {
        bind(Form::Schema(schema), "grammar", &[]).unwrap()
    }

    fn nested(levels: usize) -> Value {
        (0..levels).fold(
            json!({"type": "string"}),
            |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
        )
    }

    fn object(properties: impl Iterator<Item = String>, is_required: bool) -> Value {
        let names: Vec<String> = properties.collect();
        let properties: serde_json::Map<_, _> =
            names.iter().map(|name| (name.clone(), json!({"type": "string"}))).collect();
        let required = if is_required { names } else { vec![] };
        json!({"type": "object", "properties": properties, "required": required})
    }

    /// Every grammar, and what its refusal says; nothing: it is taken.
    fn cases() -> Vec<(Grammar, Option<&'static str>)> {
        let chain = |n: usize| {
            let mut definitions: serde_json::Map<_, _> =
                (0..n).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}))).collect();
            definitions.insert(format!("d{n}"), json!({"type": "string"}));
            json!({"$ref": "#/$defs/d0", "$defs": definitions})
        };
        let twice: serde_json::Map<_, _> = (0..40)
            .map(|i| {
                let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
                (format!("d{i}"), json!({"allOf": [next, next]}))
            })
            .chain([("d40".to_owned(), json!({"type": "object"}))])
            .collect();
        let mut many = String::new();
        (0..400).for_each(|i| write!(many, "{}word{i}", if i == 0 { "" } else { "|" }).unwrap());
        vec![
            (regex("("), Some("unclosed group")),
            (regex("(?=a)b"), Some("look-around")),
            (regex(r"(a)\1"), Some("backreferences")),
            (regex("[z-a]"), Some("invalid character class range")),
            (regex("[ab]*a[ab]{13}"), None),
            (regex("(a{1000}){1000}"), Some("too complex")),
            (regex("a{1000000}"), Some("too complex")),
            (regex(&format!("{}a{}", "(".repeat(3000), ")".repeat(3000))), Some("nest")),
            (regex(r"[^\s\S]"), Some("no text satisfies it")),
            (regex(r"(\w{1,100}\s\w{1,100}){20}"), None),
            (regex("(x+x+)+y"), None),
            (regex(""), None),
            (regex(&many), None),
            (schema(json!(true)), None),
            (schema(json!({})), None),
            (schema(json!(false)), Some("Unsatisfiable")),
            (schema(json!({"enum": []})), Some("Unsatisfiable")),
            (schema(json!({"type": "string", "minLength": 5, "maxLength": 3})), Some("Unsatisfiable")),
            (schema(json!({"allOf": [{"type": "string"}, {"type": "integer"}]})), Some("Unsatisfiable")),
            (schema(nested(60)), None),
            (schema(json!({"enum": (0..3000).map(|i| format!("value {}", i * 7919)).collect::<Vec<_>>()})), None),
            (schema(object((0..1000).map(|i| format!("p{i}")), false)), Some("too complex")),
            (schema(object((0..100).map(|i| format!("p{i}")), false)), None),
            (schema(object((0..500).map(|i| format!("p{i}")), true)), None),
            (
                schema(
                    json!({"anyOf": (0..500).map(|i| object(std::iter::once(format!("k{i}")), true)).collect::<Vec<_>>()}),
                ),
                None,
            ),
            (schema(json!({"$ref": "http://169.254.169.254/"})), Some("does not fetch")),
            (schema(json!({"$ref": "file:///etc/passwd"})), Some("does not fetch")),
            (schema(json!({"$ref": "#"})), Some("no text satisfies it")),
            (schema(json!({"type": 7})), Some("type must be")),
            (schema(json!({"type": "strnig"})), Some("Invalid type: strnig")),
            (schema(json!({"type": "object", "properties": []})), Some("properties must be")),
            (
                schema(json!({"properties": {"a": {"items": {"type": "strnig"}}}})),
                Some("at /properties/a/items: Invalid type"),
            ),
            (
                schema(json!({"properties": {"a/b": {"not": {"type": "string"}}}})),
                Some("at /properties/a~1b: Unimplemented"),
            ),
            (
                schema(json!({"$defs": {"x": {"type": "array", "uniqueItems": true}}, "$ref": "#/$defs/x"})),
                Some("uniqueItems"),
            ),
            (schema(json!({"oneOf": [{"type": "string"}, {"type": "integer"}]})), None),
            (schema(json!({"oneOf": [{"type": "string"}, {"minLength": 2, "type": "string"}]})), Some("use `anyOf`")),
            (schema(json!({"type": "integer", "multipleOf": 1_000_003})), Some("at /multipleOf: ")),
            (schema(json!({"type": "array", "items": {"type": "integer"}, "minItems": 100_000})), None),
            (schema(json!({"type": "string", "minLength": 1000, "maxLength": 1_000_000})), None),
            (schema(json!({"type": "string", "pattern": "^(a{1000}){1000}$"})), Some("at /pattern: it is too complex")),
            (schema(chain(1000)), None),
            (schema(json!({"$ref": "#/$defs/d0", "$defs": twice})), None),
        ]
    }

    #[tokio::test]
    async fn a_grammar_is_taken_or_refused_within_a_second_and_a_reason_says_where() {
        // For a thread that has to wait for a core.
        let patience = Duration::from_millis(500);
        let (judge, mut late) = (Judge::new().unwrap(), 0);
        for (grammar, expected) in cases() {
            let shown: String = grammar.source.chars().take(80).collect();
            let is_expected = |found: &Result<(), GrammarError>| match (found, expected) {
                (Ok(()), None) => true,
                (Err(GrammarError::Refused(reason)), Some(part)) => reason.contains(part),
                _ => false,
            };
            let begun = std::time::Instant::now();
            let mut found = judge.check(&grammar).await;
            let took = begun.elapsed();
            assert!(took < DEADLINE + patience, "{shown}: {took:?}");
            if took > DEADLINE {
                // On a busy machine. It is looked at to its end, and remembered as well.
                late += 1;
                while !is_expected(&found) && begun.elapsed() < 20 * DEADLINE {
                    found = judge.check(&grammar).await;
                }
            }
            assert!(is_expected(&found), "{shown}: {found:?}, expected {expected:?}");
            if let Err(GrammarError::Refused(reason)) = &found {
                assert!(!reason.contains('\n') && reason.len() < 600, "{reason}");
            }
            let begun = std::time::Instant::now();
            assert_eq!(judge.check(&grammar).await.is_ok(), found.is_ok());
            assert!(took > DEADLINE || begun.elapsed() < patience, "{shown} is remembered");
        }
        assert!(late <= 3, "{late} took longer than a second");
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded_in_number_and_bytes() {
        let mut known = Known::default();
        for i in 0..2000 {
            known.insert(&regex(&format!("a{i}")), Ok(()));
            assert!(known.order.len() <= MAX_KNOWN && known.judgements.len() == known.order.len());
        }
        assert!(known.get(&regex("a1999")).is_some() && known.get(&regex("a0")).is_none());
        for i in 0..300 {
            known.insert(&regex(&format!("{}{i}", "a".repeat(60_000))), Ok(()));
            assert!(known.num_bytes <= MAX_KNOWN_BYTES);
        }
        let bytes: usize = known.order.iter().map(|(_, source)| source.len()).sum();
        assert_eq!(known.num_bytes, bytes);
    }

    #[tokio::test]
    async fn what_the_shards_could_not_go_on_with_is_refused_from_then_on() {
        let judge = Judge::new().unwrap();
        judge.check(&regex("a+")).await.unwrap();
        judge.disprove(&regex("a+"), "too slow");
        assert_eq!(judge.check(&regex("a+")).await, Err(GrammarError::Refused("too slow".into())));
    }

    #[tokio::test]
    async fn more_grammars_than_can_wait_are_turned_away() {
        let judge = Judge::new().unwrap();
        let slow = |i: usize| schema(object((0..900).map(|n| format!("p{n}x{i}")), false));
        let checks: Vec<_> = (0..3 * MAX_WAITING).map(slow).collect();
        let found = futures::future::join_all(checks.iter().map(|grammar| judge.check(grammar))).await;
        assert!(found.contains(&Err(GrammarError::Busy)));
    }
}
