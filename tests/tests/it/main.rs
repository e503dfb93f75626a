//! The whole system from outside, in the order in which one would want to know: are the numbers right, whatever stands
//! beside them? What is refused, and how? Does text come as it should, do models come and go, does the server stop in
//! good order, and can it be seen? Do other programs get on with it? Does the guide
//! say what is so?

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop where it stands, in its helpers too")]

mod bulk;
mod command;
mod errors;
mod evaluate;
mod gateway;
mod generation;
mod golden;
mod guide;
mod invariance;
mod isolation;
mod limits;
mod metrics;
mod models;
mod operations;
mod python;
mod real;
mod registry;
mod reliability;
mod replay;
mod security;
mod shutdown;
