//! The ranks of an epoch as one: every plan goes to every rank, and what they answer must agree.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Answer, Answers, PLAN_BUFFER, Plan, SelfKill, Shard, ShardError};

/// The group cannot go on: a stream broke, an answer is overdue, or is wrong.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Fault {
    /// Who is to blame, if that is known.
    pub rank: Option<u32>,
    /// In words.
    pub reason: String,
    /// Whether joining again cannot help: the process hangs.
    pub replace: bool,
}

impl Fault {
    /// A fault of one rank.
    pub fn of(rank: u32, reason: impl std::fmt::Display) -> Self {
        Self { rank: Some(rank), reason: format!("rank {rank}: {reason}"), replace: false }
    }
}

/// All ranks of an epoch, each with its own stream.
pub struct Group {
    epoch: u64,
    step_timeout: Duration,
    self_kill: SelfKill,
    lanes: Vec<Lane>,
    /// Sent and not answered by all, oldest first.
    open: VecDeque<Arc<Plan>>,
    /// When the oldest of them became the oldest.
    waiting_since: Instant,
}

struct Lane {
    plans: mpsc::Sender<Arc<Plan>>,
    answers: Answers,
    /// Of this rank, not yet of all.
    arrived: VecDeque<Answer>,
}

impl Lane {
    async fn open(shard: Arc<dyn Shard>, rank: u32) -> Result<Self, Fault> {
        let (plans, receiver) = mpsc::channel(PLAN_BUFFER);
        let answers = shard.run(receiver).await.map_err(|error| Fault::of(rank, error))?;
        Ok(Self { plans, answers, arrived: VecDeque::new() })
    }
}

impl Group {
    /// Opens a stream to every rank. A step that some rank leaves unanswered for `step_timeout` is a fault.
    pub async fn open(
        shards: &[Arc<dyn Shard>],
        epoch: u64,
        step_timeout: Duration,
        self_kill: SelfKill,
    ) -> Result<Self, Fault> {
        let lanes = shards.iter().zip(0..).map(|(shard, rank)| Lane::open(Arc::clone(shard), rank));
        let lanes = futures::future::try_join_all(lanes).await?;
        Ok(Self { epoch, step_timeout, self_kill, lanes, open: VecDeque::new(), waiting_since: Instant::now() })
    }

    /// Sends a plan to every rank.
    pub async fn send(&mut self, plan: Arc<Plan>) -> Result<(), Fault> {
        for (lane, rank) in self.lanes.iter_mut().zip(0..) {
            if rank == 1 {
                self.self_kill.between_ranks().await;
            }
            lane.plans.try_send(Arc::clone(&plan)).map_err(|_| Fault::of(rank, "takes no plans any more"))?;
        }
        if self.open.is_empty() {
            self.waiting_since = Instant::now();
        }
        self.open.push_back(plan);
        Ok(())
    }

    /// The next step that every rank has answered, with the rows of rank 0, and its plan. Waits for ever while nothing
    /// is open and no stream breaks. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<(Arc<Plan>, Answer), Fault> {
        let deadline = match self.open.is_empty() {
            true => None,
            false => Some(self.waiting_since + self.step_timeout),
        };
        let answered = poll_fn(|context| self.poll(context));
        let outcome = match deadline {
            None => Some(answered.await),
            Some(deadline) => tokio::time::timeout_at(deadline, answered).await.ok(),
        };
        self.waiting_since = Instant::now();
        outcome.unwrap_or_else(|| Err(self.overdue()))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(Arc<Plan>, Answer), Fault>> {
        for (lane, rank) in self.lanes.iter_mut().zip(0..) {
            while let Poll::Ready(answer) = lane.answers.poll_next_unpin(context) {
                let fault = match answer {
                    Some(Ok(answer)) => match self.open.get(lane.arrived.len()) {
                        Some(plan) => why_wrong(self.epoch, plan, rank, &answer).map_or(Ok(answer), Err),
                        None => Err(format!("answered step {} that nobody asked for", answer.step)),
                    },
                    Some(Err(ShardError::Failed(reason) | ShardError::OutOfMemory(reason))) => Err(reason),
                    None => Err("the stream of answers ended".into()),
                };
                lane.arrived.push_back(fault.map_err(|reason| Fault::of(rank, reason))?);
            }
        }
        if self.lanes.iter().any(|lane| lane.arrived.is_empty()) {
            return Poll::Pending;
        }
        Poll::Ready(self.merge())
    }

    fn merge(&mut self) -> Result<(Arc<Plan>, Answer), Fault> {
        let mut answers = self.lanes.iter_mut().map(|lane| lane.arrived.pop_front().expect("every rank has answered"));
        let first = answers.next().expect("a group has a rank");
        for (other, rank) in answers.zip(1..) {
            if other.table_digest != first.table_digest {
                let (found, expected) = (other.table_digest, first.table_digest);
                return Err(Fault {
                    rank: None,
                    reason: format!(
                        "the tables of ranks 0 and {rank} differ after step {}: digests {expected:016x} and {found:016x}",
                        first.step
                    ),
                    replace: false,
                });
            }
        }
        let plan = self.open.pop_front().expect("answers are checked against an open plan");
        Ok((plan, first))
    }

    fn overdue(&self) -> Fault {
        let late: Vec<u32> =
            self.lanes.iter().zip(0..).filter_map(|(lane, r)| lane.arrived.is_empty().then_some(r)).collect();
        let step = self.open.front().map_or(0, |plan| plan.step.step);
        let seconds = self.step_timeout.as_secs_f64();
        let ranks = late.iter().map(u32::to_string).collect::<Vec<_>>().join(" and ");
        let reason = format!("step {step} is unanswered by rank {ranks} after {seconds} s");
        // The others may only be waiting in a collective for the one that hangs, so blame falls on one late rank alone.
        let rank = if let [rank] = late[..] { Some(rank) } else { None };
        Fault { rank, reason, replace: true }
    }
}

/// What of an answer does not fit the plan, if anything.
fn why_wrong(epoch: u64, plan: &Plan, rank: u32, answer: &Answer) -> Option<String> {
    let plan = &plan.step;
    let num_rows = if rank == 0 { plan.work.len() } else { 0 };
    if (answer.epoch, answer.step) != (epoch, plan.step) {
        let (found_epoch, found_step, step) = (answer.epoch, answer.step, plan.step);
        return Some(format!(
            "answered step {found_step} of epoch {found_epoch}, expected step {step} of epoch {epoch}"
        ));
    }
    if answer.rows.len() != num_rows {
        return Some(format!("answered {} rows in step {}, expected {num_rows}", answer.rows.len(), plan.step));
    }
    let mut rows = answer.rows.iter().zip(&plan.work);
    let (row, work) = rows.find(|(row, work)| (row.row, row.incarnation) != (work.row, work.incarnation))?;
    Some(format!(
        "answered row {} of incarnation {} in step {}, expected row {} of incarnation {}",
        row.row.0, row.incarnation, plan.step, work.row.0, work.incarnation
    ))
}
