//! Cleans up after a launcher that was killed: a process of its own that outlives it by a few seconds.
//!
//! The launcher tells it over a pipe whom it started. When the pipe closes, the reaper gives the children a moment to see
//! the end of their lifelines, kills the groups of those still alive, removes the run directory, and ends.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;

use crate::process::{Cause, Exit, stat};

/// The argument by which the launcher's program becomes a reaper.
pub const ARGUMENT: &str = "reap";
/// Between two starts of a reaper, so that one that cannot live is not started without end.
const PAUSE: Duration = Duration::from_secs(1);
/// Children end by themselves within this, or are killed.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Killed children are gone within this, or the directory is removed all the same.
const GONE: Duration = Duration::from_secs(2);

/// The launcher's end of the pipe. The reaper itself is watched, and replaced when it ends.
#[derive(Debug)]
pub struct Reaper {
    program: PathBuf,
    directory: PathBuf,
    child: Child,
    pipe: ChildStdin,
    /// Process ids and start times of the launcher's children.
    children: BTreeMap<u32, u64>,
    /// Not before this another one is started.
    next_start: Instant,
}

impl Reaper {
    /// Starts `program` as the reaper of a run directory.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(program: &Path, directory: &Path) -> io::Result<Self> {
        let (child, pipe) = spawn(program, directory)?;
        let (program, directory, next_start) = (program.to_owned(), directory.to_owned(), Instant::now() + PAUSE);
        Ok(Self { program, directory, child, pipe, children: BTreeMap::new(), next_start })
    }

    /// A child was started.
    pub fn add(&mut self, process_id: u32) {
        if let Some(stat) = stat(process_id) {
            self.children.insert(process_id, stat.start);
            self.tell(&format!("+ {process_id} {}", stat.start));
        }
    }

    /// A child is gone.
    pub fn remove(&mut self, process_id: u32) {
        self.children.remove(&process_id);
        self.tell(&format!("- {process_id}"));
    }

    /// Starts another one if it has ended. To be called often.
    pub fn watch(&mut self) {
        let now = Instant::now();
        let Ok(Some(status)) = self.child.try_wait() else { return };
        if now < self.next_start {
            return;
        }
        self.next_start = now + PAUSE;
        let how = Exit { cause: Cause::from(status), last_lines: Vec::new() }.explain();
        match spawn(&self.program, &self.directory) {
            Ok((child, pipe)) => {
                (self.child, self.pipe) = (child, pipe);
                let lines: Vec<String> = self.children.iter().map(|(id, start)| format!("+ {id} {start}")).collect();
                lines.iter().for_each(|line| self.tell(line));
                tracing::warn!("the reaper {how}; another one is started");
            }
            Err(error) => tracing::warn!(
                "the reaper {how}, and another one cannot be started: {error}; if the launcher is killed now, it may \
                 leave things behind"
            ),
        }
    }

    fn tell(&mut self, line: &str) {
        // If it is gone, the next one is told everything.
        let _ = writeln!(self.pipe, "{line}");
    }

    /// Ends the reaper: nothing is left for it to do.
    pub fn end(self) {
        let Self { mut child, pipe, .. } = self;
        drop(pipe);
        // It waits for children that are gone already and removes a directory that is gone already.
        let _ = child.wait();
    }
}

fn spawn(program: &Path, directory: &Path) -> io::Result<(Child, ChildStdin)> {
    let mut command = Command::new(program);
    command.arg(ARGUMENT).arg(directory).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.process_group(0).spawn()?;
    let pipe = child.stdin.take().ok_or_else(|| io::Error::other("the reaper has no standard input"))?;
    Ok((child, pipe))
}

/// What the reaper's process does.
///
/// # Errors
///
/// When it cannot protect itself from the signals that end its launcher.
pub fn reap(directory: &Path) -> io::Result<()> {
    // Nothing but SIGKILL ends it before its work is done.
    SigSet::all().thread_block()?;
    let mut children = BTreeMap::new();
    for line in io::stdin().lock().lines() {
        follow(&mut children, &line?);
    }
    wait_until_gone(&mut children, PATIENCE);
    for process_id in children.keys() {
        if let Ok(group) = i32::try_from(*process_id) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
    wait_until_gone(&mut children, GONE);
    // The launcher removes it itself when it ends in order.
    let _ = std::fs::remove_dir_all(directory);
    Ok(())
}

/// Takes a line `+ <process id> <start time>` or `- <process id>`.
fn follow(children: &mut BTreeMap<u32, u64>, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["+", process_id, start] => {
            if let (Ok(process_id), Ok(start)) = (process_id.parse(), start.parse()) {
                children.insert(process_id, start);
            }
        }
        ["-", process_id] => {
            if let Ok(process_id) = process_id.parse::<u32>() {
                children.remove(&process_id);
            }
        }
        _ => {}
    }
}

/// Forgets those that are gone, or whose id is another process's by now.
fn wait_until_gone(children: &mut BTreeMap<u32, u64>, limit: Duration) {
    let end = Instant::now() + limit;
    loop {
        children.retain(|process_id, start| stat(*process_id).is_some_and(|found| found.start == *start));
        if children.is_empty() || Instant::now() >= end {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_id_was_given_to_another_is_not_ours() {
        let mut children = BTreeMap::new();
        let own = std::process::id();
        let start = stat(own).unwrap().start;
        for line in [format!("+ {own} {}", start + 1), "+ 4294967295 1".into(), "nonsense".into(), "+ 1".into()] {
            follow(&mut children, &line);
        }
        wait_until_gone(&mut children, Duration::ZERO);
        assert_eq!(children, BTreeMap::new());
        follow(&mut children, &format!("+ {own} {start}"));
        wait_until_gone(&mut children, Duration::ZERO);
        assert_eq!(children.len(), 1);
        follow(&mut children, &format!("- {own}"));
        assert_eq!(children, BTreeMap::new());
    }
}
