//! A debugging aid of the crash tests: the router kills itself at the worst moment of sending a plan.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tracing::warn;

/// Long enough for the bytes of the plan to leave the process.
const FLUSH: Duration = Duration::from_millis(100);

/// Kills the router after a plan was sent to the first rank and before it is sent to the second, as a file asks:
/// `point=between_ranks count=N action=kill` does it at the N-th plan after the file was read. Without a path it does
/// nothing.
#[derive(Debug, Default)]
pub struct SelfKill {
    path: Option<PathBuf>,
    plans_left: Option<u64>,
}

impl SelfKill {
    /// Looks for `path` with every plan.
    pub fn new(path: Option<PathBuf>) -> Self {
        Self { path, plans_left: None }
    }

    /// Called between the first and the second rank.
    pub async fn between_ranks(&mut self) {
        let Some(path) = &self.path else { return };
        if self.plans_left.is_none() {
            let Ok(text) = std::fs::read_to_string(path) else { return };
            // Removed first, or the next router would kill itself as well.
            let removed = std::fs::remove_file(path);
            match (count(&text), removed) {
                (Some(count), Ok(())) => self.plans_left = Some(count),
                (count, removed) => warn!(?path, text, ?count, ?removed, "fault file ignored"),
            }
        }
        let Some(plans_left) = &mut self.plans_left else { return };
        *plans_left = plans_left.saturating_sub(1);
        if *plans_left == 0 {
            tokio::time::sleep(FLUSH).await;
            warn!("killing this process between two ranks, as the fault file asks");
            if let Err(error) = kill(Pid::this(), Signal::SIGKILL) {
                warn!(%error, "could not");
            }
        }
    }
}

fn count(line: &str) -> Option<u64> {
    let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let fits = field("point") == Some("between_ranks") && field("action") == Some("kill");
    field("count")?.parse().ok().filter(|_| fits)
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn a_fault_line_is_read() {
        let check = |line, expected| assert_eq!(count(line), expected, "{line}");
        check("point=between_ranks count=3 action=kill\n", Some(3));
        check("action=kill count=1 point=between_ranks", Some(1));
        check("point=all_reduce count=3 action=kill", None);
        check("point=between_ranks count=x action=kill", None);
        check("", None);
    }
}
