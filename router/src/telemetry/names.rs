//! Every metric that this process records. `docs/metrics.md` is written from this table.

/// What a metric is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// A histogram of seconds, with the buckets of TGI.
    Seconds,
    /// A histogram of numbers.
    Count,
    /// Quantiles without buckets, as in TGI.
    Summary,
}

/// One metric.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Metric {
    /// Under which it is exported.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What tells its series apart; empty for one series. The values are few and fixed.
    pub label: &'static str,
    /// What it counts.
    pub text: &'static str,
}

const fn metric(kind: Kind, name: &'static str, label: &'static str, text: &'static str) -> Metric {
    Metric { name, kind, label, text }
}

/// The values of the label `method`, as the engine gives them to a step.
pub const METHODS: [&str; 2] = ["prefill", "decode"];

/// All of them.
pub const METRICS: [Metric; 30] = [
    metric(Kind::Counter, "tgi_request_count", "", "requests for tokens, or to tokenize"),
    metric(Kind::Counter, "tgi_request_success", "", "requests that were answered to their end"),
    metric(
        Kind::Counter,
        "tgi_request_failure",
        "err",
        "requests that were not, by reason; dropped: the client went away",
    ),
    metric(Kind::Seconds, "tgi_request_duration", "", "from the arrival of a request to its last token"),
    metric(
        Kind::Seconds,
        "tgi_request_validation_duration",
        "",
        "from the arrival of a request to its place in the queue",
    ),
    metric(Kind::Seconds, "tgi_request_queue_duration", "", "in the queue"),
    metric(Kind::Seconds, "tgi_request_inference_duration", "", "from the first step to the last token"),
    metric(
        Kind::Seconds,
        "tgi_request_mean_time_per_token_duration",
        "",
        "per token of a request, from its first step on",
    ),
    metric(
        Kind::Seconds,
        "tgi_request_time_to_first_token_duration",
        "",
        "from the arrival of a request to its first token",
    ),
    metric(Kind::Seconds, "tgi_request_inter_token_duration", "", "between two tokens of a request"),
    metric(Kind::Count, "tgi_request_input_length", "", "tokens of a prompt"),
    metric(Kind::Count, "tgi_request_max_new_tokens", "", "tokens that a sequence may generate"),
    metric(Kind::Count, "tgi_request_generated_tokens", "", "tokens that a request has generated"),
    metric(Kind::Summary, "tgi_request_skipped_tokens", "", "further tokens of a step that yielded several"),
    metric(Kind::Gauge, "tgi_queue_size", "", "sequences that wait"),
    metric(Kind::Gauge, "tgi_batch_current_size", "", "sequences that run"),
    metric(Kind::Gauge, "tgi_batch_current_max_tokens", "", "tokens that the used blocks of the KV cache hold"),
    metric(Kind::Count, "tgi_batch_next_size", "", "sequences admitted by one step"),
    metric(Kind::Counter, "tgi_batch_concat", "reason", "steps in which new sequences joined running ones"),
    metric(Kind::Counter, "tgi_batch_inference_count", "method", "steps sent to the shards"),
    metric(Kind::Counter, "tgi_batch_inference_success", "method", "steps answered by the shards"),
    metric(Kind::Counter, "tgi_batch_inference_failure", "method", "steps that the shards did not answer"),
    metric(Kind::Seconds, "tgi_batch_inference_duration", "method", "from sending a step to its answer"),
    metric(Kind::Seconds, "tgi_batch_forward_duration", "method", "of a step, in the model"),
    metric(Kind::Seconds, "tgi_batch_decode_duration", "method", "of a step, choosing ids"),
    metric(Kind::Gauge, "tgi_kv_blocks", "state", "blocks of the KV cache: used by sequences, cached for reuse, free"),
    metric(Kind::Counter, "tgi_prefix_hit_tokens", "", "tokens of prompts that were in the KV cache already"),
    metric(Kind::Counter, "tgi_preemptions", "", "sequences admitted again: blocks had run out, or shards were lost"),
    metric(Kind::Counter, "tgi_shard_restarts", "", "generations of shards after the first"),
    metric(
        Kind::Gauge,
        "tgi_start_seconds",
        "phase",
        "from the router's start until its shards were there, and until they served",
    ),
];

/// The table for people.
pub fn table() -> String {
    let row = |metric: &Metric| {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Seconds => "histogram, seconds",
            Kind::Count => "histogram",
            Kind::Summary => "summary",
        };
        let label = if metric.label.is_empty() { String::new() } else { format!("`{}`", metric.label) };
        format!("| `{}` | {kind} | {label} | {} |\n", metric.name, metric.text)
    };
    let rows: String = METRICS.iter().map(row).collect();
    format!("| name | kind | label | what it tells |\n|---|---|---|---|\n{rows}")
}
