//! The server: scores, ranks and generates over gRPC, and scores over HTTP.
//!
//! In reading order: [`config`] is what is decided before the start; [`app`] puts everything together and [`shutdown`]
//! takes it apart; [`error`] is what can go wrong. A call comes in over one of the `connections`, passes the `layers`,
//! one of which asks `access` who may call, reaches one of the `services`, is tokenized on the `pool`, resolved by the
//! `registry`, admitted by [`admission`] and computed by the [`engine`]; where asked for, `record` takes it down.
//! `health` and [`telemetry`] tell how that goes. The `gateway` is the same for those who do not speak gRPC.
//!
//! Nothing here knows what a model computes, nor how to train one.

mod access;
pub mod admission;
pub mod app;
pub mod config;
mod connections;
mod device;
pub mod engine;
pub mod error;
mod files;
mod gateway;
mod health;
mod layers;
mod pool;
mod record;
mod registry;
mod services;
pub mod shutdown;
pub mod telemetry;

pub use app::{Failure, Server, run};
pub use config::Config;
pub use error::Error;
