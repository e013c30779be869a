//! The recorder of metrics, and the histograms' buckets.

use std::time::Duration;

use metrics::describe_counter;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// How often samples that nobody has fetched are folded into their histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// The text of `/metrics`.
#[derive(Clone)]
pub struct Rendered(PrometheusHandle);

impl std::fmt::Debug for Rendered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rendered")
    }
}

impl Rendered {
    /// All metrics, in the text format of Prometheus.
    pub fn text(&self) -> String {
        self.0.render()
    }

    /// Folds samples away, for ever: without it memory grows until somebody fetches `/metrics`.
    pub async fn upkeep(self) {
        loop {
            tokio::time::sleep(UPKEEP).await;
            self.0.run_upkeep();
        }
    }
}

/// Seconds, from 150 µs to about 146 s, as in TGI.
fn durations() -> Vec<f64> {
    (0..35).map(|n| 0.00015 * 1.5_f64.powi(n)).collect()
}

/// Counts of tokens and sequences, up to a million.
fn counts() -> Vec<f64> {
    (0..21).map(|n| f64::from(1 << n)).collect()
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let full = |name: &str| Matcher::Full(name.to_owned());
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration".into()), &durations())?
        .set_buckets_for_metric(full("tgi_request_generated_tokens"), &counts())?
        .set_buckets_for_metric(full("tgi_request_input_length"), &counts())?
        .set_buckets_for_metric(full("tgi_request_max_new_tokens"), &counts())?
        .set_buckets_for_metric(full("tgi_request_skipped_tokens"), &counts())?
        .set_buckets_for_metric(full("tgi_batch_next_size"), &counts())
}

/// Installs the recorder for the whole process.
pub fn install() -> Result<Rendered, BuildError> {
    let handle = builder()?.install_recorder()?;
    describe();
    Ok(Rendered(handle))
}

/// A recorder's text without installing it, for tests of the routes.
pub fn detached() -> Result<Rendered, BuildError> {
    Ok(Rendered(builder()?.build_recorder().handle()))
}

fn describe() {
    describe_counter!("tgi_request_count", "Requests for tokens");
    describe_counter!("tgi_request_success", "Requests that were answered to their end");
    describe_counter!("tgi_request_failure", "Requests that were not, by reason");
}
