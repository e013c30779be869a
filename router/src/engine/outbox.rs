//! The way of one stream's outputs to its client, who may read slowly, or not at all, or be gone.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::{GenerateError, Output};

/// Bytes kept for a client that does not read, beside what its channel holds.
const MAX_BACKLOG_BYTES: usize = 256 << 10;

/// How long a client may read nothing while something waits for it.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

type Item = Result<Output, GenerateError>;

/// Outputs of one stream that were not sent, and the permit of its request.
#[derive(Debug)]
pub(super) struct Outbox {
    sender: mpsc::Sender<Item>,
    /// Room for an error, so that a client who does not read finds it when it does.
    last: mpsc::OwnedPermit<Item>,
    backlog: VecDeque<Output>,
    num_bytes: usize,
    /// Since when nothing could be sent.
    blocked_since: Option<Instant>,
    permit: Option<OwnedSemaphorePermit>,
}

/// How the client keeps up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Flow {
    /// All is sent.
    Clear,
    /// Something waits.
    Blocked,
    /// Too much waits, or for too long.
    Stalled,
}

impl Outbox {
    /// An outbox, unless the client is gone already.
    pub fn new(sender: mpsc::Sender<Item>, permit: OwnedSemaphorePermit) -> Option<Self> {
        let last = sender.clone().try_reserve_owned().ok()?;
        let (backlog, num_bytes, blocked_since, permit) = (VecDeque::new(), 0, None, Some(permit));
        Some(Self { sender, last, backlog, num_bytes, blocked_since, permit })
    }

    /// Whether the client is gone.
    pub fn is_abandoned(&self) -> bool {
        self.sender.is_closed()
    }

    /// Adds outputs and sends what can be sent. If they are the last ones, the permit is returned before the client
    /// sees the end, so that it may ask again at once.
    pub fn push(&mut self, outputs: Vec<Output>, is_end: bool, now: Instant) -> Flow {
        if is_end && self.backlog.is_empty() && self.sender.capacity() >= outputs.len() {
            self.permit = None;
        }
        self.num_bytes += outputs.iter().map(num_bytes).sum::<usize>();
        self.backlog.extend(outputs);
        self.flush(now)
    }

    /// Sends what can be sent.
    pub fn flush(&mut self, now: Instant) -> Flow {
        while let Some(output) = self.backlog.pop_front() {
            self.num_bytes -= num_bytes(&output);
            match self.sender.try_send(Ok(output)) {
                Ok(()) => self.blocked_since = None,
                Err(TrySendError::Closed(_)) => {
                    self.backlog.clear();
                    self.num_bytes = 0;
                }
                Err(TrySendError::Full(Ok(output))) => {
                    self.num_bytes += num_bytes(&output);
                    self.backlog.push_front(output);
                    return self.blocked(now);
                }
                Err(TrySendError::Full(Err(_))) => unreachable!("only outputs wait"),
            }
        }
        Flow::Clear
    }

    fn blocked(&mut self, now: Instant) -> Flow {
        let since = *self.blocked_since.get_or_insert(now);
        let is_stalled = self.num_bytes > MAX_BACKLOG_BYTES || now - since >= WRITE_DEADLINE;
        if is_stalled { Flow::Stalled } else { Flow::Blocked }
    }

    /// Ends the stream with an error. What waits is dropped, save what still finds room.
    pub fn fail(mut self, error: GenerateError, now: Instant) {
        self.flush(now);
        self.permit = None;
        self.last.send(Err(error));
    }
}

fn num_bytes(output: &Output) -> usize {
    let alternatives = output.token.top.iter().map(|top| size_of_val(top) + top.text.len()).sum::<usize>();
    let finished = output.finished.as_ref().map_or(0, |finished| finished.text.len());
    size_of_val(output) + output.token.text.len() + alternatives + finished
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::engine::Token;

    fn output(text: &str) -> Output {
        let token = Token { id: 1, text: text.into(), logprob: 0.0, special: false, top: vec![] };
        Output { token, finished: None, started: None, prompt: None }
    }

    fn outbox(capacity: usize) -> (Outbox, mpsc::Receiver<Item>, Arc<Semaphore>) {
        let permits = Arc::new(Semaphore::new(1));
        let (sender, receiver) = mpsc::channel(capacity);
        let permit = Arc::clone(&permits).try_acquire_owned().unwrap();
        (Outbox::new(sender, permit).unwrap(), receiver, permits)
    }

    #[test]
    fn outputs_wait_in_order_for_a_slow_client() {
        let (mut outbox, mut receiver, _permits) = outbox(2);
        let now = Instant::now();
        let texts = ["a", "b", "c"].map(output).to_vec();
        assert_eq!(outbox.push(texts, false, now), Flow::Blocked);
        assert_eq!(receiver.try_recv().unwrap().unwrap().token.text, "a");
        assert_eq!(outbox.flush(now), Flow::Blocked);
        assert_eq!(receiver.try_recv().unwrap().unwrap().token.text, "b");
        assert_eq!(outbox.flush(now), Flow::Clear);
        assert_eq!(receiver.try_recv().unwrap().unwrap().token.text, "c");
    }

    #[test]
    fn a_client_that_reads_nothing_is_stalled_after_the_deadline_and_told_so() {
        let (mut outbox, mut receiver, permits) = outbox(2);
        let now = Instant::now();
        outbox.push(vec![output("a"), output("b")], false, now);
        assert_eq!(outbox.flush(now + WRITE_DEADLINE - Duration::from_millis(1)), Flow::Blocked);
        assert_eq!(outbox.flush(now + WRITE_DEADLINE), Flow::Stalled);
        outbox.fail(GenerateError::Stalled, now + WRITE_DEADLINE);
        assert_eq!(permits.available_permits(), 1);
        assert_eq!(receiver.try_recv().unwrap().unwrap().token.text, "a");
        assert_eq!(receiver.try_recv().unwrap(), Err(GenerateError::Stalled));
    }

    #[test]
    fn a_client_that_reads_nothing_costs_bounded_memory() {
        let (mut outbox, _receiver, _permits) = outbox(2);
        let long = "x".repeat(10_000);
        let pushed = (0..100).position(|_| outbox.push(vec![output(&long)], false, Instant::now()) == Flow::Stalled);
        assert!(pushed.is_some_and(|pushes| (20..30).contains(&pushes)), "{pushed:?}");
    }

    #[test]
    fn the_permit_is_back_before_the_end_is_seen() {
        let (mut outbox, _receiver, permits) = outbox(4);
        assert_eq!(permits.available_permits(), 0);
        assert_eq!(outbox.push(vec![output("a")], true, Instant::now()), Flow::Clear);
        assert_eq!(permits.available_permits(), 1);
    }
}
