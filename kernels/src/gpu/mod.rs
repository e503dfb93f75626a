//! The operations of a decoder on a GPU, in the order in which they are asked for.
//!
//! A [`Gpu`] is a device with one stream: everything that it is asked for happens in order, later than the call, and
//! [`Buffer::read`] waits for it; [`Buffer::fetch`] leaves the waiting for later. Operations take views of buffers. Shapes that do not fit panic, as on the CPU; what the
//! device cannot do is a [`GpuError`].
//!
//! The kernels are those in `cuda/`. With the feature `cuda` they run on NVIDIA GPUs; a program that was built with it
//! starts without CUDA's libraries and finds no GPU then. With the feature `emulated` they run on the CPU, for tests.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod driver;
#[cfg(feature = "emulated")]
mod emulated;
mod fp8;
pub mod gradient;
mod group;
mod head;
mod linear;
mod memory;
#[cfg(feature = "cuda")]
mod nccl;
mod peers;
mod pieces;
mod quantised;
mod recording;
mod rows;
mod sample;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

pub use attention::{KvPages, Prepare, padded};
pub use group::Group;
pub use head::{MAX_TOP, Vocabulary};
pub use linear::{Linear, Output, Room, stacked_bytes};
pub use memory::{Buffer, Fetch, View, ViewMut};
pub use peers::{MeetingId, Peers};
pub use pieces::{CutRule, PARTIAL_BYTES, Partials, Pieces};
pub use rows::Norm;
pub use sample::Sampler;

use driver::{Argument, Driver, Recording};

/// A GPU, and how it is to be used. Clones are the same one.
#[derive(Clone)]
pub struct Gpu {
    driver: Arc<dyn Driver>,
    choice: Choice,
}

/// How a GPU is used.
#[derive(Clone, Copy, Debug)]
struct Choice {
    kernels: Kernels,
    /// See [`Gpu::invariant`].
    invariant: bool,
}

/// Which kernels it uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernels {
    /// Those that run on every GPU.
    Common,
    /// Those for its warp groups before others.
    WarpGroups,
}

/// Operations that were recorded, to be asked for again at the price of one.
#[derive(Debug)]
pub struct Graph {
    /// Dropped first: the device must be there.
    recording: Box<dyn Recording>,
    gpu: Gpu,
}

/// What a GPU could not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuError {
    /// There is no such GPU, or not what it takes to use it.
    Missing(String),
    /// It has no memory for so many bytes.
    OutOfMemory {
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// It is not made for what is asked of it.
    Unsupported(String),
    /// It refused, or is lost: nothing that is asked of it from now on can be relied on.
    Failed(String),
}

impl fmt::Display for GpuError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(reason) => write!(formatter, "no GPU: {reason}"),
            Self::OutOfMemory { bytes } => write!(formatter, "the GPU has no memory for an array of {bytes} bytes"),
            Self::Unsupported(reason) => formatter.write_str(reason),
            Self::Failed(reason) => write!(formatter, "the GPU failed: {reason}"),
        }
    }
}

impl std::error::Error for GpuError {}

/// Result of what a GPU does.
pub type Result<T, E = GpuError> = std::result::Result<T, E>;

/// Bytes of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// That nobody has taken.
    pub free: usize,
    /// All of it.
    pub total: usize,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl Gpu {
    /// The GPU of this number, from 0 on.
    ///
    /// # Errors
    /// [`GpuError::Missing`] if there is none, or no driver or cuBLAS for it.
    #[cfg(feature = "cuda")]
    pub fn cuda(number: usize) -> Result<Self> {
        Ok(Self::new(Arc::new(cuda::Cuda::new(number)?)))
    }

    /// The CPU, doing what a GPU would.
    #[cfg(feature = "emulated")]
    pub fn emulated() -> Self {
        Self::new(Arc::new(emulated::Emulated::default()))
    }

    fn new(driver: Arc<dyn Driver>) -> Self {
        let kernels = if driver.has_warp_groups() { Kernels::WarpGroups } else { Kernels::Common };
        Self { driver, choice: Choice { kernels, invariant: false } }
    }

    fn with(&self, choice: Choice) -> Self {
        Self { driver: self.driver.clone(), choice }
    }

    /// The same GPU, on which what comes of a row has the same bits whatever rows stand beside it, and however a sequence
    /// is cut into steps: every algorithm is chosen without regard to their number. That costs speed.
    #[must_use]
    pub fn invariant(&self) -> Self {
        self.with(Choice { invariant: true, ..self.choice })
    }

    /// Whether it is.
    pub fn is_invariant(&self) -> bool {
        self.choice.invariant
    }

    /// The same GPU, with none but the kernels that run on every GPU.
    #[must_use]
    pub fn common(&self) -> Self {
        self.with(Choice { kernels: Kernels::Common, ..self.choice })
    }

    /// What it calls itself.
    pub fn name(&self) -> &str {
        self.driver.name()
    }

    /// Its memory now.
    ///
    /// # Errors
    /// [`GpuError::Failed`] if it is lost.
    pub fn memory(&self) -> Result<Memory> {
        self.driver.memory()
    }

    /// Waits until everything is done.
    ///
    /// # Errors
    /// What of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }

    /// Records what `work` asks of this GPU, on this thread, in place of doing it. Arrays must be there already, as
    /// another run of the same work leaves them: memory, copies and waiting cannot be recorded.
    ///
    /// # Errors
    /// What `work` could not do, or what of it cannot be recorded.
    pub fn record<E: From<GpuError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.driver.begin_recording()?;
        let done = catch_unwind(AssertUnwindSafe(work));
        let recording = self.driver.end_recording();
        done.unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok(Graph { recording: recording?, gpu: self.clone() })
    }

    /// Runs a kernel of `cuda/`.
    ///
    /// # Safety
    /// The arguments are what the kernel takes, in number, order and type, and their addresses are those of as much memory
    /// as it uses.
    unsafe fn launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let size = |n: usize| u32::try_from(n).map_err(|_| GpuError::Failed(format!("{kernel}: {n} blocks or more")));
        let grid = [size(grid[0])?, size(grid[1])?, size(grid[2])?];
        // SAFETY: as above.
        unsafe { self.driver.launch(kernel, grid, size(threads)?, size(shared_bytes)?, arguments) }
    }
}

impl Graph {
    /// Asks for everything again, with the same arrays and whatever is in them now. What was checked when it was recorded,
    /// such as pages that a cache must have, is not checked again: that is for the caller to see to. False, with nothing asked for, if one
    /// of the arrays is gone: then it is to be recorded anew.
    ///
    /// # Errors
    /// If the GPU refuses.
    pub fn replay(&self) -> Result<bool> {
        self.gpu.driver.replay(&*self.recording)
    }
}
