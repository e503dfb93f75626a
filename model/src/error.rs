//! The one error type of the crate.

use std::path::PathBuf;

use plumb_kernels::memory::OutOfMemory;

/// What can go wrong between a source and a number.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that the checkpoint needs is not there.
    #[error("{path}: {what} is missing")]
    MissingFile {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// A file could not be read.
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
        /// What is wrong with it.
        reason: String,
    },
    /// `config.json` asks for something that is not served.
    #[error("unsupported checkpoint: {0}")]
    Unsupported(String),
    /// The checkpoint lacks a tensor.
    #[error("tensor `{name}` is missing: expected shape {expected:?}")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    MisshapenTensor {
        /// Its name.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// The checkpoint holds tensors that nothing uses.
    #[error("the checkpoint holds {} tensors that a {architecture} model has no use for: {}", names.len(), first(names))]
    ExtraTensors {
        /// What the checkpoint says it is.
        architecture: String,
        /// Their names.
        names: Vec<String>,
    },
    /// A text, template or token id that the model cannot take.
    #[error("{0}")]
    InvalidInput(String),
    /// A process that renders chat templates does not start, or was ended from outside.
    #[error("the process that renders chat templates: {0}")]
    Renderer(String),
    /// The input is longer than the limit, and truncation was not asked for.
    #[error("the input has {tokens} tokens, {limit} are allowed; shorten it, or ask for truncation")]
    TooLong {
        /// Tokens of the input.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// A model does not fit into the memory that is free.
    #[error("not enough memory: {0}")]
    OutOfMemory(String),
    /// The device on which a model computes is not there, refused, or is lost.
    #[error("{0}")]
    Device(String),
    /// The Hugging Face hub did not deliver.
    #[error("hub: {0}")]
    Hub(String),
    /// A fault inside a tensor operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl From<OutOfMemory> for Error {
    fn from(error: OutOfMemory) -> Self {
        Self::OutOfMemory(error.to_string())
    }
}

#[cfg(feature = "gpu")]
impl From<plumb_kernels::gpu::GpuError> for Error {
    fn from(error: plumb_kernels::gpu::GpuError) -> Self {
        match error {
            plumb_kernels::gpu::GpuError::OutOfMemory { .. } => Self::OutOfMemory(error.to_string()),
            _ => Self::Device(error.to_string()),
        }
    }
}

/// The first of many names: an error is a line.
fn first(names: &[String]) -> String {
    const SHOWN: usize = 16;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { shown + ", ..." } else { shown }
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
