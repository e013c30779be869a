//! Several streams of tokens as one, and whole answers out of them.

use std::future::poll_fn;
use std::task::{Context, Poll};

use super::error::ApiError;
use super::ticket::Flight;
use crate::engine::{FinishReason, Finished, GenerateError, Output, PromptToken, Token, TokenStream};

/// The streams of a request's sequences. Dropping it aborts them.
#[derive(Debug)]
pub(super) struct Streams {
    /// Of sequences that have not ended.
    open: Vec<Option<TokenStream>>,
    /// Where the next look begins, so that none is looked at last for ever.
    next: usize,
}

/// What comes next.
#[derive(Debug)]
pub(super) enum Next {
    /// A token of one of the sequences.
    Output(usize, Output),
    /// One has failed.
    Failed(GenerateError),
    /// One ended without a last token.
    Incomplete,
    /// All have ended.
    Over,
}

impl Streams {
    pub fn new(streams: Vec<TokenStream>) -> Self {
        Self { open: streams.into_iter().map(Some).collect(), next: 0 }
    }

    /// Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Next {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Whether all have ended.
    pub fn is_over(&self) -> bool {
        self.open.iter().all(Option::is_none)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        let count = self.open.len();
        for n in (self.next..self.next + count).map(|n| n % count.max(1)) {
            let Some(stream) = &mut self.open[n] else { continue };
            let Poll::Ready(output) = stream.poll_next(cx) else { continue };
            self.next = n + 1;
            return Poll::Ready(match output {
                Some(Ok(output)) => {
                    if output.finished.is_some() {
                        self.open[n] = None;
                    }
                    Next::Output(n, output)
                }
                Some(Err(error)) => Next::Failed(error),
                None => Next::Incomplete,
            });
        }
        if self.is_over() { Poll::Ready(Next::Over) } else { Poll::Pending }
    }
}

/// One whole answer.
#[derive(Debug)]
pub(super) struct Whole {
    pub tokens: Vec<Token>,
    /// Where it was asked for.
    pub prompt: Vec<PromptToken>,
    pub finished: Finished,
}

impl Whole {
    /// The mean of its tokens' log-probabilities: what makes an answer better than another.
    fn score(&self) -> f32 {
        let sum: f32 = self.tokens.iter().map(|token| token.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}

/// Waits for all answers; counted and logged.
pub(super) async fn collect(flight: &mut Flight, mut streams: Streams) -> Result<Vec<Whole>, ApiError> {
    struct Part {
        tokens: Vec<Token>,
        prompt: Vec<PromptToken>,
        finished: Option<Finished>,
    }
    let part = || Part { tokens: vec![], prompt: vec![], finished: None };
    let mut parts: Vec<_> = streams.open.iter().map(|_| part()).collect();
    let error = loop {
        match streams.next().await {
            Next::Output(n, output) => {
                flight.saw(&output);
                let part = &mut parts[n];
                part.tokens.push(output.token);
                part.prompt.extend(output.prompt.into_iter().flatten());
                part.finished = output.finished;
            }
            Next::Over => break None,
            Next::Failed(error) => break Some(ApiError::from(error)),
            Next::Incomplete => break Some(ApiError::incomplete()),
        }
    };
    if let Some(error) = error {
        flight.failed(&error);
        return Err(error);
    }
    let whole = |part: Part| Some(Whole { tokens: part.tokens, prompt: part.prompt, finished: part.finished? });
    let wholes: Vec<_> = parts.into_iter().filter_map(whole).collect();
    let num_tokens = wholes.iter().map(|whole| whole.finished.num_tokens as usize).sum();
    flight.succeeded(num_tokens, wholes.first().map_or(FinishReason::Length, |whole| whole.finished.reason));
    Ok(wholes)
}

/// The candidates of one prompt, the best first. Those that are equally good stay in their order.
pub(super) fn best_first(mut candidates: Vec<Whole>) -> Vec<Whole> {
    candidates.sort_by(|a, b| b.score().total_cmp(&a.score()));
    candidates
}
