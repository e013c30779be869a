//! The recorder of metrics, and the histograms' buckets.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tracing::error;

use super::names::{Kind, METHODS, METRICS, Metric};

/// How often samples that nobody has fetched are folded into their histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// Histograms of lengths: their buckets follow the model's limits, which are not known at first. Nothing of
/// the kind happens before.
const LENGTHS: [&str; 3] = ["tgi_request_generated_tokens", "tgi_request_input_length", "tgi_request_max_new_tokens"];

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
            for metric in METRICS.iter().filter(|metric| LENGTHS.contains(&metric.name)) {
                recorder.describe_histogram(metric.name.into(), None, SharedString::const_str(metric.text));
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
        if !LENGTHS.contains(&key.name()) {
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

/// A counter is there from the start, at nought, as far as its series are known: whoever watches sees none where nothing has
/// happened yet, rather than nothing, and the first event is a growth.
fn begin(recorder: &PrometheusRecorder, metric: &Metric) {
    let labels = match metric.label {
        "" => vec![vec![]],
        "method" => METHODS.map(|method| vec![Label::new("method", method)]).into(),
        _ => vec![],
    };
    for labels in labels {
        let key = Key::from_parts(metric.name, labels);
        let _ = recorder.register_counter(&key, &Metadata::new(module_path!(), Level::INFO, None));
    }
}

fn describe(recorder: &PrometheusRecorder) {
    for metric in METRICS.iter().filter(|metric| matches!(metric.kind, Kind::Counter)) {
        begin(recorder, metric);
    }
    for metric in METRICS {
        let text = SharedString::const_str(metric.text);
        match metric.kind {
            Kind::Counter => recorder.describe_counter(metric.name.into(), None, text),
            Kind::Gauge => recorder.describe_gauge(metric.name.into(), None, text),
            Kind::Seconds => recorder.describe_histogram(metric.name.into(), Some(Unit::Seconds), text),
            // The recorder of lengths describes its own.
            Kind::Count if LENGTHS.contains(&metric.name) => {}
            Kind::Count | Kind::Summary => recorder.describe_histogram(metric.name.into(), None, text),
        }
    }
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

    #[test]
    fn a_counter_of_what_has_not_happened_yet_is_nought() {
        let text = Exporter::default().text();
        for metric in METRICS.iter().filter(|metric| matches!(metric.kind, Kind::Counter)) {
            let series = match metric.label {
                "" => vec![format!("{} 0", metric.name)],
                "method" => METHODS.map(|method| format!("{}{{method=\"{method}\"}} 0", metric.name)).into(),
                _ => vec![],
            };
            for line in series {
                assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
            }
        }
    }
}
