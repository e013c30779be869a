//! The loop's metrics, under TGI's names. Buckets and descriptions are in `telemetry`.

use std::time::Duration;

use metrics::{counter, gauge, histogram};
use scheduler::{Stats, StepPlan};

use crate::shards::Answer;

/// A step is a prefill if it computes some prompt, alone or among decoding rows.
fn method(step: &StepPlan) -> &'static str {
    let computes_prompt =
        step.work.iter().any(|work| work.extent.num_tokens - work.extent.num_drafts > 1 || !work.extent.samples);
    if computes_prompt || !step.admit.is_empty() { "prefill" } else { "decode" }
}

pub(super) fn gauges(stats: &Stats) {
    gauge!("tgi_queue_size").set(stats.num_waiting as f64);
    gauge!("tgi_batch_current_size").set(stats.num_running as f64);
    let used = stats.num_blocks as usize - stats.num_free;
    gauge!("tgi_batch_current_max_tokens").set((used * stats.block_size) as f64);
    gauge!("tgi_kv_blocks", "state" => "used").set(stats.num_pinned as f64);
    gauge!("tgi_kv_blocks", "state" => "cached").set(stats.num_cached as f64);
    gauge!("tgi_kv_blocks", "state" => "free").set(stats.num_free as f64);
}

/// Takes note of how long a part of the first start took.
pub(super) fn start(phase: &'static str, took: Duration) {
    gauge!("tgi_start_seconds", "phase" => phase).set(took.as_secs_f64());
}

/// Shards were lost, and others take their place.
pub(super) fn restarted() {
    counter!("tgi_shard_restarts").increment(1);
}

/// Takes note of a step that is sent; its method.
pub(super) fn planned(step: &StepPlan, stats: &Stats) -> &'static str {
    let method = method(step);
    counter!("tgi_batch_inference_count", "method" => method).increment(1);
    for admission in &step.admit {
        counter!("tgi_prefix_hit_tokens").increment(admission.num_cached as u64);
        counter!("tgi_preemptions").increment(u64::from(admission.incarnation > 1));
    }
    if !step.admit.is_empty() {
        histogram!("tgi_batch_next_size").record(step.admit.len() as f64);
        if step.work.len() > step.admit.len() {
            counter!("tgi_batch_concat", "reason" => "chunking").increment(1);
        }
    }
    gauges(stats);
    method
}

pub(super) fn answered(method: &'static str, answer: &Answer, took: Duration) {
    let seconds = |us: u64| Duration::from_micros(us).as_secs_f64();
    counter!("tgi_batch_inference_success", "method" => method).increment(1);
    histogram!("tgi_batch_inference_duration", "method" => method).record(took.as_secs_f64());
    histogram!("tgi_batch_forward_duration", "method" => method).record(seconds(answer.timings.forward_us));
    histogram!("tgi_batch_decode_duration", "method" => method).record(seconds(answer.timings.sample_us));
    for sampled in answer.rows.iter().filter_map(|row| row.sampled.as_ref().ok()).filter(|sampled| sampled.len() > 1) {
        histogram!("tgi_request_skipped_tokens").record((sampled.len() - 1) as f64);
    }
}

pub(super) fn failed(method: &'static str) {
    counter!("tgi_batch_inference_failure", "method" => method).increment(1);
}
