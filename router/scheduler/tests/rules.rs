//! Each rule of the scheduler, alone and by name. `tests/simulation.rs` is the proof; this is the reading.
#![allow(missing_docs)]

use scheduler::{
    Event, FinishReason, Limits, Millis, Namespace, Rejected, Request, RowError, RowResult, Scheduler, SequenceId,
    StepPlan, StepResult, TokenId,
};

const EOS: TokenId = 2;

fn limits() -> Limits {
    Limits {
        max_step_tokens: 16,
        max_running: 4,
        max_open_steps: 1,
        max_drafts: 0,
        block_size: 4,
        num_blocks: 16,
        eos: vec![EOS],
    }
}

fn scheduler(limits: Limits) -> Scheduler {
    let mut scheduler = Scheduler::new();
    assert!(scheduler.shards_ready(1, limits).is_empty());
    scheduler
}

fn request(prompt_len: u32, max_new_tokens: usize) -> Request {
    Request { prompt: (100..100 + prompt_len).collect(), max_new_tokens, ..Request::default() }
}

/// The shards, as far as lengths go: answers every sampling row with `token`.
#[derive(Default)]
struct Shard {
    computed: std::collections::HashMap<SequenceId, usize>,
}

impl Shard {
    fn answer(&mut self, plan: &StepPlan, token: TokenId) -> StepResult {
        self.computed.extend(plan.admit.iter().map(|a| (a.id, a.num_cached)));
        let mut rows = vec![];
        for work in &plan.work {
            let computed = self.computed.get_mut(&work.id).expect("admitted");
            *computed += work.extent.num_tokens;
            let tokens = Ok(vec![token; work.extent.max_new()]);
            rows.push(RowResult { row: work.row, incarnation: work.incarnation, computed: *computed, tokens });
        }
        StepResult { epoch: plan.epoch, step: plan.step, rows }
    }

    /// Runs steps until nothing is left to do; the plans and the events.
    fn run(&mut self, scheduler: &mut Scheduler, token: TokenId) -> (Vec<StepPlan>, Vec<Event>) {
        let (mut plans, mut events) = (vec![], vec![]);
        while let Some(plan) = scheduler.plan() {
            events.extend(scheduler.commit(&self.answer(&plan, token)).expect("an honest answer"));
            scheduler.check();
            plans.push(plan);
        }
        (plans, events)
    }
}

fn reasons(events: &[Event]) -> Vec<(u64, FinishReason)> {
    let reason = |event: &Event| match event {
        Event::Finished { id, reason } => Some((id.0, *reason)),
        Event::Token { .. } => None,
    };
    events.iter().filter_map(reason).collect()
}

#[test]
fn nothing_is_queued_before_there_are_shards() {
    assert_eq!(Scheduler::new().add(request(1, 1)), Err(Rejected::NotReady));
}

#[test]
fn what_can_never_be_computed_is_refused() {
    let mut scheduler = scheduler(limits());
    assert_eq!(scheduler.add(request(0, 1)), Err(Rejected::EmptyPrompt));
    assert_eq!(scheduler.add(request(1, 0)), Err(Rejected::NothingToGenerate));
    assert_eq!(scheduler.add(request(60, 5)), Err(Rejected::TooLong { tokens: 65, limit: 64 }));
    assert!(scheduler.add(request(60, 4)).is_ok());
}

#[test]
fn a_prompt_larger_than_the_budget_is_computed_in_chunks() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(40, 1)).unwrap();
    let (plans, _) = Shard::default().run(&mut scheduler, 7);
    let chunks: Vec<_> = plans.iter().flat_map(|p| &p.work).map(|w| (w.extent.num_tokens, w.extent.samples)).collect();
    assert_eq!(chunks, [(16, false), (16, false), (8, true)]);
}

#[test]
fn a_prompt_fills_what_the_decoding_sequences_leave_of_the_budget() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    scheduler.add(request(3, 9)).unwrap();
    let first = scheduler.plan().unwrap();
    scheduler.commit(&shard.answer(&first, 7)).unwrap();
    scheduler.add(request(40, 2)).unwrap();
    let second = scheduler.plan().unwrap();
    assert_eq!(second.work.iter().map(|w| w.extent.num_tokens).collect::<Vec<_>>(), [1, 15]);
}

#[test]
fn while_many_sequences_go_on_and_few_read_prompts_are_read_in_small_parts() {
    let mut scheduler = scheduler(Limits { max_running: 8, num_blocks: 64, ..limits() });
    let mut shard = Shard::default();
    // Of tenants that share no prefix.
    let mut namespace = 0;
    let mut add = |scheduler: &mut Scheduler, num_prompt| {
        namespace += 1;
        scheduler.add(Request { namespace: Namespace(namespace), ..request(num_prompt, 9) }).unwrap();
    };
    let mut tokens = |scheduler: &mut Scheduler| {
        let plan = scheduler.plan().unwrap();
        scheduler.commit(&shard.answer(&plan, 7)).unwrap();
        plan.work.iter().map(|w| w.extent.num_tokens).collect::<Vec<_>>()
    };
    scheduler.set_prompt_tokens(3);
    add(&mut scheduler, 4);
    assert_eq!(tokens(&mut scheduler), [4], "nobody goes on yet");
    add(&mut scheduler, 7);
    assert_eq!(tokens(&mut scheduler), [1, 6], "as many are to be read as go on: twice as much is read");
    (0..3).for_each(|_| add(&mut scheduler, 4));
    assert_eq!(tokens(&mut scheduler), [1, 1, 4, 4, 4], "more are to be read than go on: all of it");
    scheduler.set_prompt_tokens(5);
    (0..3).for_each(|_| add(&mut scheduler, 8));
    assert_eq!(tokens(&mut scheduler), [1, 1, 1, 1, 1, 6], "five go on, and three are to be read: six fifths");
    assert_eq!(tokens(&mut scheduler), [1, 1, 1, 1, 1, 2, 4], "still three, one in part");
    assert_eq!(tokens(&mut scheduler), [1, 1, 1, 1, 1, 1, 4, 1], "six go on, and two are to be read");
    scheduler.set_prompt_tokens(0);
    assert_eq!(tokens(&mut scheduler), [1; 8], "never nothing");
}

#[test]
fn an_end_token_ends_a_sequence_unless_it_is_ignored() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(3, 5)).unwrap();
    scheduler.add(Request { ignore_eos: true, ..request(3, 5) }).unwrap();
    let (_, events) = Shard::default().run(&mut scheduler, EOS);
    assert_eq!(reasons(&events), [(0, FinishReason::EndOfSequence), (1, FinishReason::Length)]);
    assert_eq!(events.len(), 1 + 5 + 2);
}

#[test]
fn two_steps_may_be_open_and_the_second_knows_no_token_of_the_first() {
    let mut scheduler = scheduler(Limits { max_open_steps: 2, ..limits() });
    scheduler.add(request(3, 3)).unwrap();
    let (first, second) = (scheduler.plan().unwrap(), scheduler.plan().unwrap());
    assert!(scheduler.plan().is_none());
    assert_eq!((first.work[0].extent.num_tokens, second.work[0].extent.num_tokens), (3, 1));
    let mut shard = Shard::default();
    scheduler.commit(&shard.answer(&first, EOS)).unwrap();
    // The row in flight is wasted, and no further one is planned for it.
    let third = scheduler.plan();
    assert!(third.is_none_or(|plan| plan.work.is_empty()));
    assert_eq!(scheduler.commit(&shard.answer(&second, 7)), Ok(vec![]));
}

#[test]
fn a_sequence_takes_blocks_as_it_grows_and_returns_them_at_its_end() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(5, 8)).unwrap();
    let (plans, _) = Shard::default().run(&mut scheduler, 7);
    let taken: Vec<_> = plans.iter().flat_map(|p| &p.work).map(|w| w.new_blocks.len()).collect();
    assert_eq!(taken, [2, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(scheduler.stats().num_pinned, 0);
    assert!(scheduler.is_idle());
}

#[test]
fn the_newest_makes_room_when_blocks_run_out_and_goes_on_later() {
    let mut scheduler = scheduler(Limits { num_blocks: 4, ..limits() });
    scheduler.add(request(6, 8)).unwrap();
    scheduler.add(Request { namespace: Namespace(1), ..request(6, 8) }).unwrap();
    let (plans, events) = Shard::default().run(&mut scheduler, 7);
    let admitted: Vec<_> = plans.iter().flat_map(|p| &p.admit).map(|a| (a.id.0, a.incarnation)).collect();
    assert_eq!(admitted, [(0, 1), (1, 1), (1, 2)]);
    assert_eq!(reasons(&events), [(0, FinishReason::Length), (1, FinishReason::Length)]);
    assert_eq!(events.len(), 2 * 8 + 2, "no token is lost or repeated");
}

#[test]
fn a_common_beginning_is_computed_once_and_its_last_token_always() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    for (namespace, expected) in [(0, 0), (0, 8), (1, 0)] {
        scheduler.add(Request { namespace: Namespace(namespace), ..request(12, 1) }).unwrap();
        let (plans, _) = shard.run(&mut scheduler, 7);
        assert_eq!(plans[0].admit[0].num_cached, expected);
    }
}

#[test]
fn a_prompt_whose_logprobs_are_wanted_is_computed_whole() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    scheduler.add(request(12, 1)).unwrap();
    shard.run(&mut scheduler, 7);
    scheduler.add(Request { wants_prompt_logprobs: true, ..request(12, 1) }).unwrap();
    let (plans, _) = shard.run(&mut scheduler, 7);
    assert_eq!(plans[0].admit[0].num_cached, 0);
}

#[test]
fn a_failed_row_ends_its_sequence_alone_and_nobody_hits_its_blocks() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    scheduler.add(request(12, 4)).unwrap();
    scheduler.add(Request { namespace: Namespace(1), ..request(3, 4) }).unwrap();
    let plan = scheduler.plan().unwrap();
    scheduler.commit(&shard.answer(&plan, 7)).unwrap();
    let plan = scheduler.plan().unwrap();
    let mut result = shard.answer(&plan, 7);
    result.rows[0].tokens = Err(RowError);
    assert_eq!(reasons(&scheduler.commit(&result).unwrap()), [(0, FinishReason::RowError)]);
    let (_, events) = shard.run(&mut scheduler, 7);
    assert_eq!(reasons(&events), [(1, FinishReason::Length)]);
    scheduler.add(request(12, 1)).unwrap();
    assert_eq!(scheduler.plan().unwrap().admit[0].num_cached, 0);
}

#[test]
fn who_waits_for_admission_beyond_its_deadline_ends() {
    let mut scheduler = scheduler(Limits { max_running: 1, ..limits() });
    for deadline in [10, 20, 30] {
        scheduler.add(Request { deadline: Some(Millis(deadline)), ..request(3, 4) }).unwrap();
    }
    scheduler.plan().unwrap();
    assert!(scheduler.expire(Millis(20)).is_empty(), "the last moment is not too late");
    let late = scheduler.expire(Millis(21));
    assert_eq!(reasons(&late), [(1, FinishReason::DeadlineExceeded)], "the first runs, the third has time");
}

#[test]
fn an_aborted_sequence_returns_its_blocks_once_its_open_row_is_committed() {
    let mut scheduler = scheduler(limits());
    let id = scheduler.add(request(5, 8)).unwrap();
    let plan = scheduler.plan().unwrap();
    scheduler.abort(id);
    assert_eq!(scheduler.stats().num_pinned, 2);
    assert_eq!(scheduler.commit(&Shard::default().answer(&plan, 7)), Ok(vec![]));
    assert_eq!(scheduler.stats().num_pinned, 0);
    assert_eq!(scheduler.plan().unwrap().release, [plan.work[0].row]);
}

#[test]
fn lost_shards_are_replayed_with_all_that_was_emitted() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    scheduler.add(request(5, 8)).unwrap();
    for _ in 0..3 {
        let plan = scheduler.plan().unwrap();
        scheduler.commit(&shard.answer(&plan, 7)).unwrap();
    }
    let lost = scheduler.plan().unwrap();
    assert!(scheduler.lose_shards().is_empty());
    assert!(scheduler.plan().is_none(), "there are no shards");
    assert_eq!(scheduler.commit(&shard.answer(&lost, 7)), Ok(vec![]), "an answer that comes too late");
    scheduler.shards_ready(9, limits());
    let replay = scheduler.plan().unwrap();
    assert_eq!((replay.epoch, replay.admit[0].token_ids.len(), replay.admit[0].num_prompt), (9, 8, 5));
    assert!(replay.step > lost.step);
}

#[test]
fn an_answer_that_does_not_fit_is_a_fault_and_changes_nothing() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(5, 8)).unwrap();
    let plan = scheduler.plan().unwrap();
    let good = Shard::default().answer(&plan, 7);
    let edits: [fn(&mut StepResult); 6] = [
        |r| r.step += 1,
        |r| r.epoch += 1,
        |r| drop(r.rows.pop()),
        |r| r.rows[0].incarnation += 1,
        |r| r.rows[0].computed += 1,
        |r| r.rows[0].tokens = Ok(vec![1, 2]),
    ];
    for edit in edits {
        let mut bad = good.clone();
        edit(&mut bad);
        assert!(scheduler.commit(&bad).is_err());
    }
    assert_eq!(scheduler.commit(&good).map(|events| events.len()), Ok(1));
}

#[test]
fn who_dies_with_the_shards_twice_runs_alone_and_fails_at_the_third_time() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(5, 8)).unwrap();
    for epoch in 2..4 {
        scheduler.plan().unwrap();
        assert!(scheduler.lose_shards().is_empty());
        scheduler.shards_ready(epoch, limits());
    }
    scheduler.add(request(5, 8)).unwrap();
    let alone = scheduler.plan().unwrap();
    assert_eq!(alone.work.iter().map(|w| w.id.0).collect::<Vec<_>>(), [0]);
    assert_eq!(reasons(&scheduler.lose_shards()), [(0, FinishReason::KilledShards)]);
}

#[test]
fn who_gets_beyond_what_was_in_flight_is_cleared_and_steps_back_behind_other_suspects() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    scheduler.add(request(5, 8)).unwrap();
    scheduler.add(Request { namespace: Namespace(1), ..request(5, 8) }).unwrap();
    for epoch in 2..4 {
        scheduler.plan().unwrap();
        scheduler.lose_shards();
        scheduler.shards_ready(epoch, limits());
    }
    for suspect in [0, 1] {
        let plan = scheduler.plan().unwrap();
        assert_eq!(plan.work.iter().map(|w| w.id.0).collect::<Vec<_>>(), [suspect]);
        scheduler.commit(&shard.answer(&plan, 7)).unwrap();
    }
    let together = scheduler.plan().unwrap();
    assert_eq!(together.work.len(), 2, "both are innocent");
}

#[test]
fn who_has_to_prove_itself_takes_no_hits_from_the_first_position_in_flight_on() {
    let mut scheduler = scheduler(Limits { max_step_tokens: 9, ..limits() });
    let mut shard = Shard::default();
    for _ in 0..3 {
        scheduler.add(request(24, 4)).unwrap();
    }
    let started: Vec<_> = (0..2).map(|_| scheduler.plan().map(|p| scheduler.commit(&shard.answer(&p, 7)))).collect();
    let third = scheduler.plan().unwrap();
    assert_eq!((started.len(), third.admit[0].id.0), (2, 1), "the second begins beside the end of the first prompt");
    scheduler.lose_shards();
    // With a smaller budget it begins when the first has published all of what they have in common.
    scheduler.shards_ready(2, Limits { max_step_tokens: 8, ..limits() });
    let (plans, _) = shard.run(&mut scheduler, 7);
    let hits: Vec<_> = plans.iter().flat_map(|p| &p.admit).map(|a| (a.id.0, a.num_cached)).collect();
    assert_eq!(hits, [(0, 0), (1, 0), (2, 20)]);
}

#[test]
fn the_lowest_free_row_is_given_out_but_not_by_the_plan_that_releases_it() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    let ids = [0, 1, 2, 3].map(|_| scheduler.add(request(3, 8)).unwrap());
    let mut admit = |scheduler: &mut Scheduler| {
        let plan = scheduler.plan().unwrap();
        scheduler.commit(&shard.answer(&plan, 7)).unwrap();
        let rows: Vec<_> = plan.admit.iter().map(|a| a.row.0).collect();
        (rows, plan.release.iter().map(|row| row.0).collect::<Vec<_>>())
    };
    assert_eq!(admit(&mut scheduler), (vec![0, 1, 2, 3], vec![]));
    scheduler.abort(ids[1]);
    scheduler.add(request(3, 8)).unwrap();
    assert_eq!(admit(&mut scheduler), (vec![4], vec![1]));
    scheduler.abort(ids[3]);
    scheduler.add(request(3, 8)).unwrap();
    assert_eq!(admit(&mut scheduler), (vec![1], vec![3]));
}

#[test]
fn what_prompt_chunks_computed_is_shared_once_a_sample_has_attended_to_it() {
    let mut scheduler = scheduler(limits());
    let mut shard = Shard::default();
    let first = scheduler.add(request(24, 2)).unwrap();
    let chunk = scheduler.plan().unwrap();
    scheduler.commit(&shard.answer(&chunk, 7)).unwrap();
    scheduler.abort(first);
    assert_eq!((scheduler.stats().num_cached, scheduler.stats().num_free), (0, 16), "16 positions, and no sample");
    scheduler.add(request(24, 2)).unwrap();
    shard.run(&mut scheduler, 7);
    assert_eq!(scheduler.stats().num_cached, 6);
}

#[test]
fn blocks_used_least_recently_are_evicted_first_and_later_ones_before_earlier_ones() {
    let mut scheduler = scheduler(Limits { num_blocks: 6, ..limits() });
    let mut shard = Shard::default();
    let mut num_cached = |namespace, prompt_len| {
        scheduler.add(Request { namespace: Namespace(namespace), ..request(prompt_len, 1) }).unwrap();
        shard.run(&mut scheduler, 7).0[0].admit[0].num_cached
    };
    assert_eq!([num_cached(0, 13), num_cached(1, 9)], [0, 0], "three blocks cached, then two");
    assert_eq!(num_cached(2, 5), 0, "takes the empty one and the last of the eldest");
    assert_eq!([num_cached(0, 13), num_cached(1, 9)], [8, 4]);
}

#[test]
fn a_row_with_drafts_has_room_for_all_and_yields_what_was_right() {
    let mut scheduler = scheduler(Limits { max_drafts: 3, ..limits() });
    scheduler.add(request(3, 9)).unwrap();
    let plan = scheduler.plan().unwrap();
    let extent = plan.work[0].extent;
    assert_eq!((extent.num_known(), extent.num_drafts, plan.work[0].new_blocks.len()), (3, 3, 2));
    let mut result = Shard::default().answer(&plan, 7);
    result.rows[0].tokens = Ok(vec![7, 8]);
    result.rows[0].computed = 4; // three known positions and one draft that was right
    assert_eq!(scheduler.commit(&result).unwrap().len(), 2);
    assert_eq!(scheduler.plan().unwrap().work[0].extent.num_known(), 1);
}

#[test]
fn drafts_do_not_reach_beyond_the_longest_answer() {
    let mut scheduler = scheduler(Limits { max_drafts: 3, ..limits() });
    scheduler.add(request(3, 2)).unwrap();
    assert_eq!(scheduler.plan().unwrap().work[0].extent.num_drafts, 1);
}

#[test]
fn a_preempted_sequence_keeps_what_its_open_rows_yield_and_is_admitted_after_the_last_of_them() {
    let mut scheduler = scheduler(Limits { num_blocks: 4, max_open_steps: 2, ..limits() });
    let mut shard = Shard::default();
    for namespace in 0..2 {
        scheduler.add(Request { namespace: Namespace(namespace), ..request(7, 6) }).unwrap();
    }
    let (first, second) = (scheduler.plan().unwrap(), scheduler.plan().unwrap());
    scheduler.commit(&shard.answer(&first, 7)).unwrap();
    assert!(scheduler.plan().is_none(), "the newest made room, and a row in flight still writes there");
    assert_eq!((scheduler.stats().num_waiting, scheduler.stats().num_pinned), (1, 4));
    let events = scheduler.commit(&shard.answer(&second, 7)).unwrap();
    assert_eq!(events.len(), 2, "its row in flight is not lost");
    let (plans, _) = shard.run(&mut scheduler, 7);
    let again = plans.iter().flat_map(|p| &p.admit).next().map(|a| (a.incarnation, a.token_ids.len()));
    assert_eq!(again, Some((2, 9)));
}

#[test]
fn a_deadline_also_comes_while_there_are_no_shards() {
    let mut scheduler = scheduler(limits());
    scheduler.lose_shards();
    scheduler.add(Request { deadline: Some(Millis(5)), ..request(3, 4) }).unwrap();
    assert_eq!(reasons(&scheduler.expire(Millis(6))), [(0, FinishReason::DeadlineExceeded)]);
    assert!(scheduler.is_idle());
}

#[test]
#[should_panic(expected = "epoch 1 does not follow epoch 1")]
fn an_epoch_is_higher_than_all_before() {
    let mut scheduler = scheduler(limits());
    scheduler.lose_shards();
    scheduler.shards_ready(1, limits());
}

#[test]
#[should_panic(expected = "the youngest would starve")]
fn the_token_budget_suffices_for_a_row_of_everyone() {
    scheduler(Limits { max_step_tokens: 15, max_drafts: 3, ..limits() });
}

#[test]
fn a_fault_says_what_was_found_and_what_was_expected() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(5, 8)).unwrap();
    let plan = scheduler.plan().unwrap();
    let mut bad = Shard::default().answer(&plan, 7);
    bad.rows[0].computed = 9;
    let fault = scheduler.commit(&bad).unwrap_err();
    assert_eq!(fault.to_string(), "row 0 of step 1 has 9 positions in the cache, expected 5");
}

#[test]
fn shards_that_come_back_smaller_end_what_no_longer_fits() {
    let mut scheduler = scheduler(limits());
    scheduler.add(request(30, 8)).unwrap();
    scheduler.add(request(5, 8)).unwrap();
    scheduler.lose_shards();
    let ended = scheduler.shards_ready(2, Limits { num_blocks: 8, ..limits() });
    assert_eq!(reasons(&ended), [(0, FinishReason::NoLongerFits)]);
}
