//! How the router answers faults of the shards: join again at first, then ask for new processes. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// Long enough for the launcher to report a death that is behind the fault.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// A fault so long after another is a new one.
const MEMORY: Duration = Duration::from_secs(60);

/// Faults of the current processes.
#[derive(Debug, Default)]
pub(super) struct Faults {
    process_ids: Vec<u32>,
    last: Option<Instant>,
}

/// What to do about a fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Reaction {
    /// Join the same processes again, if the launcher says nothing else meanwhile.
    Retry { after: Duration },
    /// Wait for the launcher to replace processes.
    Replace,
}

impl Faults {
    /// Takes note of a fault of these processes.
    pub fn on_fault(&mut self, process_ids: Vec<u32>, needs_replacement: bool, now: Instant) -> Reaction {
        let is_repeated = self.process_ids == process_ids && self.last.is_some_and(|last| now - last < MEMORY);
        (self.process_ids, self.last) = (process_ids, Some(now));
        if needs_replacement || is_repeated { Reaction::Replace } else { Reaction::Retry { after: RETRY_AFTER } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_is_retried_and_the_second_asks_for_new_processes() {
        let (mut faults, now) = (Faults::default(), Instant::now());
        let retry = Reaction::Retry { after: RETRY_AFTER };
        assert_eq!(faults.on_fault(vec![1, 2], false, now), retry);
        assert_eq!(faults.on_fault(vec![1, 2], false, now), Reaction::Replace);
        assert_eq!(faults.on_fault(vec![1, 3], false, now), retry, "another process");
        assert_eq!(faults.on_fault(vec![1, 3], false, now + MEMORY), retry, "long after");
        assert_eq!(faults.on_fault(vec![9], true, now), Reaction::Replace);
    }
}
