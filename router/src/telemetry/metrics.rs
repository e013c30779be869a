//! The recorder of metrics, and the histograms' buckets.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tracing::error;

/// How often samples that nobody has fetched are folded into their histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// Histograms of lengths: their buckets follow the model's limits, which are not known at first. Nothing of
/// the kind happens before.
const LENGTHS: [(&str, &str); 3] = [
    ("tgi_request_generated_tokens", "tokens that a request has generated"),
    ("tgi_request_input_length", "tokens of a prompt"),
    ("tgi_request_max_new_tokens", "tokens that a request may generate"),
];

/// The process's recorder of metrics: one part from the start, one once the model is known. Cheap to clone.
#[derive(Clone)]
pub struct Exporter(Arc<Parts>);

struct Parts {
    most: PrometheusRecorder,
    lengths: OnceLock<PrometheusRecorder>,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Exporter").field(&self.0.lengths.get().is_some()).finish()
    }
}

impl Default for Exporter {
    /// Nothing is recorded before [`Self::install`].
    fn default() -> Self {
        let most = recorder().expect("the buckets are not empty");
        describe(&most);
        Self(Arc::new(Parts { most, lengths: OnceLock::new() }))
    }
}

impl Exporter {
    /// From now on records what this process counts. A process has one recorder, the first.
    pub fn install(&self) {
        if let Err(error) = metrics::set_global_recorder(self.clone()) {
            error!(%error, "cannot record metrics");
        }
    }

    /// Takes note of the model's limits.
    pub fn know(&self, max_input_tokens: usize, max_total_tokens: usize) {
        self.0.lengths.get_or_init(|| {
            let recorder = length_recorder(max_input_tokens, max_total_tokens).expect("the buckets are not empty");
            for (name, text) in LENGTHS {
                recorder.describe_histogram(name.into(), None, text.into());
            }
            recorder
        });
    }

    fn handles(&self) -> impl Iterator<Item = PrometheusHandle> {
        [Some(&self.0.most), self.0.lengths.get()].into_iter().flatten().map(PrometheusRecorder::handle)
    }

    /// All metrics, in the text format of Prometheus.
    pub fn text(&self) -> String {
        self.handles().map(|handle| handle.render()).collect()
    }

    /// Folds samples away, for ever: without it memory grows until somebody fetches `/metrics`.
    pub async fn upkeep(self) {
        loop {
            tokio::time::sleep(UPKEEP).await;
            self.handles().for_each(|handle| handle.run_upkeep());
        }
    }
}

impl Recorder for Exporter {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.0.most.describe_counter(name, unit, text);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.0.most.describe_gauge(name, unit, text);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.0.most.describe_histogram(name, unit, text);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.0.most.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.0.most.register_gauge(key, metadata)
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        if !LENGTHS.iter().any(|(name, _)| *name == key.name()) {
            return self.0.most.register_histogram(key, metadata);
        }
        self.0.lengths.get().map_or_else(Histogram::noop, |lengths| lengths.register_histogram(key, metadata))
    }
}

/// Seconds, from 150 µs to about 146 s, as in TGI.
fn durations() -> Vec<f64> {
    (0..35).map(|n| 0.00015 * 1.5_f64.powi(n)).collect()
}

/// A hundred steps to the most, as in TGI.
fn lengths(most: usize) -> Vec<f64> {
    (1..=100).map(|n| most as f64 * f64::from(n) / 100.0).collect()
}

fn recorder() -> Result<PrometheusRecorder, BuildError> {
    let sizes: Vec<f64> = (1..=1024).map(f64::from).collect();
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration".into()), &durations())?
        .set_buckets_for_metric(Matcher::Full("tgi_batch_next_size".into()), &sizes)?;
    Ok(builder.build_recorder())
}

fn length_recorder(max_input_tokens: usize, max_total_tokens: usize) -> Result<PrometheusRecorder, BuildError> {
    let builder = PrometheusBuilder::new()
        .set_buckets(&lengths(max_total_tokens))?
        .set_buckets_for_metric(Matcher::Full("tgi_request_input_length".into()), &lengths(max_input_tokens))?;
    Ok(builder.build_recorder())
}

fn describe(recorder: &PrometheusRecorder) {
    let counters = [
        ("tgi_request_count", "requests for tokens"),
        ("tgi_request_success", "requests that were answered to their end"),
        ("tgi_request_failure", "requests that were not, by reason"),
        ("tgi_batch_inference_count", "steps sent to the shards"),
        ("tgi_batch_inference_success", "steps answered by the shards"),
        ("tgi_batch_inference_failure", "steps that the shards did not answer"),
        ("tgi_batch_concat", "steps in which new sequences joined running ones"),
    ];
    for (name, text) in counters {
        recorder.describe_counter(name.into(), None, text.into());
    }
    let gauges = [
        ("tgi_queue_size", "sequences that wait"),
        ("tgi_batch_current_size", "sequences that run"),
        ("tgi_batch_current_max_tokens", "tokens that the used blocks of the KV cache hold"),
    ];
    for (name, text) in gauges {
        recorder.describe_gauge(name.into(), None, text.into());
    }
    let durations = [
        ("tgi_request_duration", "from the arrival of a request to its last token"),
        ("tgi_request_validation_duration", "from the arrival of a request to its place in the queue"),
        ("tgi_request_queue_duration", "in the queue"),
        ("tgi_request_inference_duration", "from the first step to the last token"),
        ("tgi_request_mean_time_per_token_duration", "per token of a request, from its first step on"),
        ("tgi_batch_inference_duration", "from sending a step to its answer"),
        ("tgi_batch_forward_duration", "of a step, in the model"),
        ("tgi_batch_decode_duration", "of a step, choosing ids"),
    ];
    for (name, text) in durations {
        recorder.describe_histogram(name.into(), Some(Unit::Seconds), text.into());
    }
    recorder.describe_histogram("tgi_batch_next_size".into(), None, "sequences admitted by one step".into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_tgi() {
        let durations = durations();
        assert_eq!((durations.len(), durations[0]), (35, 0.00015));
        assert!((145.0..147.0).contains(&durations[34]), "{}", durations[34]);
        assert_eq!((lengths(2048).len(), lengths(2048)[99]), (100, 2048.0));
        assert!(recorder().is_ok() && length_recorder(1, 2).is_ok());
    }
}
