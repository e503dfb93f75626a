//! What the whole-system tests stand on: the real `plumb-server` and `plumb`, on free ports, over the real wire.
//!
//! [`binary`] builds the two programs once; [`Launch`] starts a server, and [`Server`] is one that runs; [`fixture`]
//! knows the checkpoints beside this crate and makes changed copies of them; [`call`] makes requests short to write;
//! [`Exposition`] reads metrics. The tests themselves are in `tests/it`.
//!
//! Nothing here knows how a server works inside: it is started, called, read and stopped as a user would.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop where it stands, in its helpers too")]

mod binary;
pub mod call;
mod exposition;
pub mod fixture;
mod publish;
mod server;

pub use binary::binary;
pub use exposition::{Exposition, Family, Kind, Sample};
pub use publish::publish;
pub use server::{Launch, Server};
