//! How a loss changes with what the operations were given: the backward half of training.
//!
//! As everywhere in this crate, a sum has one order: that of the rows of the step, cut in a fixed way. A step's gradient
//! has the same bits on any number of threads.

mod activation;
mod attention;
mod head;
mod linear;
mod norm;
mod optimiser;

pub use attention::{Keys, attention, unprepare};
#[cfg(feature = "gpu")]
pub(crate) use attention::{Tree, TreeSpan};
pub use head::{TopK, cross_entropy, distillation, pair_slopes};
pub use linear::{Outer, add_rows, column_sums};
pub use optimiser::{AdamW, add, sum_of_squares};
