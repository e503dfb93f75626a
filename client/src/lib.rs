//! Rust client of Plumb: scores, ranks and generates text over gRPC.
//!
//! A [`Client`] is cheap to clone and shares its connections. It sends the deadline with every call, retries what is
//! worth retrying ([`RetryPolicy`]) and answers the messages of the wire contract ([`v1`]) or a typed [`Error`]. It
//! never makes up a value: an item without a score stays an error, see [`reward`].
//!
//! ```no_run
//! use plumb_client::{Client, ClientOptions, dialogue, reward, v1};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect(ClientOptions::new("http://127.0.0.1:50051")).await?;
//!
//! let items = vec![
//!     dialogue("What is the capital of France?", "Paris."),
//!     dialogue("What is the capital of France?", "No idea."),
//! ];
//! let answer = client.score(v1::ScoreRequest { items, ..Default::default() }).await?;
//! for result in &answer.results {
//!     match reward(result) {
//!         Ok(reward) => println!("{reward}"),
//!         Err(failure) => eprintln!("{failure}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Absent: nothing here knows how a server works inside, and nothing caches answers.

mod client;
mod error;
#[cfg(feature = "evaluation")]
pub mod hhh;
mod input;
mod options;
#[cfg(feature = "parquet")]
pub mod parquet;
mod retry;
#[cfg(feature = "evaluation")]
pub mod stats;
mod stream;
pub mod transcript;

pub use client::{Client, SERVICES};
pub use error::{CallError, Error, FieldViolation, ItemFailure, reward, score};
pub use input::{conversation, dialogue, text};
pub use options::{ApiKey, ClientIdentity, ClientOptions};
/// The format of recorded calls.
#[cfg(feature = "cli")]
pub use plumb_proto::record;
/// The messages of package `plumb.v1`, and the names of status codes.
pub use plumb_proto::{code_name, v1};
pub use retry::{Failure, RetryPolicy};
pub use stream::Answers;
/// gRPC status codes.
pub use tonic::Code;
