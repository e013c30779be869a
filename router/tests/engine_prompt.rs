//! The log-probabilities of prompts: told with the first token, the same however the prompt is computed.

#![allow(clippy::unwrap_used)]

mod engine_common;

use engine_common::*;
use text_generation_router::engine::fake::{self, FakeEngine};
use text_generation_router::engine::{Config, PromptToken};
use text_generation_router::request::ValidRequest;
use text_generation_router::shards::fake::FakeOptions;

fn scored(seed: u64) -> ValidRequest {
    let request = request(seed, 4);
    ValidRequest { wants_prompt_logprobs: true, ..request }
}

/// What is told of the prompt, and the ids of the answer.
async fn prompt(fake: &FakeEngine, request: ValidRequest) -> (Vec<PromptToken>, Vec<u32>) {
    let expected = request.prompt_ids.clone();
    let mut stream = submit(&fake.engine, request).await;
    let first = stream.next().await.unwrap().unwrap();
    let prompt = first.prompt.expect("told with the first token");
    assert_eq!(prompt.iter().map(|token| token.id).collect::<Vec<_>>(), expected);
    assert_eq!(prompt[0].logprob, None);
    assert!(prompt[1..].iter().all(|token| token.logprob.is_some_and(|logprob| logprob <= 0.0)));
    let mut ids = vec![first.token.id];
    while let Some(Ok(output)) = stream.next().await {
        assert!(output.prompt.is_none(), "told once");
        ids.push(output.token.id);
    }
    (prompt, ids)
}

async fn start(step_tokens: Option<usize>) -> FakeEngine {
    let mut config = Config::default();
    config.wishes.max_step_tokens = step_tokens;
    config.wishes.max_running = Some(4);
    let fake = fake::start(FakeOptions::default(), config, tokenizer());
    ready(&fake.engine).await;
    fake
}

#[tokio::test(start_paused = true)]
async fn a_prompt_has_the_same_logprobs_cut_in_chunks_or_cached() {
    let whole = start(None).await;
    let cut = start(Some(5)).await;
    for seed in [0, 7, 39] {
        let expected = prompt(&whole, scored(seed)).await;
        assert_eq!(prompt(&whole, scored(seed)).await, expected, "what is cached is computed again");
        assert_eq!(prompt(&cut, scored(seed)).await, expected, "in chunks");
    }
}

#[tokio::test(start_paused = true)]
async fn a_prompt_whose_shards_died_in_the_middle_is_told_in_full() {
    let expected = prompt(&start(Some(5)).await, scored(39)).await;
    for steps in 1..8 {
        let fake = start(Some(5)).await;
        fake.shards.die_after(0, steps);
        assert_eq!(prompt(&fake, scored(39)).await, expected, "after {steps} steps");
    }
}
