//! Golden messages of the wire contract: the same files are decoded by the shards' tests.
#![allow(missing_docs)]

use prost::Message;
use text_generation_router::shards::proto::{RowError, StepPlan, StepResult, grammar, row_error};

#[test]
fn the_golden_plan_says_what_its_description_says() {
    let bytes = include_bytes!("../../proto/examples/step_plan.bin");
    let plan = StepPlan::decode(&bytes[..]).unwrap();
    assert_eq!((plan.epoch, plan.step, &plan.release[..]), (3, 41, &[5][..]));
    let admit = &plan.admit[0];
    assert_eq!((admit.row, admit.sequence, admit.incarnation, admit.num_prompt), (2, 7, 1, 3));
    assert_eq!(admit.tokens, [1, 706, 271, 300]);
    let sampling = admit.sampling.as_ref().unwrap();
    assert_eq!((sampling.do_sample, sampling.temperature, sampling.seed), (true, 0.75, u64::MAX));
    let biases: Vec<_> = sampling.logit_bias.iter().map(|bias| (bias.token, bias.bias)).collect();
    assert_eq!((sampling.presence_penalty, sampling.count_penalty, &biases[..]), (0.5, 0.25, &[(17, -1.5)][..]));
    assert_eq!((sampling.branch, sampling.top_n, sampling.min_new_tokens, sampling.watermark), (1, 2, 3, true));
    assert_eq!(admit.prompt_logprobs_from, Some(1));
    let grammar = admit.grammar.as_ref().unwrap();
    assert_eq!((grammar.kind(), &*grammar.source), (grammar::Kind::Regex, "[ab]+"));
    let work: Vec<_> = plan.work.iter().map(|w| (w.row, w.max_query, w.max_ids, &w.new_blocks[0].ids[..])).collect();
    assert_eq!(work, [(0, 1, 1, &[][..]), (2, 4, 1, &[9][..])]);
    assert_eq!(plan.encode_to_vec(), bytes, "encoding gives the same bytes");
}

#[test]
fn the_golden_result_says_what_its_description_says() {
    let bytes = include_bytes!("../../proto/examples/step_result.bin");
    let result = StepResult::decode(&bytes[..]).unwrap();
    assert_eq!((result.epoch, result.step, result.table_digest), (3, 41, 0x0123_4567_89ab_cdef));
    assert_eq!((&result.rows[0].ids[..], &result.rows[0].logprobs[..]), (&[17][..], &[-0.5][..]));
    let message = "the model's logits are not finite".to_owned();
    assert_eq!(result.rows[1].error, Some(RowError { kind: row_error::Kind::Numerical as i32, message }));
    let scored = &result.rows[2];
    assert_eq!((&scored.top[0].ids[..], &scored.prompt_logprobs[..]), (&[9, 4][..], &[-1.5, -0.125][..]));
    let tops: Vec<_> = scored.prompt_top.iter().map(|top| &top.ids[..]).collect();
    assert_eq!(tops, [&[8, 9][..], &[7]]);
    assert_eq!(result.encode_to_vec(), bytes, "encoding gives the same bytes");
}
