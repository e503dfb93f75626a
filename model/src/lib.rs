//! What a checkpoint is and what it computes.
//!
//! A [`checkpoint`] is opened from a folder, a GGUF file or a Hugging Face repository; its [`config`] describes one
//! decoder; [`text`] turns conversations into token ids; [`decoder`] turns packed token ids into rewards,
//! log-probabilities and logits over a paged [`cache`].
//!
//! Nothing here knows gRPC, async, scheduling or training loops.

mod background;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod error;
pub mod faults;
mod footprint;
pub mod loaded;
pub mod text;

pub use error::{Error, Result};
pub use plumb_kernels::parallel;
