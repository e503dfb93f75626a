//! Events of the recording of calls.

use std::fmt::Display;
use std::path::Path;

use metrics::counter;
use tracing::{info, warn};

use crate::telemetry::metrics as names;

/// Calls are recorded from now on.
pub struct RecordingStarted<'a> {
    /// Where to.
    pub folder: &'a Path,
    /// Which share of them.
    pub sample: f64,
}

impl RecordingStarted<'_> {
    /// Logs it: whoever reads the log should know that prompts are kept.
    pub fn emit(self) {
        info!(target: "plumb::record", folder = %self.folder.display(), sample = self.sample, "recording calls, texts included");
    }
}

/// A record was taken by the disk, or will be in a moment.
pub struct RecordWritten;

impl RecordWritten {
    /// Counts it.
    pub fn emit(self) {
        counter!(names::RECORDS.name).increment(1);
    }
}

/// Calls were not recorded that should have been.
pub struct RecordDropped {
    /// `queue_full`, `disk`, `too_long` or `closed`.
    pub reason: &'static str,
    /// How many.
    pub records: u64,
}

impl RecordDropped {
    /// Counts it.
    pub fn emit(self) {
        counter!(names::RECORD_DROPPED.name, "reason" => self.reason).increment(self.records);
    }
}

/// The disk refuses.
pub struct RecordingFailed<'a> {
    /// What it says.
    pub what: &'a dyn Display,
}

impl RecordingFailed<'_> {
    /// Logs it.
    pub fn emit(self) {
        warn!(target: "plumb::record", error = %self.what, "recording of calls fails; the calls do not");
    }
}
