//! Carries what the children write to the launcher's own output, whatever they write.
//!
//! A child is never blocked and memory never grows: lines are cut at 8 KiB, and when whoever reads the launcher's output
//! is slower than the children, lines are dropped and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// The longest line that is passed on, in bytes.
pub const MAX_LINE: usize = 8 * 1024;
/// Lines of each child that are remembered, to be shown when it dies.
pub const REMEMBERED: usize = 50;
/// Bytes waiting to be written before lines of children are dropped.
const MAX_WAITING: usize = 1024 * 1024;
/// The launcher's own lines may wait beyond that, up to this.
const MAX_WAITING_OWN: usize = 2 * MAX_WAITING;

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
    /// Bytes of the present line that were not kept.
    omitted: usize,
    /// The last byte was a carriage return, which ended a line: a line feed after it ends no other.
    after_return: bool,
}

impl Lines {
    /// Takes bytes and passes on each line that they complete. A lone carriage return ends a line too: progress bars
    /// write nothing else.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(String)) {
        while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.keep(&bytes[..end]);
            let is_feed = bytes[end] == b'\n';
            bytes = &bytes[end + 1..];
            let is_empty = self.line.is_empty() && self.omitted == 0;
            if !(is_empty && (self.after_return || !is_feed)) {
                each(self.take());
            }
            self.after_return = !is_feed;
        }
        self.keep(bytes);
    }

    /// Passes on what the stream ended with, if it did not end with a line end.
    pub fn finish(&mut self, each: impl FnOnce(String)) {
        if !self.line.is_empty() {
            each(self.take());
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_LINE - self.line.len();
        let kept = bytes.len().min(room);
        self.line.extend_from_slice(&bytes[..kept]);
        self.omitted += bytes.len() - kept;
        self.after_return &= bytes.is_empty();
    }

    fn take(&mut self) -> String {
        let mut line = printable(&String::from_utf8_lossy(&self.line));
        if self.omitted > 0 {
            line.push_str(&format!(" … [{} more bytes]", self.omitted));
        }
        self.line.clear();
        self.omitted = 0;
        line
    }
}

/// Without colours and other control characters: these could rewrite what a terminal already shows.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' && characters.next_if_eq(&'[').is_some() {
            // A control sequence ends with its first byte from '@' to '~' (ECMA-48, 5.4).
            characters.by_ref().find(|character| ('@'..='~').contains(character));
        } else {
            let is_control = character.is_control() && character != '\t';
            printable.push(if is_control { char::REPLACEMENT_CHARACTER } else { character });
        }
    }
    printable
}

/// The last lines of a child.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl Memory {
    /// Remembers a line and forgets the oldest beyond the limit.
    pub fn push(&self, line: String) {
        let mut lines = locked(&self.lines);
        if lines.len() == REMEMBERED {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// Oldest first.
    pub fn lines(&self) -> Vec<String> {
        locked(&self.lines).iter().cloned().collect()
    }
}

/// A poisoned lock guards plain text here, which is whole after every statement.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How lines look.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// For people.
    Text,
    /// A JSON object each.
    Json,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    /// The thread is writing a line that it has taken out.
    writing: bool,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// The launcher's output: a bounded queue in front of a thread that writes.
#[derive(Clone, Debug)]
pub struct Output {
    queue: Arc<Queue>,
    format: Format,
}

impl Output {
    /// Starts the thread that writes.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub fn start(format: Format, mut writer: impl Write + Send + 'static) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let shared = Arc::clone(&queue);
        std::thread::Builder::new().name("log".into()).spawn(move || {
            loop {
                let line = next(&shared);
                // Nobody may be reading any more; the children are to be drained all the same.
                let _ = writer.write_all(&line).and_then(|()| writer.flush());
                locked(&shared.waiting).writing = false;
                shared.changed.notify_all();
            }
        })?;
        Ok(Self { queue, format })
    }

    /// Writes a line of a child.
    pub fn child_line(&self, process: &str, line: &str) {
        self.put(formatted(self.format, process, line).into_bytes(), MAX_WAITING);
    }

    fn put(&self, line: Vec<u8>, limit: usize) {
        let mut waiting = locked(&self.queue.waiting);
        if waiting.bytes + line.len() > limit {
            waiting.dropped += 1;
            return;
        }
        if waiting.dropped > 0 {
            let note = formatted(self.format, "launcher", &format!("{} lines were dropped here", waiting.dropped));
            waiting.dropped = 0;
            waiting.bytes += note.len();
            waiting.lines.push_back(note.into_bytes());
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line);
        self.queue.changed.notify_all();
    }

    /// Waits until everything is written, or until the time is over.
    pub fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut waiting = locked(&self.queue.waiting);
        while waiting.writing || !waiting.lines.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            waiting = match self.queue.changed.wait_timeout(waiting, left) {
                Ok((waiting, _)) => waiting,
                Err(_) => return,
            };
        }
    }
}

fn next(queue: &Queue) -> Vec<u8> {
    let mut waiting = locked(&queue.waiting);
    loop {
        if let Some(line) = waiting.lines.pop_front() {
            waiting.bytes -= line.len();
            waiting.writing = true;
            return line;
        }
        waiting = queue.changed.wait(waiting).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
}

fn formatted(format: Format, process: &str, line: &str) -> String {
    match format {
        Format::Text => format!("{process} | {line}\n"),
        Format::Json => in_one_schema(process, line),
    }
}

/// A line of any process as a flat object of at least `timestamp`, `level`, `process` and `message`, all strings. What a
/// process writes beside its log (a library's warning, a stack) gets the time at which it came.
fn in_one_schema(process: &str, line: &str) -> String {
    let mut object = match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object,
        _ => Map::new(),
    };
    let level = match object.get("level").and_then(Value::as_str) {
        // Python's names.
        Some("WARNING") => "WARN",
        Some("CRITICAL") => "ERROR",
        Some(level @ ("ERROR" | "WARN" | "DEBUG" | "TRACE")) => level,
        _ => "INFO",
    };
    object.insert("level".into(), level.into());
    object.insert("process".into(), process.into());
    if !object.get("message").is_some_and(Value::is_string) {
        object.insert("message".into(), line.into());
    }
    if !object.get("timestamp").is_some_and(Value::is_string) {
        object.insert("timestamp".into(), now().into());
    }
    format!("{}\n", Value::Object(object))
}

/// The time, in the form of this program's own log.
fn now() -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

/// One line of the launcher's own log, handed on when it is complete.
#[derive(Debug)]
pub struct OwnLine {
    output: Output,
    bytes: Vec<u8>,
}

impl Write for OwnLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for OwnLine {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let line = match self.output.format {
            Format::Text => bytes,
            Format::Json => in_one_schema("launcher", String::from_utf8_lossy(&bytes).trim_end()).into_bytes(),
        };
        self.output.put(line, MAX_WAITING_OWN);
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = OwnLine;

    fn make_writer(&'a self) -> OwnLine {
        OwnLine { output: self.clone(), bytes: Vec::new() }
    }
}

/// Sends the launcher's own log to the output.
///
/// # Errors
///
/// When `filter` is neither a level nor a filter.
pub fn init(output: &Output, filter: &str) -> Result<(), String> {
    text_generation_router::telemetry::tracing::filter(filter).map_err(|error| format!("--log-level: {error}"))?;
    let is_level = filter.parse::<tracing::Level>().is_ok();
    let directive = if is_level { format!("text_generation_launcher={filter}") } else { filter.to_owned() };
    let filter = EnvFilter::try_new(directive).map_err(|error| format!("--log-level {filter:?}: {error}"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(output.clone()).with_ansi(false);
    let subscriber = subscriber.with_target(false);
    match output.format {
        Format::Text => subscriber.init(),
        Format::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let (mut cutter, mut found) = (Lines::default(), Vec::new());
        for chunk in chunks {
            cutter.push(chunk, |line| found.push(line));
        }
        cutter.finish(|line| found.push(line));
        found
    }

    #[test]
    fn lines_are_cut_at_line_feeds_carriage_returns_and_the_end() {
        for (chunks, expected) in [
            (vec![&b"a\nb\n"[..]], vec!["a", "b"]),
            (vec![b"a", b"b\nc"], vec!["ab", "c"]),
            (vec![b"a\r\nb\r", b"\nc"], vec!["a", "b", "c"]),
            (vec![b"10 %\r20 %\r"], vec!["10 %", "20 %"]),
            (vec![b"a\n\nb"], vec!["a", "", "b"]),
            (vec![b"\x1b[2Jx\ty\x1b[1;31mz\x1b[0m\x07\n"], vec!["x\tyz\u{fffd}"]),
        ] {
            assert_eq!(lines(&chunks), expected, "{chunks:?}");
        }
    }

    #[test]
    fn invalid_utf8_becomes_replacement_characters() {
        assert_eq!(lines(&[b"a\xff\xfeb\n"]), ["a\u{fffd}\u{fffd}b"]);
    }

    #[test]
    fn a_line_of_any_length_takes_bounded_memory_and_the_next_is_whole() {
        let mut cutter = Lines::default();
        for _ in 0..10_000 {
            cutter.push(&[b'x'; 1000], |_| panic!("no line ended"));
            assert!(cutter.line.capacity() <= 2 * MAX_LINE);
        }
        let mut found = Vec::new();
        cutter.push(b"\nnext\n", |line| found.push(line));
        assert!(found[0].ends_with(&format!("x … [{} more bytes]", 10_000_000 - MAX_LINE)));
        assert_eq!(found[1], "next");
    }

    #[test]
    fn only_the_last_lines_are_remembered() {
        let memory = Memory::default();
        (0..REMEMBERED + 2).for_each(|number| memory.push(number.to_string()));
        assert_eq!(memory.lines().first().unwrap(), "2");
        assert_eq!(memory.lines().len(), REMEMBERED);
    }

    #[test]
    fn lines_of_children_carry_the_name_of_their_process() {
        assert_eq!(formatted(Format::Text, "rank 0", "hello"), "rank 0 | hello\n");
        assert!(formatted(Format::Json, "rank 0", "hello").contains("\"process\":\"rank 0\""));
    }

    #[test]
    fn in_json_every_line_of_every_process_is_a_flat_object_of_one_schema() {
        for (line, level, message) in [
            (r#"{"timestamp":"t","level":"INFO","message":"hello","rank":0}"#, "INFO", "hello"),
            (r#"{"timestamp":"t","level":"WARNING","message":"hello"}"#, "WARN", "hello"),
            (r#"{"level":"CRITICAL","message":"hello"}"#, "ERROR", "hello"),
            (r#"{"level":7}"#, "INFO", r#"{"level":7}"#),
            ("hello", "INFO", "hello"),
            ("[1]", "INFO", "[1]"),
        ] {
            let object: Value = serde_json::from_str(&formatted(Format::Json, "rank 0", line)).unwrap();
            assert_eq!((&object["process"], &object["level"]), (&"rank 0".into(), &level.into()), "{line}");
            assert_eq!(object["message"], message, "{line}");
            assert!(object["timestamp"].as_str().is_some_and(|time| !time.is_empty()), "{line}");
        }
        let time = now();
        assert!(time.starts_with("20") && time.ends_with('Z') && time.contains('T'), "{time}");
    }

    /// A reader that takes nothing until it is told to.
    #[derive(Clone, Default)]
    struct Slow {
        written: Arc<Mutex<Vec<u8>>>,
        open: Arc<Mutex<()>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _open = locked(&self.open);
            locked(&self.written).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flood_nobody_reads_is_dropped_and_counted_while_the_launchers_own_lines_stay() {
        let slow = Slow::default();
        let closed = locked(&slow.open);
        let output = Output::start(Format::Text, slow.clone()).unwrap();
        let line = "x".repeat(1000);
        for _ in 0..10_000 {
            output.child_line("rank 0", &line);
            assert!(locked(&output.queue.waiting).bytes <= MAX_WAITING);
        }
        writeln!(output.make_writer(), "of our own").unwrap();
        drop(closed);
        output.flush(Duration::from_secs(10));
        let written = String::from_utf8(locked(&slow.written).clone()).unwrap();
        assert!(written.ends_with(" lines were dropped here\nof our own\n"), "{}", &written[written.len() - 200..]);
        assert!(written.len() < MAX_WAITING + 10_000);
    }
}
