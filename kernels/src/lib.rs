//! The numeric operations of Plumb's models.
//!
//! Every operation works on packed rows: a batch is one flat buffer, never padded. Each row of a result is computed by
//! the same operations in the same order whatever other rows stand beside it, so a result's bits depend on its own
//! inputs only. That is why no sum is ever split by the number of rows or threads.
//!
//! Weights and caches are held as [`Element`]s (`f32` or `bf16`); sums, norms, soft-max and residuals are `f32`.
//! Slow, plain versions of everything are in [`mod@reference`], for tests.

#![expect(
    unsafe_code,
    reason = "vector instructions, shared output buffers and file mappings; each with its safety argument"
)]

pub mod element;
pub mod math;
pub mod memory;

pub mod activation;
pub mod attention;
pub mod fp8;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod gradient;
pub mod head;
pub mod linear;
pub mod norm;
pub mod quantised;
pub mod reference;
pub mod rotary;
pub mod sample;

mod gemm;
mod simd;

pub mod parallel;

pub use element::Element;
pub use gemm::{Isa, isa};
