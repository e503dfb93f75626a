//! One type for everything that is worth telling. `emit` writes the log line and moves the metrics; nothing else in the
//! crate does either.
//!
//! Levels say what an operator has to do: `error` somebody has to act, `warn` somebody should look, `info` a change of
//! state, `debug` the life of single calls.

pub mod access;
pub mod engine;
pub mod model;
pub mod process;
pub mod record;
pub mod request;

pub use access::*;
pub use engine::*;
pub use model::*;
pub(crate) use model::{kind_name, state_name};
pub use process::*;
pub use record::*;
pub use request::*;
