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
    /// Stop strings count in what comes after so many tokens.
    min_new_tokens: u32,
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
            stops: StopMatcher::new(&request.stop, request.cuts_stop),
            min_new_tokens: request.sampling.min_new_tokens,
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
        // A piece may be whole characters and the beginning of another, which the next token completes or an end cuts off.
        let is_incomplete = !special && !self.detokenizer.is_complete();
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
                None => assert!(text.is_empty(), "text is left and no token carries it: {text:?}"),
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
        self.held.push(Output { token, finished, started, prompt: None });
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
        if self.num_tokens < self.min_new_tokens {
            return (piece.to_owned(), false);
        }
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

    /// An id that might have stood in another's place.
    pub fn alternative(&self, id: TokenId, logprob: f32) -> TopToken {
        TopToken { id, text: self.tokenizer.decode_one(id), logprob, special: self.tokenizer.is_special(id) }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const END: TokenId = 2;

    fn file() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json")
    }

    fn ids(text: &str) -> Vec<TokenId> {
        let tokenizer = tokenizers::Tokenizer::from_file(file()).unwrap();
        tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    }

    fn state(stop: &[&str]) -> TextState {
        let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
        let request = ValidRequest { prompt_ids: ids("hello"), max_new_tokens: 100, stop, ..ValidRequest::default() };
        TextState::new(Arc::new(Tokenizer::from_file(&file()).unwrap()), &request)
    }

    fn push(state: &mut TextState, id: TokenId, end: Option<FinishReason>) -> Vec<Output> {
        state.push(&Sampled { id, logprob: -1.0, top: vec![(id, -1.0)] }, end, None).outputs
    }

    fn texts(outputs: &[Output]) -> Vec<&str> {
        outputs.iter().map(|output| output.token.text.as_str()).collect()
    }

    #[test]
    fn a_token_whose_character_is_incomplete_comes_with_the_next_one() {
        let (mut state, ids) = (state(&[]), ids(" 🙂"));
        assert!(ids.len() > 2, "the character is several tokens of this vocabulary");
        let (last, first) = ids.split_last().unwrap();
        let mut outputs: Vec<_> = first.iter().flat_map(|id| push(&mut state, *id, None)).collect();
        outputs.extend(push(&mut state, *last, None));
        assert_eq!(outputs.len(), ids.len());
        assert_eq!(texts(&outputs).concat(), " 🙂");
        assert_eq!(outputs.last().unwrap().token.top[0].id, *last);
    }

    #[test]
    fn what_is_left_of_the_text_at_an_end_token_belongs_to_the_token_before() {
        let (mut state, ids) = (state(&[]), ids("🙂"));
        let first = ids[0];
        assert_eq!(push(&mut state, first, None), []);
        let outputs = push(&mut state, END, Some(FinishReason::EosToken));
        assert_eq!(outputs.iter().map(|output| output.token.special).collect::<Vec<_>>(), [false, true]);
        let finished = outputs[1].finished.clone().unwrap();
        assert_eq!((outputs[0].token.text.clone(), finished.num_tokens), (finished.text, 2));
        assert!(outputs[0].token.text.ends_with('\u{FFFD}'));
    }

    #[test]
    fn the_start_of_a_stop_string_is_shown_once_it_is_none() {
        let (mut state, ids) = (state(&["world peace"]), ids(" big world war"));
        let mut outputs = vec![];
        for id in &ids {
            outputs.extend(push(&mut state, *id, None));
        }
        outputs.extend(push(&mut state, END, Some(FinishReason::EosToken)));
        let finished = outputs.last().unwrap().finished.clone().unwrap();
        assert_eq!(finished.text, " big world war");
        assert_eq!(texts(&outputs[..ids.len()]).concat(), " big world war");
    }

    /// GPT-2 and its heirs have tokens like ` \xE2`: a whole character and the beginning of another.
    #[test]
    fn what_is_left_of_a_character_behind_whole_ones_is_not_lost_at_an_end_token() {
        let text = std::fs::read_to_string(file()).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.values().filter_map(serde_json::Value::as_u64).max().unwrap() + 1;
        vocab.insert("\u{120}\u{e2}".into(), id.into());
        let path = std::env::temp_dir().join(format!("text-state-{}.json", std::process::id()));
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_file(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        let mut state = state(&[]);
        state.detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &ids("hello"));
        state.tokenizer = tokenizer;
        let mut outputs = push(&mut state, u32::try_from(id).unwrap(), None);
        outputs.extend(push(&mut state, END, Some(FinishReason::EosToken)));
        let finished = outputs.last().unwrap().finished.clone().unwrap();
        assert_eq!((texts(&outputs)[0], finished.text.as_str()), (" \u{FFFD}", " \u{FFFD}"));
    }
}
