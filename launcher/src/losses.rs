//! How often processes were lost: how long to wait before the next start, and when to give up. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Delays before the first, second … restart within a minute; the last for all further ones.
const BACK_OFF: [Duration; 7] = [
    Duration::ZERO,
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(5),
];
/// Losses before the first completed step: this many within a minute end everything.
const LOSSES: usize = 3;
const LOSSES_WITHIN: Duration = Duration::from_secs(60);
/// The same, however long they take: a start may take longer than a minute.
const LOSSES_EVER: usize = 5;
/// The delay before the restart that follows so many others.
pub fn back_off(restarts: usize) -> Duration {
    BACK_OFF[restarts.min(BACK_OFF.len() - 1)]
}

/// Counts losses towards giving up, and for the back-off.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    /// Before the first completed step.
    counted: VecDeque<Instant>,
    /// All of the last minute.
    recent: VecDeque<Instant>,
}

impl Losses {
    /// Forgets what would count towards giving up: the start was good.
    pub fn forgive(&mut self) {
        self.counted.clear();
    }

    /// Counts a loss and answers the delay before the restart.
    pub fn count(&mut self, now: Instant, towards_giving_up: bool) -> Duration {
        if towards_giving_up {
            self.counted.push_back(now);
        }
        self.recent.retain(|then| now.saturating_duration_since(*then) <= LOSSES_WITHIN);
        let delay = back_off(self.recent.len());
        self.recent.push_back(now);
        delay
    }

    /// Whether to give up, and what to say then.
    pub fn too_many(&self) -> Option<String> {
        let last = self.counted.back()?;
        let within = self.counted.iter().filter(|then| last.saturating_duration_since(**then) <= LOSSES_WITHIN).count();
        if within >= LOSSES {
            Some(format!("{within} times within {} s", LOSSES_WITHIN.as_secs()))
        } else {
            (self.counted.len() >= LOSSES_EVER).then(|| format!("{} times", self.counted.len()))
        }
    }
}
