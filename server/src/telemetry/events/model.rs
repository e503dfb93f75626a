//! Events of a version's life.

use std::path::Path;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use plumb_model::checkpoint::Source;
use plumb_proto::v1;
use tonic::Code;
use tracing::{debug, error, info, warn};

use crate::error::Error;
use crate::telemetry::gauges::KEPT;
use crate::telemetry::history::remember;
use crate::telemetry::metrics as names;

/// A version is in another state.
pub struct ModelStateChanged<'a> {
    /// The version as it is now.
    pub status: &'a v1::ModelStatus,
}

impl ModelStateChanged<'_> {
    /// Logs and shows it.
    pub fn emit(self) {
        let identity = self.status.model.clone().unwrap_or_default();
        let (model, version) = (identity.name, identity.version.to_string());
        let to = state_name(self.status.state());
        info!(target: "plumb::models", model, version, state = to, "model");
        gauge!(names::MODEL_STATE.name, "model" => model.clone(), "version" => version.clone())
            .set(f64::from(self.status.state));
        if self.status.state() == v1::ModelState::Failed {
            in_trouble(&model, identity.version, "failed");
        }
        let in_memory = match self.status.state() {
            v1::ModelState::Available => 1.0,
            v1::ModelState::Ended | v1::ModelState::Failed => 0.0,
            _ => return,
        };
        let Some(details) = &self.status.details else { return };
        let kind = kind_name(details.kind());
        gauge!(names::MODEL_WEIGHT_BYTES.name, "model" => model.clone(), "version" => version.clone())
            .set(in_memory * details.weight_bytes as f64);
        let info = gauge!(
            names::MODEL_INFO.name, "model" => model, "version" => version, "kind" => kind,
            "digest" => identity.weights_digest, "dtype" => details.dtype.clone()
        );
        info.set(in_memory);
    }
}

/// A version that is over is no longer listed.
pub struct VersionForgotten<'a> {
    /// The version as it was last.
    pub status: &'a v1::ModelStatus,
}

impl VersionForgotten<'_> {
    /// Logs it; its metrics leave the exposition a day later.
    pub fn emit(self) {
        let v1::ModelIdentity { name: model, version, .. } = self.status.model.clone().unwrap_or_default();
        debug!(target: "plumb::models", model, version, "no longer listed");
        KEPT.release(&model, &version.to_string());
    }
}

/// A time and not a count is what alerts ask for: a counter that somebody sees for the first time, or again after a
/// while, does not say when it grew.
pub(super) fn in_trouble(model: &str, version: u64, reason: &'static str) {
    let (model, version) = (model.to_owned(), version.to_string());
    gauge!(names::MODEL_TROUBLE.name, "model" => model, "version" => version, "reason" => reason).set(names::now());
}

/// A kind as it is written in logs, metrics and messages.
pub(crate) fn kind_name(kind: v1::ModelKind) -> &'static str {
    match kind {
        v1::ModelKind::Language => "language",
        v1::ModelKind::Preference => "preference",
        v1::ModelKind::Unspecified => "unknown",
    }
}

/// A state as it is written in logs and metrics.
pub(crate) fn state_name(state: v1::ModelState) -> &'static str {
    match state {
        v1::ModelState::Unspecified => "unknown",
        v1::ModelState::Start => "start",
        v1::ModelState::Loading => "loading",
        v1::ModelState::Warming => "warming",
        v1::ModelState::Available => "available",
        v1::ModelState::Draining => "draining",
        v1::ModelState::Ended => "ended",
        v1::ModelState::Failed => "failed",
    }
}

/// A version is to be loaded: the command line, a watched folder or a call asks for it.
pub struct LoadAsked<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Where it comes from.
    pub source: &'a Source,
}

impl LoadAsked<'_> {
    /// Logs it.
    pub fn emit(self) {
        let Self { model, version, source: Source { model: source, adapter, revision } } = self;
        info!(target: "plumb::models", model, version, source, adapter, revision, "load asked for");
    }
}

/// A version is taken out of service: a watched folder or a call asks for it.
pub struct UnloadAsked<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
}

impl UnloadAsked<'_> {
    /// Logs it.
    pub fn emit(self) {
        let Self { model, version } = self;
        info!(target: "plumb::models", model, version, "unload asked for");
    }
}

/// Somebody set a label, or removed it.
pub struct LabelChanged<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// The label.
    pub label: &'a str,
    /// The version that it points at; `None` if it is removed.
    pub version: Option<u64>,
}

impl LabelChanged<'_> {
    /// Logs it.
    pub fn emit(self) {
        let Self { model, label, version } = self;
        match version {
            Some(version) => {
                info!(target: "plumb::models", model, label, version, "label set");
                remember(model, format!("label {label} points at version {version}"), true);
            }
            None => {
                info!(target: "plumb::models", model, label, "label removed");
                remember(model, format!("label {label} removed"), true);
            }
        }
    }
}

/// Somebody split the calls of a model that name neither version nor label, or ended the split.
pub struct TrafficChanged<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Labels and their weights; none if calls are not split any more.
    pub shares: Vec<(&'a str, u32)>,
}

impl TrafficChanged<'_> {
    /// Logs it.
    pub fn emit(self) {
        let Self { model, shares } = self;
        if shares.is_empty() {
            info!(target: "plumb::models", model, "traffic no longer split");
            remember(model, "traffic no longer split".to_owned(), true);
        } else {
            let shares: Vec<_> = shares.iter().map(|(label, weight)| format!("{label}={weight}")).collect();
            let shares = shares.join(",");
            info!(target: "plumb::models", model, shares, "traffic split");
            remember(model, format!("traffic split: {shares}"), true);
        }
    }
}

/// A load came to an end.
pub struct ModelLoaded<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its version.
    pub version: u64,
    /// Since it was asked for.
    pub duration: Duration,
    /// Why it failed; `None` if it is available.
    pub error: Option<&'a Error>,
}

impl ModelLoaded<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { model, version, duration, error } = self;
        let code = error.map_or(Code::Ok, Error::code);
        let seconds = duration.as_secs_f64();
        match error {
            None => {
                info!(target: "plumb::models", model, version, seconds, "loaded");
                remember(model, format!("version {version} loaded in {seconds:.1} s"), true);
            }
            Some(error) => {
                error!(target: "plumb::models", model, version, seconds, %error, "load failed");
                remember(model, format!("version {version} failed after {seconds:.1} s: {error}"), false);
            }
        }
        let code = plumb_proto::code_name(code);
        counter!(names::MODEL_LOADS.name, "model" => model.to_owned(), "code" => code).increment(1);
        histogram!(names::MODEL_LOAD_DURATION.name, "model" => model.to_owned()).record(duration);
    }
}

/// A call that names no version gets another one from now on.
pub struct ActiveVersionChanged<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// The version before, if there was one.
    pub from: Option<u64>,
    /// The version now, if there is one.
    pub to: Option<u64>,
}

impl ActiveVersionChanged<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { model, from, to } = self;
        info!(target: "plumb::models", model, from, to, "active version");
        let what = match (from, to) {
            (Some(from), Some(to)) => format!("swapped from version {from} to {to}"),
            (None, Some(to)) => format!("version {to} is active"),
            (_, None) => "no version is active".to_owned(),
        };
        remember(model, what, to.is_some());
        // 0 is no version: the first is 1.
        gauge!(names::MODEL_ACTIVE_VERSION.name, "model" => model.to_owned()).set(to.unwrap_or(0) as f64);
        if from.is_some() && to.is_some() {
            counter!(names::MODEL_SWAPS.name, "model" => model.to_owned()).increment(1);
        }
    }
}

/// A version was taken out of service because it is bad.
pub struct RolledBack<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// The version.
    pub from: u64,
    /// The one that takes its place.
    pub to: u64,
    /// What is bad about it.
    pub reason: &'a str,
}

impl RolledBack<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let Self { model, from, to, reason } = self;
        error!(target: "plumb::models", model, from, to, reason, "rolled back");
        remember(model, format!("rolled back from version {from} to {to}: {reason}"), false);
        counter!(names::MODEL_ROLLBACKS.name, "model" => model.to_owned()).increment(1);
        in_trouble(model, from, "rolled_back");
    }
}

/// A folder of versions is watched.
pub struct RootWatched<'a> {
    /// The folder.
    pub path: &'a Path,
    /// Why nothing tells of changes in it; `None` if something does.
    pub error: Option<&'a notify::Error>,
}

impl RootWatched<'_> {
    /// Logs it.
    pub fn emit(self) {
        let path = self.path.display();
        match self.error {
            None => info!(target: "plumb::models", %path, "watching for versions"),
            Some(error) => {
                warn!(target: "plumb::models", %path, %error, "polling for versions: nothing tells of changes")
            }
        }
    }
}

/// A folder of versions cannot be read; what is served stays.
pub struct RootUnreadable<'a> {
    /// The folder.
    pub path: &'a Path,
    /// Why.
    pub error: &'a std::io::Error,
}

impl RootUnreadable<'_> {
    /// Calls for help.
    pub fn emit(self) {
        let (path, error) = (self.path.display(), self.error);
        error!(target: "plumb::models", %path, %error, "the folder of versions cannot be read; new ones are not noticed");
    }
}
