//! What the server tells about itself.
//!
//! [`events`] are the only place where a log line or a metric is emitted: one typed event gives both. [`metrics`] is
//! the only place where a metric has a name. [`tracing`] sets up where logs and traces go; [`exporter`] serves the
//! metrics and the probes of an orchestrator. No text of a prompt or an answer is logged anywhere.

pub mod events;
pub mod exporter;
pub mod metrics;
pub mod tracing;
