//! What operators see: metrics in Prometheus' format, under TGI's names.

pub mod metrics;
