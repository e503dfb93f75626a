//! What the server tells about itself.
//!
//! [`events`] are the only place where a log line or a metric is emitted: one typed event gives both. [`metrics`] is
//! the only place where a metric has a name; `gauges` keeps gauges for as long as they hold. [`tracing`] sets up where
//! logs and traces go; [`exporter`] serves the metrics, the probes of an orchestrator and the page of [`status`], which
//! reads the metrics back and has a short memory of what happened. No text of a prompt or an answer is logged anywhere.

pub mod events;
pub mod exporter;
mod gauges;
mod history;
pub mod metrics;
mod reading;
pub mod status;
pub mod tracing;
