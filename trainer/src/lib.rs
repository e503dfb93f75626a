//! Makes the checkpoints that the server loads.
//!
//! [`prepare`](mod@prepare) turns data sets into lines; a [`Recipe`] says what is learned from which data; [`run()`]
//! follows it, with the decoder that will serve the result, and leaves a checkpoint in Hugging Face layout, with a model
//! card. [`report()`] shows what became of a run, on [plots](plot). [`evaluate`](mod@evaluate) measures a checkpoint or a
//! server. [`inspect`] says what a checkpoint is; [`publish`] makes a version of it. Both load it first: what is missing,
//! extra or misshapen
//! is found here, not at the next start of a server.
//!
//! ```
//! use plumb_model::checkpoint::Source;
//!
//! # fn main() -> plumb_trainer::Result<()> {
//! let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/llama-pm");
//! let found = plumb_trainer::inspect(&Source { model: folder.to_owned(), ..Source::default() })?;
//! assert_eq!(found.info.architecture, "LlamaForSequenceClassification");
//! # Ok(())
//! # }
//! ```
//!
//! [`sample()`] asks a server for what a language model says, through its client; [`grade`] runs programs in a
//! [`sandbox`] to see which are right. Nothing here knows how models are served.

mod card;
mod code;
pub mod data;
mod draft;
mod error;
pub mod evaluate;
mod events;
pub mod examples;
mod history;
mod input;
mod lora;
mod objective;
mod order;
mod output;
pub mod plot;
pub mod prepare;
mod probes;
mod processes;
mod progress;
mod publish;
pub mod recipe;
mod record;
mod report;
mod run;
mod sample;
pub mod sandbox;
mod scratch;
mod shards;
mod state;
mod store;
mod teach;

pub use code::{Graded, grade};
pub use error::{Error, Result};
pub use objective::Measures;
pub use probes::Probes;
pub use publish::{Inspection, Published, inspect, publish};
pub use recipe::Recipe;
pub use report::report;
pub use run::{Finished, run};
pub use sample::{Sampled, Sampling, sample};
pub use scratch::{Shape, scratch};
pub use teach::{Prompt, TeachOptions, teach};
