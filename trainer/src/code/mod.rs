//! Problems whose solutions are programs, and what becomes of a program that claims to solve one (Askell et al. 2021,
//! section 3.2).

mod edit;
mod grade;
mod problem;

pub(crate) use edit::mutants;
pub use grade::{Graded, grade};
pub(crate) use problem::{Line, Problem, Problems};
