//! Events of the process: start, readiness, stop.

use std::net::SocketAddr;
use std::time::Duration;

use metrics::gauge;
use plumb_model::decoder::Device;
use plumb_proto::v1;
use tracing::{debug, error, info, warn};

use crate::config::Origin;
use crate::error::Error;
use crate::telemetry::metrics as names;

/// The configuration was read.
pub struct ConfigLoaded<'a> {
    /// Every option; secrets are masked.
    pub origins: &'a [Origin],
}

impl ConfigLoaded<'_> {
    /// Logs what somebody chose; defaults are for `debug`.
    pub fn emit(self) {
        info!(target: "plumb", version = env!("CARGO_PKG_VERSION"), "plumb-server");
        for Origin { option, value, origin } in self.origins {
            match *origin {
                "default" => debug!(target: "plumb::config", option, value, origin, "option"),
                _ => info!(target: "plumb::config", option, value, origin, "option"),
            }
        }
    }
}

/// The device is there.
pub struct Computing<'a> {
    /// Where models compute.
    pub device: &'a Device,
    /// Why not on a GPU, where one would have been taken.
    pub reason: Option<String>,
}

impl Computing<'_> {
    /// Logs its name.
    pub fn emit(self) {
        info!(target: "plumb", device = self.device.name(), reason = self.reason, "computing");
    }
}

/// The ports are bound.
pub struct Listening {
    /// Where rpcs are taken.
    pub grpc: SocketAddr,
    /// Where models are changed, if not there.
    pub admin: Option<SocketAddr>,
    /// Where HTTP is answered, if it is.
    pub http: Option<SocketAddr>,
    /// Where metrics and probes are taken.
    pub metrics: SocketAddr,
}

impl Listening {
    /// Logs the addresses.
    pub fn emit(self) {
        let admin = self.admin.map(tracing::field::display);
        let http = self.http.map(tracing::field::display);
        info!(target: "plumb", grpc = %self.grpc, admin, http, metrics = %self.metrics, "listening");
    }
}

/// All models of the command line are available.
pub struct Serving<'a> {
    /// What is served.
    pub models: &'a [v1::ModelStatus],
}

impl Serving<'_> {
    /// Logs a line for every model.
    pub fn emit(self) {
        for status in self.models {
            let (identity, details) =
                (status.model.clone().unwrap_or_default(), status.details.clone().unwrap_or_default());
            let v1::ModelIdentity { name, version, weights_digest } = identity;
            info!(
                target: "plumb::models",
                model = name,
                version,
                kind = super::model::kind_name(details.kind()),
                architecture = details.architecture,
                dtype = details.dtype,
                parameters = details.parameters,
                max_input_tokens = details.max_input_tokens,
                source = details.source,
                digest = weights_digest,
                is_default = status.is_default,
                "serving"
            );
        }
    }
}

/// The server as a whole began or ceased to serve, or has not begun yet.
pub struct ReadinessChanged {
    /// Whether it serves now.
    pub ready: bool,
}

impl ReadinessChanged {
    /// Logs and shows it.
    pub fn emit(self) {
        let status = if self.ready { "SERVING" } else { "NOT_SERVING" };
        info!(target: "plumb", status, "health");
        gauge!(names::READY.name).set(f64::from(u8::from(self.ready)));
    }
}

/// A step of the shutdown.
pub enum ShutdownStep {
    /// Somebody asked for it.
    Asked {
        /// SIGTERM, SIGINT or what else.
        by: &'static str,
    },
    /// Load balancers get time to notice.
    LameDuck {
        /// How long.
        pause: Duration,
    },
    /// No new connections; calls in flight may finish.
    Draining {
        /// Calls in flight.
        in_flight: usize,
        /// How long they may take.
        timeout: Duration,
    },
    /// Somebody asked for it again.
    Hurried {
        /// SIGTERM, SIGINT or what else.
        by: &'static str,
    },
    /// The time was up.
    TimedOut {
        /// Calls that were still in flight and failed.
        in_flight: usize,
    },
    /// All is done.
    Done,
}

impl ShutdownStep {
    /// Logs it.
    pub fn emit(self) {
        match self {
            Self::Asked { by } => info!(target: "plumb::shutdown", by, "shutting down"),
            Self::LameDuck { pause } => {
                info!(target: "plumb::shutdown", seconds = pause.as_secs_f64(), "still serving, as a lame duck")
            }
            Self::Draining { in_flight, timeout } => {
                info!(target: "plumb::shutdown", in_flight, timeout_seconds = timeout.as_secs_f64(), "draining");
            }
            Self::Hurried { by } => warn!(target: "plumb::shutdown", by, "asked again: what is not done fails now"),
            Self::TimedOut { in_flight } => warn!(target: "plumb::shutdown", in_flight, "drain timed out"),
            Self::Done => info!(target: "plumb::shutdown", "done"),
        }
    }
}

/// Physical memory was measured.
pub struct MemorySampled {
    /// Of the process.
    pub bytes: u64,
}

impl MemorySampled {
    /// Shows it.
    pub fn emit(self) {
        gauge!(names::RESIDENT_MEMORY.name).set(self.bytes as f64);
    }
}

/// A thread of the CPU pool panicked: a fault of ours, or of a tokenizer.
pub struct WorkerPanicked;

impl WorkerPanicked {
    /// Calls for help.
    pub fn emit(self) {
        error!(target: "plumb", "a tokenization worker panicked; its call fails, the server goes on");
    }
}

/// A thread panicked: a fault of ours.
pub struct ThreadPanicked<'a> {
    /// Where; what was said there may quote a caller.
    pub location: Option<&'a std::panic::Location<'a>>,
}

impl ThreadPanicked<'_> {
    /// Calls for help.
    pub fn emit(self) {
        let location = self.location.map(tracing::field::display);
        let thread = std::thread::current();
        error!(target: "plumb", location, thread = thread.name(), "a thread panicked");
    }
}

/// The server ends with an error.
pub struct Fatal<'a> {
    /// Why.
    pub error: &'a Error,
}

impl Fatal<'_> {
    /// Logs it.
    pub fn emit(self) {
        error!(target: "plumb", error = %self.error, "the server ends");
    }
}
