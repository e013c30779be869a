//! What operators see: metrics in Prometheus' format, under TGI's names, and logs.

pub mod metrics;
pub mod names;
pub mod requests;
pub mod traces;
pub mod tracing;
