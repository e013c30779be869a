//! The clients of live sequences: what they asked for, what they were told, and how they keep up.

use std::collections::HashMap;
use std::sync::Arc;

use scheduler::SequenceId;
use tokio::time::Instant;

use super::outbox::{Flow, Outbox};
use super::text_state::TextState;
use super::{FinishReason, GenerateError, PromptToken, Submission};
use crate::request::Sampling;
use crate::shards::{PromptLogprob, Sampled, Terms};
use crate::text::tokenizer::Tokenizer;

/// All sequences whose stream has not ended.
#[derive(Debug)]
pub(super) struct Clients {
    tokenizer: Arc<Tokenizer>,
    live: HashMap<SequenceId, Client>,
    /// Of sequences that have ended, with outputs that the client has yet to read.
    leaving: Vec<Outbox>,
}

#[derive(Debug)]
struct Client {
    text: TextState,
    outbox: Outbox,
    sampling: Arc<Sampling>,
    /// Prompt and `max_new_tokens`.
    num_total: usize,
    /// When it was first planned.
    started: Option<std::time::Instant>,
    /// The prompt and what is known of it so far, where that is wanted and has not been told.
    prompt: Option<Prompt>,
}

#[derive(Debug)]
struct Prompt {
    ids: Vec<u32>,
    /// Of all ids but the first.
    logprobs: Vec<PromptLogprob>,
}

impl Prompt {
    fn tokens(self, text: &TextState) -> Vec<PromptToken> {
        let nothing = PromptLogprob::default();
        let known = std::iter::once((None, &nothing)).chain(self.logprobs.iter().map(|one| (Some(one.logprob), one)));
        let token = |(id, (logprob, one)): (&u32, (Option<f32>, &PromptLogprob))| {
            let top = one.top.iter().map(|(id, logprob)| text.alternative(*id, *logprob)).collect();
            PromptToken { id: *id, text: text.alternative(*id, 0.0).text, logprob, top }
        };
        self.ids.iter().zip(known).map(token).collect()
    }
}

/// Whether the scheduler must be told that a sequence has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum After {
    GoOn,
    /// A stop string was found; the scheduler does not know.
    Stop,
}

impl Clients {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, live: HashMap::new(), leaving: vec![] }
    }

    /// Those that have not been sent everything.
    pub fn num_open(&self) -> usize {
        self.live.len() + self.leaving.len()
    }

    /// Takes in a client; `false` if it is gone already.
    pub fn insert(&mut self, id: SequenceId, submission: Submission) -> bool {
        let Submission { request, outputs, permit, arrived: _ } = submission;
        let Some(outbox) = Outbox::new(outputs, permit) else { return false };
        let client = Client {
            text: TextState::new(Arc::clone(&self.tokenizer), &request),
            outbox,
            num_total: request.prompt_ids.len() + request.max_new_tokens,
            sampling: Arc::new(request.sampling),
            started: None,
            prompt: request.wants_prompt_logprobs.then_some(Prompt { ids: request.prompt_ids, logprobs: vec![] }),
        };
        self.live.insert(id, client);
        true
    }

    /// Notes that a sequence is planned; what it asks for.
    pub fn admit(&mut self, id: SequenceId) -> Terms {
        let client = self.live.get_mut(&id).expect("the scheduler forgets a sequence when its client goes");
        client.started.get_or_insert_with(std::time::Instant::now);
        let missing = |prompt: &Prompt| prompt.logprobs.len() + 1 < prompt.ids.len();
        // What a former incarnation has told is not asked for again.
        let from =
            client.prompt.as_ref().filter(|prompt| missing(prompt)).map(|prompt| prompt.logprobs.len() as u32 + 1);
        Terms { sampling: Arc::clone(&client.sampling), prompt_logprobs_from: from }
    }

    /// Prompt and `max_new_tokens` of a sequence.
    pub fn num_total(&self, id: SequenceId) -> usize {
        self.live.get(&id).map_or(0, |client| client.num_total)
    }

    /// Takes note of what a step says about a prompt.
    pub fn prompt(&mut self, id: SequenceId, logprobs: &[PromptLogprob]) {
        if logprobs.is_empty() {
            return;
        }
        if let Some(prompt) = self.live.get_mut(&id).and_then(|client| client.prompt.as_mut()) {
            let room = (prompt.ids.len() - 1).saturating_sub(prompt.logprobs.len());
            prompt.logprobs.extend(logprobs.iter().take(room).cloned());
        }
    }

    /// Passes a token on. `end`: why the scheduler ended the sequence with it, if it did. Tokens of sequences that are
    /// not known are what was computed after a stop string.
    pub fn push(&mut self, id: SequenceId, sampled: &Sampled, end: Option<FinishReason>, now: Instant) -> After {
        let Some(client) = self.live.get_mut(&id) else { return After::GoOn };
        let mut pushed = client.text.push(sampled, end, client.started);
        if let (Some(first), Some(_)) = (pushed.outputs.first_mut(), &client.prompt) {
            first.prompt = client.prompt.take().map(|prompt| prompt.tokens(&client.text));
        }
        let flow = client.outbox.push(pushed.outputs, pushed.is_end, now);
        if !pushed.is_end {
            return After::GoOn;
        }
        let client = self.live.remove(&id).expect("found above");
        if flow != Flow::Clear {
            self.leaving.push(client.outbox);
        }
        if end.is_none() { After::Stop } else { After::GoOn }
    }

    /// Ends a stream with an error.
    pub fn fail(&mut self, id: SequenceId, error: GenerateError, now: Instant) {
        let Some(mut client) = self.live.remove(&id) else { return };
        client.outbox.push(client.text.take_held(), false, now);
        client.outbox.fail(error, now);
    }

    /// Ends all streams with an error.
    pub fn fail_all(&mut self, error: &GenerateError, now: Instant) {
        let ids: Vec<_> = self.live.keys().copied().collect();
        ids.into_iter().for_each(|id| self.fail(id, error.clone(), now));
        self.leaving.drain(..).for_each(|outbox| outbox.fail(error.clone(), now));
    }

    /// Sends what waits, and forgets the clients that are gone or do not read. The sequences of these.
    pub fn sweep(&mut self, now: Instant) -> Vec<SequenceId> {
        for i in (0..self.leaving.len()).rev() {
            match self.leaving[i].flush(now) {
                Flow::Blocked => {}
                Flow::Clear => drop(self.leaving.swap_remove(i)),
                Flow::Stalled => self.leaving.swap_remove(i).fail(GenerateError::Stalled, now),
            }
        }
        let mut gone: Vec<_> =
            self.live.iter().filter(|(_, client)| client.outbox.is_abandoned()).map(|(id, _)| *id).collect();
        gone.iter().for_each(|id| drop(self.live.remove(id)));
        let is_stalled =
            |(id, client): (&SequenceId, &mut Client)| (client.outbox.flush(now) == Flow::Stalled).then_some(*id);
        let stalled: Vec<_> = self.live.iter_mut().filter_map(is_stalled).collect();
        stalled.iter().for_each(|id| self.fail(*id, GenerateError::Stalled, now));
        gone.extend(stalled);
        gone
    }
}
