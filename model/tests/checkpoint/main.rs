//! Opens the committed fixtures, takes every tensor, and breaks copies of them in every way that has an error message.

mod adapters;
mod folders;
mod gguf;
mod manifests;
mod refusals;
mod support;
