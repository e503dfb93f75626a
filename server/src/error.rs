//! The server's one error type, and its one mapping to gRPC.
//!
//! Everything that can go wrong on a request's way is a variant of [`Error`]; [`Error::code`] is the only place where a
//! variant becomes a code, for whole calls ([`tonic::Status`]), for the items of a call ([`v1::ItemError`]) and for
//! metrics alike.

use std::time::Duration;

use plumb_proto::v1;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// When a client may try a server again that is still starting.
const RETRY_STARTING: Duration = Duration::from_secs(2);
/// The same for one that is going away: its successor, or another replica, is a connection away.
const RETRY_DRAINING: Duration = Duration::from_secs(1);
/// The same for one whose engine died: the process has to be replaced first.
const RETRY_DEVICE_LOST: Duration = Duration::from_secs(5);

/// Most bytes of a message on the wire: a chat template may refuse a conversation by quoting it, and a status has to
/// fit into the headers that clients take, 8 KiB for some: there it stands three times, and encoded.
const MAX_MESSAGE_BYTES: usize = 1024;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a call, or with an item of one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The request makes no sense, whatever state the server is in.
    #[error("{}{message}", prefix(field))]
    InvalidArgument {
        /// Path of the field in the request, such as `items[3].token_ids`; empty for the request as a whole.
        field: String,
        /// What is wrong and what is allowed.
        message: String,
    },
    /// No such model, version or label.
    #[error("{message}")]
    NotFound {
        /// What was looked for, and what there is.
        message: String,
    },
    /// A version of this number is loaded or loading.
    #[error("{message}")]
    AlreadyExists {
        /// What exists.
        message: String,
    },
    /// The queue, the token budget or the concurrency limit is full.
    #[error("{what}; try again in {} ms", retry_after.as_millis())]
    ResourceExhausted {
        /// Which limit, and how full it is.
        what: String,
        /// When there should be room.
        retry_after: Duration,
    },
    /// Models are still being loaded or warmed.
    #[error("{message}")]
    Starting {
        /// What is awaited.
        message: String,
    },
    /// The server takes no more work: it is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The engine died. Only a new process helps.
    #[error("the engine is gone; the server cannot compute any more")]
    DeviceLost,
    /// Something that the server needs does not answer now: the hub, for example.
    #[error("{message}")]
    Unavailable {
        /// What, and why.
        message: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The caller's deadline passed before the work was done; what was still queued was not begun.
    #[error("the deadline passed before the work was done")]
    DeadlineExceeded,
    /// The caller went away.
    #[error("the call was cancelled")]
    Cancelled,
    /// The request is sound, and the model or the server is not in the state that it needs.
    #[error("{message}")]
    FailedPrecondition {
        /// What would have to be different.
        message: String,
    },
    /// There is no room for another version, until others have gone.
    #[error("{message}; a version of a watched folder is tried again by itself")]
    NoRoom {
        /// What is short, and how to get it.
        message: String,
    },
    /// A file of a checkpoint is missing, or not what it should be. It may still be on its way.
    #[error("{message}")]
    Damaged {
        /// Which file, and what is wrong with it.
        message: String,
    },
    /// The model computed a NaN or an infinity. It is not passed off as a number.
    #[error("{what} is not a finite number")]
    NonFinite {
        /// What was computed.
        what: String,
    },
    /// A fault of the server.
    #[error("internal error: {message}")]
    Internal {
        /// What happened.
        message: String,
    },
    /// No credential, or one that nobody has.
    #[error("{message}")]
    Unauthenticated {
        /// What is expected.
        message: String,
    },
    /// The credential is good, and not for this rpc.
    #[error("{message}")]
    PermissionDenied {
        /// What is expected.
        message: String,
    },
}

fn prefix(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}: ") }
}

impl Error {
    /// An argument that cannot be taken.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidArgument { field: field.into(), message: message.into() }
    }

    /// Something that is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::NotFound { message: message.into() }
    }

    /// A state that does not fit.
    pub fn failed_precondition(message: impl Into<String>) -> Self {
        Self::FailedPrecondition { message: message.into() }
    }

    /// A fault of the server.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::Internal { message: message.into() }
    }

    /// The same error, the field seen from the message that holds `parent`.
    #[must_use]
    pub fn within(self, parent: &str) -> Self {
        match self {
            Self::InvalidArgument { field, message } if field.is_empty() => Self::invalid(parent, message),
            Self::InvalidArgument { field, message } => Self::invalid(format!("{parent}.{field}"), message),
            other => other,
        }
    }

    /// The gRPC code: the table of the wire contract.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidArgument { .. } => Code::InvalidArgument,
            Self::NotFound { .. } => Code::NotFound,
            Self::AlreadyExists { .. } => Code::AlreadyExists,
            Self::ResourceExhausted { .. } => Code::ResourceExhausted,
            Self::Starting { .. } | Self::Draining | Self::DeviceLost | Self::Unavailable { .. } => Code::Unavailable,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::FailedPrecondition { .. } | Self::NoRoom { .. } | Self::Damaged { .. } => Code::FailedPrecondition,
            Self::NonFinite { .. } | Self::Internal { .. } => Code::Internal,
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::PermissionDenied { .. } => Code::PermissionDenied,
        }
    }

    /// When the caller should try again; `None` if that would not help.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::ResourceExhausted { retry_after, .. } | Self::Unavailable { retry_after, .. } => Some(*retry_after),
            Self::Starting { .. } => Some(RETRY_STARTING),
            Self::Draining => Some(RETRY_DRAINING),
            Self::DeviceLost => Some(RETRY_DEVICE_LOST),
            _ => None,
        }
    }

    /// Value of the `reason` label in metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidArgument { .. } => "invalid_argument",
            Self::NotFound { .. } => "not_found",
            Self::AlreadyExists { .. } => "already_exists",
            Self::ResourceExhausted { .. } => "resource_exhausted",
            Self::Starting { .. } => "starting",
            Self::Draining => "draining",
            Self::DeviceLost => "device_lost",
            Self::Unavailable { .. } => "unavailable",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Cancelled => "cancelled",
            Self::FailedPrecondition { .. } | Self::NoRoom { .. } | Self::Damaged { .. } => "failed_precondition",
            Self::NonFinite { .. } => "non_finite",
            Self::Internal { .. } => "internal",
            Self::Unauthenticated { .. } => "unauthenticated",
            Self::PermissionDenied { .. } => "permission_denied",
        }
    }
}

impl Error {
    /// What a log may say: where the caller is at fault, the message may quote it, and is left out.
    #[must_use]
    pub fn for_logs(&self) -> String {
        match self {
            Self::InvalidArgument { field, .. } => format!("{}invalid argument", prefix(field)),
            Self::NotFound { .. } => "not found".to_owned(),
            other => other.to_string(),
        }
    }
}

/// A message that fits into headers.
fn shortened(mut message: String) -> String {
    if message.len() > MAX_MESSAGE_BYTES {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        message.push_str(" ...");
    }
    message
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = shortened(error.to_string());
        let mut details = ErrorDetails::new();
        let mut metadata = MetadataMap::new();
        if let Error::InvalidArgument { field, message } = &error {
            details.add_bad_request_violation(field.clone(), shortened(message.clone()));
        }
        if let Some(delay) = error.retry_after() {
            details.set_retry_info(Some(delay));
            // What retry policies built into gRPC libraries read (gRFC A6).
            let millis = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            metadata.insert("grpc-retry-pushback-ms", millis.into());
        }
        Self::with_error_details_and_metadata(error.code(), message, details, metadata)
    }
}

impl From<&Error> for v1::ItemError {
    fn from(error: &Error) -> Self {
        Self { code: error.code() as i32, message: shortened(error.to_string()) }
    }
}

impl From<plumb_model::Error> for Error {
    fn from(error: plumb_model::Error) -> Self {
        use plumb_model::Error as Model;
        let message = error.to_string();
        match error {
            Model::InvalidInput(_) | Model::TooLong { .. } => Self::invalid("", message),
            // A checkpoint that is refused: the same call fails until somebody mends it.
            Model::Unsupported(_)
            | Model::MissingTensor { .. }
            | Model::MisshapenTensor { .. }
            | Model::ExtraTensors { .. } => Self::failed_precondition(message),
            Model::MissingFile { .. } | Model::Malformed { .. } => Self::Damaged { message },
            Model::OutOfMemory(_) => Self::NoRoom { message },
            Model::Hub(_) => Self::Unavailable { message, retry_after: Duration::from_secs(10) },
            Model::Renderer(_) => Self::Unavailable { message, retry_after: Duration::from_secs(1) },
            Model::Io { .. } | Model::Tensor(_) | Model::Device(_) => Self::internal(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row of the contract's table: the code, whether the status carries `BadRequest`, whether `RetryInfo`.
    fn check(error: Error, code: Code, bad_request: bool, retry: bool) {
        let item = v1::ItemError::from(&error);
        assert_eq!(item.code, code as i32, "{error:?} as an item");
        let text = error.to_string();
        let delay = error.retry_after();
        let status = Status::from(error);
        assert_eq!(status.code(), code, "{text}");
        assert_eq!(status.message(), text);
        let details = status.get_error_details();
        assert_eq!(details.bad_request().is_some(), bad_request, "BadRequest of {text}");
        assert_eq!(details.retry_info().is_some(), retry, "RetryInfo of {text}");
        assert_eq!(details.retry_info().and_then(|info| info.retry_delay), delay);
        let pushback = status.metadata().get("grpc-retry-pushback-ms").map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(pushback, delay.map(|delay| delay.as_millis().to_string()), "push-back of {text}");
    }

    #[test]
    fn every_row_of_the_table_of_codes() {
        let after = Duration::from_millis(250);
        let message = || "why".to_owned();
        // Bad input, too long, unknown enum.
        check(Error::invalid("items[0]", "why"), Code::InvalidArgument, true, false);
        check(plumb_model::Error::InvalidInput(message()).into(), Code::InvalidArgument, true, false);
        check(plumb_model::Error::TooLong { tokens: 9, limit: 8 }.into(), Code::InvalidArgument, true, false);
        // Unknown model, version, label.
        check(Error::not_found("why"), Code::NotFound, false, false);
        // Queue or token budget full.
        check(Error::ResourceExhausted { what: message(), retry_after: after }, Code::ResourceExhausted, false, true);
        // Starting, draining, device lost.
        check(Error::Starting { message: message() }, Code::Unavailable, false, true);
        check(Error::Draining, Code::Unavailable, false, true);
        check(Error::DeviceLost, Code::Unavailable, false, true);
        check(Error::Unavailable { message: message(), retry_after: after }, Code::Unavailable, false, true);
        check(plumb_model::Error::Hub(message()).into(), Code::Unavailable, false, true);
        check(plumb_model::Error::Renderer(message()).into(), Code::Unavailable, false, true);
        // Deadline passed in the queue; caller gone.
        check(Error::DeadlineExceeded, Code::DeadlineExceeded, false, false);
        check(Error::Cancelled, Code::Cancelled, false, false);
        // Rpc not valid for this kind of model; checkpoint refused; version taken.
        check(Error::failed_precondition("why"), Code::FailedPrecondition, false, false);
        check(plumb_model::Error::Unsupported(message()).into(), Code::FailedPrecondition, false, false);
        check(plumb_model::Error::OutOfMemory(message()).into(), Code::FailedPrecondition, false, false);
        let missing = plumb_model::Error::MissingFile { path: "pm".into(), what: message() };
        check(missing.into(), Code::FailedPrecondition, false, false);
        check(Error::AlreadyExists { message: message() }, Code::AlreadyExists, false, false);
        // Kernel fault, NaN.
        check(Error::internal("why"), Code::Internal, false, false);
        check(Error::NonFinite { what: "the reward".to_owned() }, Code::Internal, false, false);
        // No or wrong credential.
        check(Error::Unauthenticated { message: message() }, Code::Unauthenticated, false, false);
        check(Error::PermissionDenied { message: message() }, Code::PermissionDenied, false, false);
    }

    #[test]
    fn a_message_that_quotes_its_caller_is_short_and_not_logged() {
        let error = Error::invalid("items[0]", "é".repeat(5000));
        let status = Status::from(error.clone());
        assert!(status.message().len() < 1100 && status.message().ends_with("é ..."), "{}", status.message().len());
        assert!(status.details().len() < 2400, "{}", status.details().len());
        assert_eq!(error.for_logs(), "items[0]: invalid argument");
        assert_eq!(Error::not_found("no model `secret`").for_logs(), "not found");
        assert_eq!(Error::Draining.for_logs(), Error::Draining.to_string());
    }

    #[test]
    fn the_field_path_is_seen_from_the_request() {
        let error = Error::invalid("token_ids", "empty").within("items[3]");
        assert_eq!(error.to_string(), "items[3].token_ids: empty");
        let status = Status::from(error);
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "items[3].token_ids");
        assert_eq!(Error::invalid("", "too long").within("items[0]").to_string(), "items[0]: too long");
        assert_eq!(Error::Draining.within("items[0]"), Error::Draining);
    }
}
