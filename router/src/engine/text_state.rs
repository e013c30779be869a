//! What a sequence's ids read as: text, stop strings, and the tokens that a client sees. Pure.

use std::sync::Arc;
use std::time::Instant;

use scheduler::TokenId;

use super::{FinishReason, Finished, Output, Token, TopToken};
use crate::request::ValidRequest;
use crate::shards::Sampled;
use crate::text::detokenizer::Detokenizer;
use crate::text::stop_strings::StopMatcher;
use crate::text::tokenizer::Tokenizer;

/// The text of one sequence so far: a function of its ids alone.
#[derive(Debug)]
pub(super) struct TextState {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    max_new_tokens: usize,
    num_tokens: u32,
    /// All that was certain so far and is not part of a possible stop string.
    text: String,
    /// Bytes that the stop matcher holds back.
    num_held_bytes: usize,
    /// The last token that is not special, if the text that it began is not certain yet, and special ones after it: if
    /// the sequence ends with a special token, what is left of the text belongs to the former.
    held: Vec<Output>,
}

/// What one token brings to the client.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    pub outputs: Vec<Output>,
    /// Whether the last of them ends the stream.
    pub is_end: bool,
}

impl TextState {
    pub fn new(tokenizer: Arc<Tokenizer>, request: &ValidRequest) -> Self {
        Self {
            detokenizer: Detokenizer::new(Arc::clone(&tokenizer), &request.prompt_ids),
            tokenizer,
            stops: StopMatcher::new(&request.stop),
            max_new_tokens: request.max_new_tokens,
            num_tokens: 0,
            text: String::new(),
            num_held_bytes: 0,
            held: vec![],
        }
    }

    /// Takes the next id, and why the sequence ends with it if it does.
    pub fn push(&mut self, sampled: &Sampled, end: Option<FinishReason>, started: Option<Instant>) -> Pushed {
        self.num_tokens += 1;
        let special = self.tokenizer.is_special(sampled.id);
        let piece = self.detokenizer.push(sampled.id);
        let is_incomplete = !special && piece.is_empty();
        let (mut text, is_stopped) = self.match_stops(&piece);
        let end = if is_stopped { Some(FinishReason::StopSequence) } else { end };
        if end.is_some() && !is_stopped {
            text.push_str(&self.rest());
        }
        // At the last token that was allowed, the length counts, whatever else it ended; as in TGI.
        let is_longest = self.num_tokens as usize == self.max_new_tokens;
        let end = end.map(|end| if is_longest { FinishReason::Length } else { end });
        self.text.push_str(&text);

        let mut outputs = vec![];
        if special {
            let carrier = self.held.iter_mut().rev().find(|output| !output.token.special);
            match carrier {
                Some(carrier) => carrier.token.text.push_str(&text),
                None => debug_assert!(text.is_empty(), "text is left and no token carries it: {text:?}"),
            }
        } else {
            outputs.append(&mut self.held);
        }
        let token = Token {
            id: sampled.id,
            text: if special { self.tokenizer.decode_one(sampled.id) } else { text },
            logprob: sampled.logprob,
            special,
            top: sampled.top.iter().map(|(id, logprob)| self.alternative(*id, *logprob)).collect(),
        };
        let finished =
            end.map(|reason| Finished { reason, text: std::mem::take(&mut self.text), num_tokens: self.num_tokens });
        let is_end = finished.is_some();
        let is_uncertain = !special && (is_incomplete || self.num_held_bytes > 0) || special && !self.held.is_empty();
        self.held.push(Output { token, finished, started });
        if is_end || !is_uncertain {
            outputs.append(&mut self.held);
        }
        Pushed { outputs, is_end }
    }

    /// Tokens not shown yet; for a sequence that ends without a last token.
    pub fn take_held(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.held)
    }

    fn match_stops(&mut self, piece: &str) -> (String, bool) {
        let matched = self.stops.push(piece);
        self.num_held_bytes = (self.num_held_bytes + piece.len()).saturating_sub(matched.text.len());
        (matched.text, matched.is_end)
    }

    /// All that was held back.
    fn rest(&mut self) -> String {
        let piece = self.detokenizer.finish();
        let (mut text, is_stopped) = self.match_stops(&piece);
        if !is_stopped {
            text.push_str(&self.stops.finish());
        }
        text
    }

    fn alternative(&self, id: TokenId, logprob: f32) -> TopToken {
        TopToken { id, text: self.tokenizer.decode_one(id), logprob, special: self.tokenizer.is_special(id) }
    }
}
