//! Where a decoder computes.

#[cfg(feature = "gpu")]
use plumb_kernels::gpu::{Gpu, Group};

use crate::{Error, Result};

/// Where a decoder computes.
#[derive(Clone, Debug, Default)]
pub enum Device {
    /// The threads of the current rayon pool.
    #[default]
    Cpu,
    /// A GPU.
    #[cfg(feature = "gpu")]
    Gpu(Gpu),
    /// Several, which share a model.
    Split(Split),
}

/// Devices that share a model, see [`Device::split`].
#[derive(Clone, Debug)]
pub struct Split {
    pub(super) devices: Vec<Device>,
    pub(super) name: String,
    /// Of GPUs.
    #[cfg(feature = "gpu")]
    pub(super) group: Option<Group>,
}

/// What devices are, but for which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu,
}

impl Device {
    /// These together, each with a part of a model: tensor parallelism.
    ///
    /// # Errors
    /// [`Error::Device`] if there are none, they are not of one kind, or GPUs cannot be a group, as without NCCL.
    pub fn split(devices: Vec<Self>) -> Result<Self> {
        let kinds = || devices.iter().map(Self::kind);
        if devices.is_empty() || kinds().any(|kind| Some(kind) != kinds().next()) {
            return Err(Error::Device("a model is split over devices of one kind".to_owned()));
        }
        let devices: Vec<Self> = devices.iter().flat_map(Self::parts).cloned().collect();
        let name = devices.iter().map(Self::name).collect::<Vec<_>>().join(" + ");
        #[cfg(feature = "gpu")]
        let group = {
            let gpus = devices.iter().filter_map(|device| match device {
                Self::Gpu(gpu) => Some(gpu.clone()),
                _ => None,
            });
            let gpus: Vec<Gpu> = gpus.collect();
            if gpus.is_empty() { None } else { Some(Group::new(&gpus)?) }
        };
        Ok(Self::Split(Split {
            devices,
            name,
            #[cfg(feature = "gpu")]
            group,
        }))
    }

    /// The devices that share a model, or the only one.
    pub(super) fn parts(&self) -> &[Self] {
        match self {
            Self::Split(split) => &split.devices,
            one => std::slice::from_ref(one),
        }
    }

    /// How many parts of a model the process's memory, or that of the one GPU that holds most, has to hold.
    pub(super) fn in_memory(&self) -> usize {
        if self.is_cpu() { self.parts().len() } else { 1 }
    }

    /// Of so many bytes that the devices share evenly, those in one memory.
    pub(crate) fn share_of(&self, bytes: usize) -> usize {
        bytes / self.parts().len() * self.in_memory()
    }

    /// Of bytes that each of the devices has room for, those that they have together.
    pub(crate) fn over_all(&self, bytes: usize) -> usize {
        bytes.saturating_mul(self.parts().len() / self.in_memory())
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Cpu => Kind::Cpu,
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => Kind::Gpu,
            Self::Split(split) => split.devices.first().map_or(Kind::Cpu, Self::kind),
        }
    }

    /// The GPU of this number.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none, or no driver or cuBLAS for it.
    #[cfg(feature = "cuda")]
    pub fn cuda(number: usize) -> Result<Self> {
        Ok(Self::Gpu(Gpu::cuda(number)?))
    }

    /// A GPU that the CPU plays, for tests.
    #[cfg(feature = "emulated")]
    pub fn emulated() -> Self {
        Self::Gpu(Gpu::emulated())
    }

    /// Whether it is the CPU.
    pub fn is_cpu(&self) -> bool {
        self.kind() == Kind::Cpu
    }

    /// What it calls itself.
    pub fn name(&self) -> &str {
        match self {
            Self::Cpu => "CPU",
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => gpu.name(),
            Self::Split(split) => &split.name,
        }
    }

    /// Bytes of its own memory that are free, of several where the fewest are; `None` if it has none of its own.
    ///
    /// # Errors
    /// [`Error::Device`] if it is lost.
    pub fn free_memory(&self) -> Result<Option<u64>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => Ok(Some(gpu.memory()?.free as u64)),
            Self::Split(split) => {
                let free = split.devices.iter().map(Self::free_memory).collect::<Result<Vec<_>>>()?;
                Ok(free.into_iter().flatten().min())
            }
        }
    }

    /// All bytes of its own memory, of several where they are the fewest; `None` if it has none of its own.
    ///
    /// # Errors
    /// [`Error::Device`] if it is lost.
    pub fn total_memory(&self) -> Result<Option<u64>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => Ok(Some(gpu.memory()?.total as u64)),
            Self::Split(split) => {
                let total = split.devices.iter().map(Self::total_memory).collect::<Result<Vec<_>>>()?;
                Ok(total.into_iter().flatten().min())
            }
        }
    }

    /// The same, with results that do not depend on what stands beside, as a CPU's never do, see
    /// `Gpu::invariant` of plumb-kernels. Sums over more than two GPUs may still, in their last bits.
    #[must_use]
    pub fn invariant(&self) -> Self {
        match self {
            Self::Cpu => Self::Cpu,
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => Self::Gpu(gpu.invariant()),
            Self::Split(split) => {
                let devices = split.devices.iter().map(Self::invariant).collect();
                Self::Split(Split { devices, ..split.clone() })
            }
        }
    }
}
