//! Events of calls and of their items.

use std::time::Duration;

use metrics::{counter, gauge, histogram};
use plumb_proto::code_name;
use tonic::Code;
use tracing::{debug, warn};

use crate::error::Error;
use crate::telemetry::events::model::in_trouble;
use crate::telemetry::metrics as names;

/// A call came in.
pub struct RequestStarted {
    /// Which rpc.
    pub rpc: &'static str,
}

impl RequestStarted {
    /// Shows it.
    pub fn emit(self) {
        gauge!(names::REQUESTS_IN_FLIGHT.name, "rpc" => self.rpc).increment(1.0);
    }
}

/// A call's answer, stream included, is complete.
pub struct RequestFinished {
    /// Which rpc.
    pub rpc: &'static str,
    /// How it ended.
    pub code: Code,
    /// Since it came in.
    pub duration: Duration,
}

impl RequestFinished {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { rpc, code, duration } = self;
        let code_name = code_name(code);
        match code {
            Code::Internal | Code::Unknown | Code::DataLoss => {
                warn!(target: "plumb::request", rpc, code = code_name, seconds = duration.as_secs_f64(), "call");
            }
            _ => debug!(target: "plumb::request", rpc, code = code_name, seconds = duration.as_secs_f64(), "call"),
        }
        gauge!(names::REQUESTS_IN_FLIGHT.name, "rpc" => rpc).decrement(1.0);
        counter!(names::REQUESTS.name, "rpc" => rpc, "code" => code_name).increment(1);
        histogram!(names::REQUEST_DURATION.name, "rpc" => rpc).record(duration);
    }
}

/// A call was turned away before any work was done on it.
pub struct Rejected<'a> {
    /// Why.
    pub error: &'a Error,
}

impl Rejected<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        debug!(target: "plumb::request", error = self.error.for_logs(), "rejected");
        counter!(names::REJECTIONS.name, "reason" => self.error.reason()).increment(1);
    }
}

/// The amount of admitted work has changed.
pub struct AdmissionChanged {
    /// Tokens that are admitted and not yet done.
    pub tokens: usize,
    /// Those of prompts among them.
    pub prompts: usize,
    /// Tokens of prompts that may wait at a time.
    pub limit: usize,
    /// Clients with work in the gate, or that were told to come back.
    pub clients: usize,
    /// How long what waits takes.
    pub wait: Duration,
}

impl AdmissionChanged {
    /// Shows it.
    pub fn emit(self) {
        gauge!(names::ADMITTED_TOKENS.name).set(self.tokens as f64);
        gauge!(names::ADMITTED_PROMPT_TOKENS.name).set(self.prompts as f64);
        gauge!(names::ADMISSION_LIMIT.name).set(self.limit as f64);
        gauge!(names::ADMISSION_CLIENTS.name).set(self.clients as f64);
        gauge!(names::ADMISSION_WAIT.name).set(self.wait.as_secs_f64());
    }
}

/// A call found no way in and does not wait any longer, for one of the reasons that admission knows.
pub struct AdmissionRefused {
    /// Which: `queue`, `share`, `late`, `hopeless`, `too_large`, `calls`, `client_calls` or `memory`.
    pub reason: &'static str,
}

impl AdmissionRefused {
    /// Counts it.
    pub fn emit(self) {
        counter!(names::ADMISSION_REFUSALS.name, "reason" => self.reason).increment(1);
    }
}

/// A call's items were rendered and tokenized.
pub struct Tokenized<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// For all items.
    pub duration: Duration,
}

impl Tokenized<'_> {
    /// Counts it.
    pub fn emit(self) {
        histogram!(names::TOKENIZE_DURATION.name, "model" => self.model.to_owned()).record(self.duration);
    }
}

/// An item or a prompt was accepted.
pub struct InputAccepted<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its tokens.
    pub tokens: usize,
    /// Whether it was cut.
    pub truncated: bool,
}

impl InputAccepted<'_> {
    /// Counts it.
    pub fn emit(self) {
        histogram!(names::INPUT_TOKENS.name, "model" => self.model.to_owned()).record(self.tokens as f64);
        if self.truncated {
            counter!(names::TRUNCATED.name, "model" => self.model.to_owned()).increment(1);
        }
    }
}

/// An item has no score.
pub struct ItemFailed<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Why.
    pub error: &'a Error,
}

impl ItemFailed<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { model, version, error } = self;
        let code = code_name(error.code());
        debug!(target: "plumb::request", model, version, code, error = error.for_logs(), "item failed");
        if matches!(error, Error::NonFinite { .. }) {
            warn!(target: "plumb::request", model, version, %error, "the model computes no number");
            counter!(names::NON_FINITE.name, "model" => model.to_owned(), "version" => version.to_string())
                .increment(1);
            in_trouble(model, version, "non_finite");
        }
        counter!(names::ITEM_FAILURES.name, "model" => model.to_owned(), "code" => code).increment(1);
    }
}

/// A preference model's reward is answered.
pub struct Rewarded<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// The reward.
    pub reward: f32,
}

impl Rewarded<'_> {
    /// Counts it.
    pub fn emit(self) {
        histogram!(names::REWARD.name, "model" => self.model.to_owned(), "version" => self.version.to_string())
            .record(f64::from(self.reward));
    }
}

/// The engine is done with a call.
pub struct Computed<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// The longest wait of an item.
    pub queued: Duration,
    /// From the first batch that held an item to the end of the last.
    pub inference: Duration,
}

impl Computed<'_> {
    /// Counts it.
    pub fn emit(self) {
        histogram!(names::QUEUE_DURATION.name, "model" => self.model.to_owned()).record(self.queued);
        histogram!(names::INFERENCE_DURATION.name, "model" => self.model.to_owned()).record(self.inference);
    }
}

/// A sample is complete.
pub struct SampleGenerated<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Tokens that were drawn.
    pub tokens: usize,
}

impl SampleGenerated<'_> {
    /// Counts it.
    pub fn emit(self) {
        counter!(names::GENERATED_TOKENS.name, "model" => self.model.to_owned(), "version" => self.version.to_string())
            .increment(self.tokens as u64);
    }
}
