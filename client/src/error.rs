//! What can go wrong, for a whole call and for a single item.

use std::fmt;
use std::time::Duration;

use plumb_proto::{code_name, v1};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::retry::Failure;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The options make no sense; nothing was sent.
    #[error("{0}")]
    Options(String),
    /// No server could be reached.
    #[error("cannot reach {endpoints}: {reason}")]
    Connect {
        /// The servers that were tried.
        endpoints: String,
        /// What the last one said.
        reason: String,
    },
    /// The server, or the way to it, refused or failed.
    #[error(transparent)]
    Call(#[from] Box<CallError>),
    /// The answer does not fit the request: client and server disagree on the contract.
    #[error("the server's answer does not fit the request: {0}")]
    Contract(String),
}

impl Error {
    /// The gRPC code of the failure.
    pub fn code(&self) -> Code {
        match self {
            Self::Options(_) => Code::InvalidArgument,
            Self::Connect { .. } => Code::Unavailable,
            Self::Call(call) => call.code,
            Self::Contract(_) => Code::Internal,
        }
    }
}

/// A call that ended with a status other than OK.
#[derive(Clone, Debug, PartialEq)]
pub struct CallError {
    /// The status code.
    pub code: Code,
    /// The server's words.
    pub message: String,
    /// With `INVALID_ARGUMENT`: which fields, and why.
    pub field_violations: Vec<FieldViolation>,
    /// When the server would like to be asked again.
    pub retry_after: Option<Duration>,
    /// Tries that were made.
    pub attempts: u32,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", code_name(self.code), self.words())?;
        if self.attempts > 1 {
            write!(f, " (after {} tries)", self.attempts)?;
        }
        Ok(())
    }
}

impl std::error::Error for CallError {}

impl CallError {
    /// The message, with the violations that it does not name by itself.
    fn words(&self) -> String {
        let mut words = self.message.clone();
        for violation in self.field_violations.iter().map(FieldViolation::to_string) {
            if !words.contains(&violation) {
                words += &format!("; {violation}");
            }
        }
        words
    }

    pub(crate) fn new(status: &Status, attempts: u32) -> Self {
        let violations = status.get_details_bad_request().map(|d| d.field_violations).unwrap_or_default();
        Self {
            code: code_of(status),
            message: status.message().to_owned(),
            field_violations: violations
                .into_iter()
                .map(|v| FieldViolation { field: v.field, description: v.description })
                .collect(),
            retry_after: retry_after(status),
            attempts,
        }
    }
}

/// A field of the request that the server refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field, such as `items[3].conversation`; empty for the request as a whole.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

impl fmt::Display for FieldViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field.as_str() {
            // The request as a whole.
            "" => f.write_str(&self.description),
            field => write!(f, "{field}: {}", self.description),
        }
    }
}

/// Why one item of a call has no score, while its neighbours may have theirs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}: {message}", code_name(*code))]
pub struct ItemFailure {
    /// The code.
    pub code: Code,
    /// What is wrong and what to do.
    pub message: String,
}

impl From<&v1::ItemError> for ItemFailure {
    fn from(error: &v1::ItemError) -> Self {
        Self { code: Code::from_i32(error.code), message: error.message.clone() }
    }
}

impl From<&Error> for ItemFailure {
    fn from(error: &Error) -> Self {
        let message = match error {
            Error::Call(call) => call.words(),
            other => other.to_string(),
        };
        Self { code: error.code(), message }
    }
}

/// The score of an item, or why it has none.
pub fn score(result: &v1::ScoreResult) -> Result<&v1::Score, ItemFailure> {
    match &result.outcome {
        Some(v1::score_result::Outcome::Score(score)) => Ok(score),
        Some(v1::score_result::Outcome::Error(error)) => Err(error.into()),
        None => Err(ItemFailure {
            code: Code::Internal,
            message: "the server sent neither a score nor an error for this item".into(),
        }),
    }
}

/// The reward of an item, or why it has none.
pub fn reward(result: &v1::ScoreResult) -> Result<f32, ItemFailure> {
    score(result).map(|score| score.reward)
}

/// What the retry policy looks at.
pub(crate) fn failure_of(status: &Status) -> Failure {
    Failure { code: code_of(status), retry_after: retry_after(status) }
}

fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// The status's code, corrected where the status comes from tonic and not from the server: a connection that broke is
/// `UNAVAILABLE` and a deadline that passed here is `DEADLINE_EXCEEDED`, as the gRPC specification has it.
fn code_of(status: &Status) -> Code {
    // Only a status that tonic made has a source; a server's own has none.
    let mut source = std::error::Error::source(status);
    let local = source.is_some();
    while let Some(error) = source {
        if error.is::<tonic::TimeoutExpired>() {
            return Code::DeadlineExceeded;
        }
        source = error.source();
    }
    match status.code() {
        Code::Unknown | Code::Cancelled if local => Code::Unavailable,
        code => code,
    }
}
