//! The recorder of metrics, and the histograms' buckets.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tracing::error;

/// How often samples that nobody has fetched are folded into their histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// The process's recorder of metrics. As its buckets follow the model's limits, it is installed once these are known, and
/// nothing is recorded before. Cheap to clone.
#[derive(Clone, Default)]
pub struct Exporter(Arc<OnceLock<Option<PrometheusHandle>>>);

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Exporter").field(&self.0.get().is_some()).finish()
    }
}

impl Exporter {
    /// Installs the recorder for the whole process, the first time it is called.
    pub fn install(&self, max_input_tokens: usize, max_total_tokens: usize) {
        self.0.get_or_init(|| {
            let installed = recorder(max_input_tokens, max_total_tokens).map_err(|error| error.to_string());
            let installed = installed.and_then(|recorder| {
                let handle = recorder.handle();
                metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
                Ok(handle)
            });
            describe();
            installed.inspect_err(|error| error!(error, "cannot record metrics")).ok()
        });
    }

    fn handle(&self) -> Option<&PrometheusHandle> {
        self.0.get().and_then(Option::as_ref)
    }

    /// All metrics, in the text format of Prometheus.
    pub fn text(&self) -> String {
        self.handle().map(PrometheusHandle::render).unwrap_or_default()
    }

    /// Folds samples away, for ever: without it memory grows until somebody fetches `/metrics`.
    pub async fn upkeep(self) {
        loop {
            tokio::time::sleep(UPKEEP).await;
            if let Some(handle) = self.handle() {
                handle.run_upkeep();
            }
        }
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

fn recorder(max_input_tokens: usize, max_total_tokens: usize) -> Result<PrometheusRecorder, BuildError> {
    let full = |name: &str| Matcher::Full(name.to_owned());
    let sizes: Vec<f64> = (1..=1024).map(f64::from).collect();
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration".into()), &durations())?
        .set_buckets_for_metric(full("tgi_request_generated_tokens"), &lengths(max_total_tokens))?
        .set_buckets_for_metric(full("tgi_request_input_length"), &lengths(max_input_tokens))?
        .set_buckets_for_metric(full("tgi_request_max_new_tokens"), &lengths(max_total_tokens))?
        .set_buckets_for_metric(full("tgi_batch_next_size"), &sizes)?;
    Ok(builder.build_recorder())
}

fn describe() {
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
        describe_counter!(name, text);
    }
    describe_gauge!("tgi_queue_size", "sequences that wait");
    describe_gauge!("tgi_batch_current_size", "sequences that run");
    describe_gauge!("tgi_batch_current_max_tokens", "tokens that the used blocks of the KV cache hold");
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
        describe_histogram!(name, Unit::Seconds, text);
    }
    describe_histogram!("tgi_request_input_length", "tokens of a prompt");
    describe_histogram!("tgi_request_max_new_tokens", "tokens that a request may generate");
    describe_histogram!("tgi_request_generated_tokens", "tokens that a request has generated");
    describe_histogram!("tgi_batch_next_size", "sequences admitted by one step");
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
        assert!(recorder(1, 2).is_ok());
    }
}
