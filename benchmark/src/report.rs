//! What a load run found, for people (markdown) and for scripts (JSON).

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::histogram::Histogram;
use crate::load::{LoadArgs, Recorder};

/// A distribution of times.
#[derive(Clone, Debug, Serialize)]
pub struct Times {
    count: u64,
    p50_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    mean_ms: f64,
    max_ms: f64,
}

impl Times {
    /// Of a histogram of nanoseconds.
    pub fn of(histogram: &Histogram) -> Self {
        let ms = |nanoseconds: u64| nanoseconds as f64 / 1e6;
        Self {
            count: histogram.count(),
            p50_ms: ms(histogram.percentile(0.5)),
            p90_ms: ms(histogram.percentile(0.9)),
            p99_ms: ms(histogram.percentile(0.99)),
            mean_ms: histogram.mean() / 1e6,
            max_ms: ms(histogram.max()),
        }
    }

    /// A row of a markdown table with the columns p50, p90, p99, mean, max and count.
    pub fn row(&self, name: &str) -> String {
        let Self { count, p50_ms, p90_ms, p99_ms, mean_ms, max_ms } = self;
        format!("| {name} | {p50_ms:.3} | {p90_ms:.3} | {p99_ms:.3} | {mean_ms:.3} | {max_ms:.3} | {count} |")
    }
}

/// The head of the table that [`Times::row`] fills.
pub const TIMES_HEAD: &str = "| ms | p50 | p90 | p99 | mean | max | count |\n|---|---|---|---|---|---|---|";

/// The result of a load run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    api: String,
    streams: u32,
    threads: u32,
    max_new_tokens: u32,
    seconds: f64,
    requests: u64,
    tokens: u64,
    events: u64,
    short_answers: u64,
    failed: u64,
    errors: BTreeMap<String, u64>,
    tokens_per_s: f64,
    requests_per_s: f64,
    events_per_s: f64,
    time_to_first_token: Times,
    between_tokens: Times,
    end_to_end: Times,
}

impl Report {
    /// Of everything that was counted in `seconds`.
    pub fn new(args: &LoadArgs, recorder: &Recorder, seconds: f64) -> Self {
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Self {
            api: args.api.path().into(),
            streams: args.streams,
            threads: args.threads,
            max_new_tokens: args.max_new_tokens,
            seconds,
            requests: recorder.requests,
            tokens: recorder.tokens,
            events: recorder.events,
            short_answers: recorder.short_answers,
            failed: recorder.errors.values().sum(),
            errors: recorder.errors.clone(),
            tokens_per_s: rate(recorder.tokens),
            requests_per_s: rate(recorder.requests),
            events_per_s: rate(recorder.events),
            time_to_first_token: Times::of(&recorder.first_token),
            between_tokens: Times::of(&recorder.between_tokens),
            end_to_end: Times::of(&recorder.end_to_end),
        }
    }

    /// Requests that failed.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Requests that were answered completely.
    pub fn requests(&self) -> u64 {
        self.requests
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { api, streams, threads, seconds, .. } = self;
        writeln!(f, "`{api}`, {streams} streams on {threads} thread(s), {seconds:.2} s\n")?;
        writeln!(f, "{TIMES_HEAD}")?;
        if self.time_to_first_token.count > 0 {
            writeln!(f, "{}", self.time_to_first_token.row("time to first token"))?;
            writeln!(f, "{}", self.between_tokens.row("between tokens"))?;
        }
        writeln!(f, "{}\n", self.end_to_end.row("end to end"))?;
        writeln!(f, "| throughput | total | per second |\n|---|---|---|")?;
        for (name, total, rate) in [
            ("tokens", self.tokens, self.tokens_per_s),
            ("requests", self.requests, self.requests_per_s),
            ("events", self.events, self.events_per_s),
        ] {
            writeln!(f, "| {name} | {total} | {rate:.1} |")?;
        }
        if self.short_answers > 0 {
            writeln!(f, "\n{} answers ended before {} tokens.", self.short_answers, self.max_new_tokens)?;
        }
        if self.failed > 0 {
            writeln!(f, "\n| {} requests failed | count |\n|---|---|", self.failed)?;
            for (kind, count) in &self.errors {
                writeln!(f, "| {} | {count} |", kind.replace('|', "\\|"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_given_in_milliseconds() {
        let mut histogram = Histogram::default();
        for nanoseconds in [1_000_000, 2_000_000, 3_000_000] {
            histogram.record(nanoseconds);
        }
        assert!((Times::of(&histogram).p50_ms - 2.0).abs() < 0.01);
        assert!(Times::of(&histogram).row("x").ends_with("| 2.000 | 3.000 | 3 |"));
    }
}
