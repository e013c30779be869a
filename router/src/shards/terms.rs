//! How the ids of a sequence are to be chosen, as messages and read from them: both directions side by side, each naming
//! every field, so that one that is new is forgotten in neither.

use super::proto;
use crate::request::Sampling;
use crate::request::form::{Grammar, Kind};

pub(super) fn sampling(sampling: &Sampling) -> proto::Sampling {
    let Sampling {
        do_sample,
        temperature,
        top_k,
        top_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        count_penalty,
        ref logit_bias,
        seed,
        branch,
        top_n,
        min_new_tokens,
        watermark,
        // A message of its own.
        grammar: _,
    } = *sampling;
    proto::Sampling {
        do_sample,
        temperature,
        top_k,
        top_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        count_penalty,
        logit_bias: logit_bias.iter().map(|&(token, bias)| proto::TokenBias { token, bias }).collect(),
        seed,
        branch,
        top_n,
        min_new_tokens,
        watermark,
    }
}

pub(super) fn read_sampling(message: proto::Sampling) -> Sampling {
    let proto::Sampling {
        do_sample,
        temperature,
        top_k,
        top_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        count_penalty,
        logit_bias,
        seed,
        branch,
        top_n,
        min_new_tokens,
        watermark,
    } = message;
    Sampling {
        do_sample,
        temperature,
        top_k,
        top_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        count_penalty,
        logit_bias: logit_bias.into_iter().map(|one| (one.token, one.bias)).collect(),
        seed,
        branch,
        top_n,
        min_new_tokens,
        watermark,
        grammar: None,
    }
}

pub(super) fn grammar(grammar: &Grammar) -> proto::Grammar {
    let kind = match grammar.kind {
        Kind::JsonSchema => proto::grammar::Kind::JsonSchema,
        Kind::Regex => proto::grammar::Kind::Regex,
    };
    proto::Grammar { kind: kind.into(), source: grammar.source.to_string() }
}

/// `None` where the message holds none.
pub(super) fn read_grammar(message: proto::Grammar) -> Option<Grammar> {
    let kind = match message.kind() {
        proto::grammar::Kind::JsonSchema => Kind::JsonSchema,
        proto::grammar::Kind::Regex => Kind::Regex,
        proto::grammar::Kind::None | proto::grammar::Kind::Automaton => return None,
    };
    Some(Grammar { kind, source: message.source.into(), field: "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let grammar = Grammar { kind: Kind::Regex, source: "[ab]+".into(), field: "" };
        let asked = Sampling {
            do_sample: true,
            temperature: 0.5,
            top_k: 1,
            top_p: 0.25,
            typical_p: 0.75,
            repetition_penalty: 1.5,
            frequency_penalty: 0.1,
            presence_penalty: 0.2,
            count_penalty: 0.3,
            logit_bias: vec![(7, -1.0), (9, 2.0)],
            seed: u64::MAX,
            branch: 2,
            top_n: 3,
            min_new_tokens: 4,
            watermark: true,
            grammar: Some(grammar.clone()),
        };
        let read = Sampling { grammar: read_grammar(self::grammar(&grammar)), ..read_sampling(sampling(&asked)) };
        assert_eq!(format!("{read:?}"), format!("{asked:?}"));
    }
}
