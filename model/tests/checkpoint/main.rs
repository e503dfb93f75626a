//! Opens the committed fixtures, takes every tensor, and breaks copies of them in every way that has an error message.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

mod adapters;
mod devices;
mod folders;
mod footprint;
mod fp8;
mod gguf;
mod manifests;
mod quantised;
mod refusals;
mod support;
