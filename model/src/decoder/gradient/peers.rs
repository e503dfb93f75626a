//! Sums of lists that lie on GPUs, of one process or of several of which each computes on its own.

#[cfg(feature = "gpu")]
use plumb_kernels::gpu;

use super::numbers::{Numbers, Place, elsewhere};
use crate::Result;

/// What the processes need to meet: made by one of them and told to all.
pub type MeetingId = [u8; 128];

/// This process's GPU and those of others, which add up lists of numbers without the memory of the processes: NVIDIA's by
/// NCCL.
#[derive(Debug)]
pub struct Peers(#[cfg(feature = "gpu")] gpu::Peers);

impl Peers {
    /// Where these numbers lie, without any others; `None` if that is no GPU.
    pub fn alone(numbers: &Numbers) -> Option<Self> {
        match &numbers.0 {
            #[cfg(feature = "gpu")]
            Place::Gpu(gpu, _) => Some(Self(gpu.alone())),
            Place::Host(_) => None,
        }
    }

    /// Whether where these numbers lie could meet others.
    ///
    /// # Errors
    /// If not: they are not on a GPU, or there is no NCCL.
    pub fn check(numbers: &Numbers) -> Result<()> {
        match &numbers.0 {
            #[cfg(feature = "gpu")]
            Place::Gpu(gpu, _) => Ok(gpu.check_peers()?),
            Place::Host(_) => Err(elsewhere()),
        }
    }

    /// By which the processes meet once.
    ///
    /// # Errors
    /// As [`Peers::check`].
    pub fn meeting_id(numbers: &Numbers) -> Result<MeetingId> {
        match &numbers.0 {
            #[cfg(feature = "gpu")]
            Place::Gpu(gpu, _) => Ok(gpu.meeting_id()?),
            Place::Host(_) => Err(elsewhere()),
        }
    }

    /// Meets the other processes, of which there are so many with this one; waits for all of them.
    ///
    /// # Errors
    /// As [`Peers::check`], or if two processes have the same GPU.
    pub fn meet(numbers: &Numbers, id: &MeetingId, rank: usize, count: usize) -> Result<Self> {
        match (&numbers.0, id, rank, count) {
            #[cfg(feature = "gpu")]
            (Place::Gpu(gpu, _), ..) => Ok(Self(gpu.meet(id, rank, count)?)),
            (Place::Host(_), ..) => Err(elsewhere()),
        }
    }

    /// Adds the lists of all processes, in the order of the processes, to their sum; the first replaces it if it is to be
    /// `new`. All have to call it, with lists of one length.
    ///
    /// # Errors
    /// If a GPU has failed or has no memory for its share of the sum.
    pub fn add(&mut self, own: &Numbers, new: bool) -> Result<()> {
        match (&own.0, new) {
            #[cfg(feature = "gpu")]
            (Place::Gpu(_, own), new) => Ok(self.0.add(own.all(), new)?),
            (Place::Host(_), _) => Err(elsewhere()),
        }
    }

    /// Puts the sum in the place of numbers. All have to call it.
    ///
    /// # Errors
    /// If a GPU has failed.
    pub fn collect(&self, sum: &mut Numbers) -> Result<()> {
        match &mut sum.0 {
            #[cfg(feature = "gpu")]
            Place::Gpu(_, sum) => Ok(self.0.collect(sum.all_mut())?),
            Place::Host(_) => Err(elsewhere()),
        }
    }
}
