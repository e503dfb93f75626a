//! Events of the engine: batches and the queue.

use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tracing::{debug, error, warn};

use crate::engine::Loss;
use crate::engine::scheduler::Prefixes;
use crate::telemetry::events::model::in_trouble;
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
    /// What the sequences that began found in the cache.
    pub prefixes: Prefixes,
    /// It was one of those that find out why another has failed.
    pub rerun: bool,
    /// How long it took.
    pub duration: Duration,
}

impl BatchRun<'_> {
    /// Counts it.
    pub fn emit(self) {
        let Self { sequences, tokens, prefixes: Prefixes { lookups, hits, tokens: cached_tokens }, duration, .. } =
            self;
        let (model, version) = (self.model.to_owned(), self.version.to_string());
        debug!(target: "plumb::engine", model, version, sequences, tokens, cached_tokens, seconds = duration.as_secs_f64(), "batch");
        for (counter, n) in
            [(names::PREFIX_LOOKUPS, lookups), (names::PREFIX_HITS, hits), (names::PREFIX_CACHED_TOKENS, cached_tokens)]
        {
            counter!(counter.name, "model" => model.clone(), "version" => version.clone()).increment(n as u64);
        }
        histogram!(names::BATCH_SEQUENCES.name, "model" => model.clone()).record(sequences as f64);
        histogram!(names::BATCH_TOKENS.name, "model" => model.clone()).record(tokens as f64);
        histogram!(names::BATCH_DURATION.name, "model" => model.clone()).record(duration);
        count_rerun(self.rerun, &model, &version);
        counter!(names::BATCHES.name, "model" => model, "version" => version).increment(1);
    }
}

fn count_rerun(rerun: bool, model: &str, version: &str) {
    if rerun {
        counter!(names::BATCH_RERUNS.name, "model" => model.to_owned(), "version" => version.to_owned()).increment(1);
    }
}

/// A batch failed; its sequences begin again.
pub struct BatchFailed<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Sequences in it.
    pub sequences: usize,
    /// It was itself one of those that find out why another has failed.
    pub rerun: bool,
    /// What has failed.
    pub cause: &'a str,
}

impl BatchFailed<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { model, version, sequences, rerun, cause } = self;
        warn!(target: "plumb::engine", model, version, sequences, rerun, cause, "a batch failed");
        in_trouble(model, version, "batch_failed");
        let (model, version) = (model.to_owned(), version.to_string());
        count_rerun(rerun, &model, &version);
        counter!(names::BATCH_FAILURES.name, "model" => model, "version" => version).increment(1);
    }
}

/// The input was found that makes batches fail.
pub struct InputIsolated<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
}

impl InputIsolated<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { model, version } = self;
        warn!(target: "plumb::engine", model, version, "an input that makes batches fail was isolated");
        let (model, version) = (model.to_owned(), version.to_string());
        counter!(names::ISOLATED_INPUTS.name, "model" => model, "version" => version).increment(1);
    }
}

/// A version takes another amount of memory.
pub struct ModelMemory<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Whose memory it is: `cpu` is the process's own, `gpu` that of one or several GPUs.
    pub device: &'static str,
    /// Bytes of its keys and values.
    pub cache: usize,
    /// Bytes of everything that it holds: weights, keys and values, buffers of a step.
    pub resident: usize,
}

impl ModelMemory<'_> {
    /// Shows it.
    pub fn emit(self) {
        let Self { model, version, device, cache, resident } = self;
        for (gauge, bytes) in [(names::MODEL_CACHE_BYTES, cache), (names::MODEL_RESIDENT_BYTES, resident)] {
            let (model, version) = (model.to_owned(), version.to_string());
            gauge!(gauge.name, "model" => model, "version" => version, "device" => device).set(bytes as f64);
        }
    }
}

/// An engine's queue has another length.
pub struct QueueChanged {
    /// Sequences and tokens that waited when it was last told.
    pub before: (usize, usize),
    /// The same now.
    pub now: (usize, usize),
}

impl QueueChanged {
    /// Shows the sum over all engines.
    pub fn emit(self) {
        let Self { before, now } = self;
        gauge!(names::QUEUE_SEQUENCES.name).increment(now.0 as f64 - before.0 as f64);
        gauge!(names::QUEUE_TOKENS.name).increment(now.1 as f64 - before.1 as f64);
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

/// The engine cannot compute any more.
pub struct EngineLost {
    /// Why.
    pub loss: Loss,
}

impl EngineLost {
    /// Calls for help.
    pub fn emit(self) {
        let reason = match self.loss {
            Loss::Died => "died",
            Loss::Broken => "broken",
            Loss::Stuck => "stuck",
        };
        error!(target: "plumb::engine", reason, "the engine is lost; the server stops, and has to be started anew");
        counter!(names::ENGINE_LOSSES.name, "reason" => reason).increment(1);
    }
}
