//! The backward half of training, as [`crate::gradient`] has it.
//!
//! As there, a sum over rows has one order: rows are cut into parts in a fixed way, and nothing is added by whoever comes
//! first. Products of matrices are cuBLASLt's, whose order depends on their shapes.

mod attention;
mod head;
mod linear;
mod optimiser;
mod rows;

pub use attention::Attention;
pub use head::{Losses, Slopes, Targets};
pub use linear::Columns;
pub use rows::Scatter;

use super::driver::Argument::{Address, F32, U64};
use super::rows::{MAX_BLOCKS, THREADS};
use super::{Gpu, Result, View, ViewMut};
use crate::Element;

impl Gpu {
    /// `to = from`, rounded to the nearest.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn round<E: Element>(&self, from: View<'_, f32>, to: ViewMut<'_, E>) -> Result<()> {
        assert_eq!(from.len, to.len, "lengths of a copy");
        let arguments = [Address(from.address), Address(to.address), U64(to.len as u64)];
        // SAFETY: as in `cuda/round.cu`.
        unsafe { self.launch(&format!("round_{}", E::NAME), [blocks(to.len), 1, 1], THREADS, 0, &arguments) }
    }

    /// Sets all numbers to one value.
    ///
    /// # Errors
    /// If the GPU refuses.
    pub fn fill(&self, x: ViewMut<'_, f32>, value: f32) -> Result<()> {
        let arguments = [Address(x.address), F32(value), U64(x.len as u64)];
        // SAFETY: as in `cuda/round.cu`.
        unsafe { self.launch("fill", [blocks(x.len), 1, 1], THREADS, 0, &arguments) }
    }
}

/// Of a kernel that takes a number a thread.
fn blocks(len: usize) -> usize {
    len.div_ceil(THREADS).min(MAX_BLOCKS)
}
