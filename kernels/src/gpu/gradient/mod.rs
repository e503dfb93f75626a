//! How a loss changes with what the operations were given, as in [`crate::gradient`].
//!
//! A gradient has the same bits however the device schedules its work: no sum is atomic.

mod attention;

pub use attention::Attention;
