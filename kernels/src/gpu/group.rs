//! GPUs that work on one thing together.

use std::fmt;
use std::sync::Arc;

use super::driver::Collective;
use super::{Gpu, GpuError, Result, ViewMut};

/// GPUs that add up what each of them has. Clones are the same group.
///
/// On NVIDIA's, NCCL does it, whose library is loaded for the first group.
#[derive(Clone)]
pub struct Group(Arc<dyn Collective>);

impl fmt::Debug for Group {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Group of {}", self.0.len())
    }
}

impl Group {
    /// A group of these, at least one and each only once.
    ///
    /// # Errors
    /// [`GpuError::Missing`] if there is no NCCL for them, or what NCCL has against them.
    pub fn new(gpus: &[Gpu]) -> Result<Self> {
        let first = gpus.first().ok_or_else(|| GpuError::Missing("a group of none".to_owned()))?;
        Ok(Self(first.driver.group(gpus)?))
    }

    /// The parts, one on each GPU in the group's order, all become their sum: in f32, and the same bits on all of them.
    ///
    /// # Errors
    /// If a GPU refuses.
    ///
    /// # Panics
    /// If there is not a part for each GPU, or they are not of one length.
    pub fn all_reduce(&self, parts: &mut [ViewMut<'_, f32>]) -> Result<()> {
        let len = parts.first().map_or(0, |part| part.len);
        assert!(parts.len() == self.0.len() && parts.iter().all(|part| part.len == len), "parts of a sum");
        let addresses: Vec<u64> = parts.iter().map(|part| part.address).collect();
        if len == 0 {
            return Ok(());
        }
        // SAFETY: they are views of so many numbers.
        unsafe { self.0.all_reduce(&addresses, len) }
    }
}
