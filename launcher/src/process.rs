//! Children: started in a process group of their own, held by a lifeline, drained always, explained when they die.
//!
//! One task owns each child and sends it its signals, so that none reaches a process id that is no longer the child's.

use std::future::Future;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{self as unix, Signal as UnixSignal};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::events::Signal;
use crate::logs::{Lines, Memory, Output};
use crate::plan::CommandLine;

/// After a child's death its output is read for this long: a process of its own may hold the pipe open.
const LAST_OUTPUT: Duration = Duration::from_millis(300);
/// Lines shown of a dead child; the log above holds them all.
const SHOWN: usize = 20;
/// How the last line of every program here begins that could not do what it was asked for.
const ERROR: &str = "error: ";
/// The most that is read of an answer on standard output.
const MAX_ANSWER: usize = 1024 * 1024;

/// How a process ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl From<ExitStatus> for Cause {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or(0)),
        }
    }
}

/// The end of a process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Exit {
    /// How it ended.
    pub cause: Cause,
    /// What it wrote last.
    pub last_lines: Vec<String>,
}

impl Exit {
    /// In words, with the likely cause.
    pub fn explain(&self) -> String {
        match self.cause {
            Cause::Code(0) => "ended by itself (exit code 0), which it should not".into(),
            Cause::Code(1) => "failed (exit code 1)".into(),
            Cause::Code(2) => "refused its arguments (exit code 2): are all programs of the same version?".into(),
            Cause::Code(101) => "panicked (exit code 101): a bug, please report it".into(),
            Cause::Code(code) => format!("failed (exit code {code})"),
            Cause::Signal(number) => {
                let name = UnixSignal::try_from(number).map_or("an unknown signal", UnixSignal::as_str);
                format!("was ended by {name}{}", likely_cause(number))
            }
        }
    }

    /// The text, followed by the child's last lines.
    pub fn with_last_lines(&self, text: &str) -> String {
        if self.last_lines.is_empty() {
            return format!("{text}; it wrote nothing");
        }
        let lines = &self.last_lines[self.last_lines.len().saturating_sub(SHOWN)..];
        format!("{text}; its last lines:\n    {}", lines.join("\n    "))
    }

    /// What a program said that refused what it was asked for.
    pub fn refusal(&self) -> Option<String> {
        let first = self.last_lines.iter().rposition(|line| line.starts_with(ERROR))?;
        let said = self.last_lines[first..].join("\n");
        (self.cause == Cause::Code(1)).then(|| said[ERROR.len()..].to_owned())
    }

    /// What a rank said in its last line, without the time and the level.
    pub fn last_words(&self, rank: u32) -> Option<String> {
        let line = self.last_lines.last()?;
        Some(line.split_once(&format!("rank {rank}: ")).map_or(line.as_str(), |(_, said)| said).to_owned())
    }
}

fn likely_cause(signal: i32) -> &'static str {
    match UnixSignal::try_from(signal) {
        Ok(UnixSignal::SIGKILL) => {
            ": by the kernel because memory ran out (see dmesg; a lower --memory-fraction or a smaller model helps), or by hand"
        }
        Ok(UnixSignal::SIGTERM | UnixSignal::SIGINT | UnixSignal::SIGHUP) => ": someone asked it to end",
        Ok(UnixSignal::SIGILL) => ": this processor lacks an instruction that the program was built for",
        Ok(UnixSignal::SIGBUS) => {
            ": memory behind a file went away: the model's files were changed, or their disk failed"
        }
        Ok(UnixSignal::SIGSEGV) => ": a wild memory access, a bug in a library or kernel",
        Ok(UnixSignal::SIGABRT) => ": it gave up by itself",
        Ok(UnixSignal::SIGFPE) => ": an integer division by zero, a bug in a library or kernel",
        _ => "",
    }
}

/// A running child.
#[derive(Debug)]
pub struct Running {
    /// Its process id, which is also its group's.
    pub process_id: u32,
    signals: mpsc::Sender<Signal>,
}

impl Running {
    /// Sends a signal, unless the child is gone.
    pub fn signal(&self, signal: Signal) {
        // Full: so many signals wait already that one more changes nothing.
        let _ = self.signals.try_send(signal);
    }
}

/// Starts a child and passes its output on under `name`. The future is its end, with its last output; it must be run
/// for signals to be delivered.
///
/// # Errors
///
/// When it cannot be started.
pub fn spawn(
    command: &CommandLine,
    name: &str,
    output: &Output,
) -> io::Result<(Running, impl Future<Output = Exit> + use<>)> {
    let (mut child, running, signals) = start(command)?;
    let memory = Memory::default();
    let stdout = child.stdout.take().map(|pipe| tokio::spawn(drain(pipe, name.into(), output.clone(), memory.clone())));
    let stderr = child.stderr.take().map(|pipe| tokio::spawn(drain(pipe, name.into(), output.clone(), memory.clone())));
    let end = async move {
        let cause = attend(child, signals).await;
        for reader in [stdout, stderr].into_iter().flatten() {
            finish(reader).await;
        }
        Exit { cause, last_lines: memory.lines() }
    };
    Ok((running, end))
}

/// Runs a program that answers on standard output; what it writes to standard error is passed on under `name`, or only
/// remembered. Its last word, that of an error, is never passed on: whoever asked says it.
///
/// # Errors
///
/// When it cannot be started.
pub fn ask(
    command: &CommandLine,
    name: &str,
    output: Option<&Output>,
) -> io::Result<(Running, impl Future<Output = (Exit, String)> + use<>)> {
    let (mut child, running, signals) = start(command)?;
    let memory = Memory::default();
    let stdout = child.stdout.take().map(|pipe| tokio::spawn(answer(pipe)));
    let stderr = child.stderr.take().map(|pipe| {
        let memory = memory.clone();
        match output {
            Some(output) => {
                let (name, output) = (name.to_owned(), output.clone());
                tokio::spawn(read_lines(pipe, move |line| {
                    if !line.starts_with(ERROR) {
                        output.child_line(&name, &line);
                    }
                    memory.push(line);
                }))
            }
            None => tokio::spawn(read_lines(pipe, move |line| memory.push(line))),
        }
    });
    let end = async move {
        let cause = attend(child, signals).await;
        let answer = match stdout {
            Some(reader) => finish(reader).await.unwrap_or_default(),
            None => String::new(),
        };
        if let Some(reader) = stderr {
            finish(reader).await;
        }
        (Exit { cause, last_lines: memory.lines() }, answer)
    };
    Ok((running, end))
}

fn start(command: &CommandLine) -> io::Result<(Child, Running, mpsc::Receiver<Signal>)> {
    let mut builder = Command::new(&command.program);
    builder.args(&command.args).envs(command.env.iter().map(|(name, value)| (name, value)));
    command.env_remove.iter().for_each(|name| {
        builder.env_remove(name);
    });
    builder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    builder.kill_on_drop(true);
    let child = builder.spawn()?;
    let process_id = child.id().ok_or_else(|| io::Error::other("the process was gone at once"))?;
    let (sender, signals) = mpsc::channel(16);
    Ok((child, Running { process_id, signals: sender }, signals))
}

/// Waits for the child's end and sends it its signals meanwhile. Its standard input, the lifeline, stays open until then:
/// `wait` would close it, so it is held here.
async fn attend(mut child: Child, mut signals: mpsc::Receiver<Signal>) -> Cause {
    let _lifeline = child.stdin.take();
    let Some(process_id) = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw) else {
        return child.wait().await.map_or(Cause::Signal(0), Cause::from);
    };
    let cause = loop {
        tokio::select! {
            status = child.wait() => break status.map_or(Cause::Signal(0), Cause::from),
            Some(signal) = signals.recv() => {
                // It may have ended just now; it is not reaped before the next turn, so the id is still its own.
                let _ = match signal {
                    Signal::Stacks => unix::kill(process_id, UnixSignal::SIGUSR1),
                    Signal::Term => unix::kill(process_id, UnixSignal::SIGTERM),
                    Signal::Kill => unix::killpg(process_id, UnixSignal::SIGKILL),
                };
            }
        }
    };
    // What it started itself goes with it. The group's number cannot be given to others while a member lives.
    let _ = unix::killpg(process_id, UnixSignal::SIGKILL);
    cause
}

/// Gives a reader a moment to come to its end.
async fn finish<T>(mut reader: JoinHandle<T>) -> Option<T> {
    match tokio::time::timeout(LAST_OUTPUT, &mut reader).await {
        Ok(result) => result.ok(),
        Err(_) => {
            reader.abort();
            None
        }
    }
}

async fn drain(pipe: impl AsyncRead + Unpin, name: String, output: Output, memory: Memory) {
    read_lines(pipe, |line| {
        output.child_line(&name, &line);
        memory.push(line);
    })
    .await;
}

async fn read_lines(mut pipe: impl AsyncRead + Unpin, mut each: impl FnMut(String)) {
    let (mut lines, mut buffer) = (Lines::default(), vec![0; 16 * 1024]);
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        lines.push(&buffer[..count], &mut each);
        // A child that floods must not keep the launcher from everything else.
        tokio::task::yield_now().await;
    }
    lines.finish(each);
}

async fn answer(mut pipe: impl AsyncRead + Unpin) -> String {
    let (mut answer, mut buffer) = (Vec::new(), vec![0; 16 * 1024]);
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let kept = count.min(MAX_ANSWER - answer.len());
        answer.extend_from_slice(&buffer[..kept]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// Finds a program: beside the launcher's own, then along the path.
///
/// # Errors
///
/// Says where it was looked for.
pub fn find(name: &str, beside: Option<&Path>, path: Option<&std::ffi::OsStr>) -> Result<PathBuf, String> {
    let directories = beside.map(Path::to_owned).into_iter().chain(path.into_iter().flat_map(std::env::split_paths));
    directories.map(|directory| directory.join(name)).find(|file| is_executable(file)).ok_or_else(|| {
        let beside = beside.map_or_else(|| "the launcher".into(), |directory| directory.display().to_string());
        format!("{name} was found neither in {beside} nor in PATH; install it there (make install), or add its directory to PATH")
    })
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// What the kernel tells of a process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stat {
    /// One letter: R runs, S sleeps, T is stopped.
    pub state: char,
    /// When it was started, in clock ticks since boot. Tells a process from a later one with the same id.
    pub start: u64,
    /// That it has used, over all threads.
    pub processor_time: Duration,
}

/// What the kernel tells of a process that has not ended.
pub fn stat(process_id: u32) -> Option<Stat> {
    let stat = std::fs::read_to_string(format!("/proc/{process_id}/stat")).ok()?;
    parse_stat(&stat)
}

fn parse_stat(stat: &str) -> Option<Stat> {
    // The second field is the name in parentheses and may hold anything, also parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let state = fields.first()?.chars().next().filter(|state| *state != 'Z')?;
    // The kernel counts for user programs in hundredths of a second on every Linux architecture.
    let processor_time = Duration::from_millis((number(14)? + number(15)?) * 10);
    Some(Stat { state, start: number(22)?, processor_time })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::Format;

    #[test]
    fn a_death_is_explained_in_words() {
        for (cause, parts) in [
            (Cause::Signal(9), ["SIGKILL", "memory ran out", "by hand"]),
            (Cause::Signal(4), ["SIGILL", "processor", "instruction"]),
            (Cause::Signal(7), ["SIGBUS", "model's files", "disk"]),
            (Cause::Signal(11), ["SIGSEGV", "memory", "bug"]),
            (Cause::Signal(15), ["SIGTERM", "asked", "end"]),
            (Cause::Code(1), ["failed", "exit code", "1"]),
            (Cause::Code(2), ["arguments", "exit code 2", "version"]),
        ] {
            let text = Exit { cause, last_lines: Vec::new() }.explain();
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
    }

    #[test]
    fn the_statistics_of_a_process_survive_any_name() {
        let stat_line = "42 (a) b (c)) S 1 42 42 0 -1 4194304 100 0 0 0 150 25 0 0 20 0 3 0 98765 1000 200";
        let expected = Stat { state: 'S', start: 98765, processor_time: Duration::from_millis(1750) };
        assert_eq!(parse_stat(stat_line), Some(expected));
        assert!(stat(std::process::id()).unwrap().start > 0);
    }

    #[test]
    fn a_missing_program_is_reported_with_the_places_searched() {
        let error = find("no-such-program", Some(Path::new("/opt/bin")), Some("/usr/bin".as_ref())).unwrap_err();
        assert!(error.contains("no-such-program") && error.contains("/opt/bin"), "{error}");
        assert!(find("sh", None, std::env::var_os("PATH").as_deref()).is_ok());
    }

    fn shell(script: &str) -> CommandLine {
        CommandLine {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: Vec::new(),
            env_remove: Vec::new(),
        }
    }

    fn silent() -> Output {
        Output::start(Format::Text, io::sink()).unwrap()
    }

    #[test]
    fn what_a_rank_said_last_is_told_without_its_time() {
        let said = |line: &str| Exit { cause: Cause::Code(1), last_lines: vec![line.to_owned()] }.last_words(3);
        assert_eq!(said("2026-11-29T16:18:52.434 ERROR   rank 3: no such tensor").as_deref(), Some("no such tensor"));
        assert_eq!(said("Segmentation fault").as_deref(), Some("Segmentation fault"));
    }

    #[test]
    fn a_refusal_is_the_last_word_of_a_program_that_failed() {
        let exit = |cause, lines: [&str; 2]| Exit { cause, last_lines: lines.map(str::to_owned).to_vec() };
        let refused = exit(Cause::Code(1), ["Fetching: 10%", "error: no room"]);
        assert_eq!(refused.refusal().as_deref(), Some("no room"));
        let refused = exit(Cause::Code(1), ["error: no room", "in two lines"]);
        assert_eq!(refused.refusal().as_deref(), Some("no room\nin two lines"));
        for other in [
            exit(Cause::Code(2), ["usage", "error: no such flag"]),
            exit(Cause::Code(1), ["Traceback", "no room"]),
            exit(Cause::Signal(9), ["", "error: no room"]),
        ] {
            assert_eq!(other.refusal(), None);
        }
    }

    #[tokio::test]
    async fn the_end_of_a_child_comes_with_its_last_lines() {
        let (_running, end) = spawn(&shell("echo out; echo err >&2; exit 3"), "child", &silent()).unwrap();
        let mut exit = end.await;
        exit.last_lines.sort();
        assert_eq!(exit, Exit { cause: Cause::Code(3), last_lines: vec!["err".into(), "out".into()] });
    }

    #[tokio::test]
    async fn a_child_that_floods_both_pipes_is_not_blocked() {
        let flood = "head -c 20000000 /dev/zero; head -c 20000000 /dev/urandom >&2; exit 0";
        let (_running, end) = spawn(&shell(flood), "child", &silent()).unwrap();
        let exit = tokio::time::timeout(Duration::from_secs(60), end).await.unwrap();
        assert_eq!(exit.cause, Cause::Code(0));
    }

    #[tokio::test]
    async fn a_child_and_what_it_started_are_killed_together() {
        let (running, end) = ask(&shell("sleep 1000 & echo $!; wait"), "child", None).unwrap();
        let kill = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            running.signal(Signal::Kill);
        };
        let ((exit, answer), ()) = tokio::join!(end, kill);
        assert_eq!(exit.cause, Cause::Signal(9));
        let grandchild = answer.trim().parse().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(stat(grandchild), None);
    }

    #[tokio::test]
    async fn the_lifeline_is_open_as_long_as_the_child_lives() {
        let (running, end) = spawn(&shell("cat; echo lifeline gone"), "child", &silent()).unwrap();
        let wait = tokio::time::timeout(Duration::from_millis(500), end);
        assert!(wait.await.is_err(), "the child saw the end of its standard input");
        assert!(running.process_id > 0);
    }
}
