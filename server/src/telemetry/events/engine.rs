//! Events of the engine: batches and the queue.

use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tracing::{debug, error};

use crate::telemetry::metrics as names;

/// A batch ran to its end.
pub struct BatchRun<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Sequences in it.
    pub sequences: usize,
    /// Tokens that were computed.
    pub tokens: usize,
    /// Tokens whose state was already there.
    pub cached_tokens: usize,
    /// How long it took.
    pub duration: Duration,
}

impl BatchRun<'_> {
    /// Counts it.
    pub fn emit(self) {
        let Self { sequences, tokens, cached_tokens, duration, .. } = self;
        let (model, version) = (self.model.to_owned(), self.version.to_string());
        debug!(target: "plumb::engine", model, version, sequences, tokens, cached_tokens, seconds = duration.as_secs_f64(), "batch");
        counter!(names::PREFIX_CACHED_TOKENS.name, "model" => model.clone(), "version" => version.clone())
            .increment(cached_tokens as u64);
        histogram!(names::BATCH_SEQUENCES.name, "model" => model.clone()).record(sequences as f64);
        histogram!(names::BATCH_TOKENS.name, "model" => model.clone()).record(tokens as f64);
        histogram!(names::BATCH_DURATION.name, "model" => model.clone()).record(duration);
        counter!(names::BATCHES.name, "model" => model, "version" => version).increment(1);
    }
}

/// The queue has another length.
pub struct QueueChanged {
    /// Sequences that wait.
    pub sequences: usize,
    /// Tokens that wait.
    pub tokens: usize,
}

impl QueueChanged {
    /// Shows it.
    pub fn emit(self) {
        gauge!(names::QUEUE_SEQUENCES.name).set(self.sequences as f64);
        gauge!(names::QUEUE_TOKENS.name).set(self.tokens as f64);
    }
}

/// Cached prefixes were given up for new ones.
pub struct PrefixEvictions {
    /// Pages of keys and values.
    pub pages: u64,
}

impl PrefixEvictions {
    /// Counts them.
    pub fn emit(self) {
        counter!(names::PREFIX_EVICTIONS.name).increment(self.pages);
    }
}

/// The engine thread is gone.
pub struct EngineDied;

impl EngineDied {
    /// Calls for help.
    pub fn emit(self) {
        error!(target: "plumb::engine", "the engine died; the server stops, and has to be started anew");
    }
}
