//! What is counted of every request: handles that are looked up once, not by name for each request and token.

use std::sync::OnceLock;

use metrics::{Counter, Histogram, counter, histogram};

/// Handles of a server, of the recorder that there is when it is made.
#[derive(Debug)]
pub struct RequestMetrics {
    /// Requests for tokens, or to tokenize.
    pub count: Counter,
    /// Those that were answered to their end.
    pub success: Counter,
    /// From the arrival to the last token, in seconds as all of these.
    pub duration: Histogram,
    /// Until it was queued.
    pub validation: Histogram,
    /// In the queue.
    pub queue: Histogram,
    /// From the first step to the last token.
    pub inference: Histogram,
    /// The same for each token.
    pub per_token: Histogram,
    /// From the arrival to the first token.
    pub first_token: Histogram,
    /// Between two tokens.
    pub inter_token: Histogram,
    lengths: OnceLock<LengthMetrics>,
}

/// Those whose buckets follow the model's limits: there are none before these are known.
#[derive(Debug)]
pub struct LengthMetrics {
    /// Tokens of a prompt.
    pub input: Histogram,
    /// Tokens that a sequence may generate.
    pub max_new: Histogram,
    /// Tokens that a request has generated.
    pub generated: Histogram,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        Self {
            count: counter!("tgi_request_count"),
            success: counter!("tgi_request_success"),
            duration: histogram!("tgi_request_duration"),
            validation: histogram!("tgi_request_validation_duration"),
            queue: histogram!("tgi_request_queue_duration"),
            inference: histogram!("tgi_request_inference_duration"),
            per_token: histogram!("tgi_request_mean_time_per_token_duration"),
            first_token: histogram!("tgi_request_time_to_first_token_duration"),
            inter_token: histogram!("tgi_request_inter_token_duration"),
            lengths: OnceLock::new(),
        }
    }
}

impl RequestMetrics {
    /// Called by requests that were admitted.
    pub fn lengths(&self) -> &LengthMetrics {
        self.lengths.get_or_init(|| LengthMetrics {
            input: histogram!("tgi_request_input_length"),
            max_new: histogram!("tgi_request_max_new_tokens"),
            generated: histogram!("tgi_request_generated_tokens"),
        })
    }
}
