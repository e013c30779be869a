//! Which faults of the shards ask for new processes: those that joining again did not cure. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// A fault so long after another is a new one.
const MEMORY: Duration = Duration::from_secs(60);

/// Faults of the current processes.
#[derive(Debug, Default)]
pub(super) struct Faults {
    process_ids: Vec<u32>,
    last: Option<Instant>,
}

impl Faults {
    /// Takes note of a fault of these processes; whether it is the second in a row.
    pub fn is_repeated(&mut self, process_ids: Vec<u32>, now: Instant) -> bool {
        let is_repeated = self.process_ids == process_ids && self.last.is_some_and(|last| now - last < MEMORY);
        (self.process_ids, self.last) = (process_ids, Some(now));
        is_repeated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_repeated_if_the_same_processes_failed_shortly_before() {
        let (mut faults, now) = (Faults::default(), Instant::now());
        assert!(!faults.is_repeated(vec![1, 2], now));
        assert!(faults.is_repeated(vec![1, 2], now));
        assert!(!faults.is_repeated(vec![1, 3], now), "another process");
        assert!(!faults.is_repeated(vec![1, 3], now + MEMORY), "long after");
    }
}
