//! The one error type of the crate.

use std::path::PathBuf;

/// What can go wrong between data and a published version.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A checkpoint, its text or its decoder.
    #[error(transparent)]
    Model(#[from] plumb_model::Error),
    /// A server that was asked for samples.
    #[error("the server: {0}")]
    Server(#[from] plumb_client::Error),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file was read and makes no sense.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with the number of the line where there is one.
        reason: String,
    },
    /// The recipe asks for something that cannot be.
    #[error("{0}")]
    Recipe(String),
    /// A loss or gradient is not a number.
    #[error("step {step}: {what} is {value}; the batch is in {saved}")]
    NonFinite {
        /// The step, from 1 on.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// What it is.
        value: f64,
        /// Where its examples were written.
        saved: PathBuf,
    },
}

/// What most functions of the crate answer.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of a file.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
