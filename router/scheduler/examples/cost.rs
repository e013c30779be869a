//! What planning and committing cost per step, as a table: `cargo run --release -p scheduler --example cost`.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use scheduler::{Limits, Request, RowResult, Scheduler, SequenceId, StepResult, TokenId};

/// Sequences, context, open steps, drafts.
const CASES: [(u64, u32, usize, usize); 6] =
    [(32, 2000, 1, 0), (64, 2000, 2, 0), (256, 2000, 1, 0), (256, 2000, 2, 0), (512, 4000, 2, 0), (512, 4000, 2, 3)];

/// The cost of plan and commit of each step, sorted.
fn measure((num_sequences, context, max_open_steps, max_drafts): (u64, u32, usize, usize)) -> Vec<Duration> {
    let mut scheduler = Scheduler::new();
    scheduler.shards_ready(
        1,
        Limits {
            max_step_tokens: 8192,
            max_running: 512,
            max_open_steps,
            max_drafts,
            block_size: 16,
            num_blocks: num_sequences as u32 * (context + 600) / 16,
            eos: vec![],
        },
    );
    for i in 0..num_sequences {
        let prompt = (0..context).map(|t| (t * 7 + i as u32 * 31) % 32000).collect::<Vec<TokenId>>();
        let request = Request { prompt, max_new_tokens: 500, ..Request::default() };
        scheduler.add(request).expect("it fits");
    }
    let (mut costs, mut sent, mut lengths) = (vec![], VecDeque::new(), HashMap::<SequenceId, usize>::new());
    loop {
        let start = Instant::now();
        while let Some(plan) = scheduler.plan() {
            sent.push_back(plan);
        }
        let planned = start.elapsed();
        let Some(plan) = sent.pop_front() else { break };
        let mut rows = vec![];
        for work in &plan.work {
            let computed = lengths.entry(work.id).or_default();
            *computed += work.extent.num_tokens;
            let tokens = Ok(vec![5; work.extent.max_new()]);
            rows.push(RowResult { row: work.row, incarnation: work.incarnation, computed: *computed, tokens });
        }
        let result = StepResult { epoch: plan.epoch, step: plan.step, rows };
        let start = Instant::now();
        scheduler.commit(&result).expect("it answers the plan");
        // Prompts are another matter: their blocks are given out and published once.
        if plan.work.iter().all(|work| work.extent.samples) && plan.admit.is_empty() {
            costs.push(planned + start.elapsed());
        }
    }
    costs.sort();
    costs
}

fn main() {
    println!("| running | context | open steps | drafts | steps | median µs | p99 µs |");
    println!("|---|---|---|---|---|---|---|");
    for case in CASES {
        let costs = measure(case);
        let micros = |at: usize| costs[at].as_nanos() as f64 / 1000.0;
        let (median, p99) = (micros(costs.len() / 2), micros(costs.len() * 99 / 100));
        let (num_sequences, context, open, drafts) = case;
        println!("| {num_sequences} | {context} | {open} | {drafts} | {} | {median:.1} | {p99:.1} |", costs.len());
    }
}
