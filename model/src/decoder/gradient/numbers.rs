//! Lists of numbers as long as that of the weights, where a decoder computes.

use std::borrow::Cow;

#[cfg(feature = "gpu")]
use plumb_kernels::gpu::{Buffer, Gpu};
use plumb_kernels::gradient::sum_of_squares;

use super::super::Device;
use crate::{Error, Result};

/// Numbers such as weights, their gradient, and what an optimiser remembers of it: in the memory of the process, or in
/// that of a GPU.
#[derive(Debug)]
pub struct Numbers(pub(in super::super) Place);

#[derive(Debug)]
pub(in super::super) enum Place {
    Host(Vec<f32>),
    #[cfg(feature = "gpu")]
    Gpu(Gpu, Buffer<f32>),
}

impl Numbers {
    /// These values, there.
    ///
    /// # Errors
    /// If a GPU has no memory for them.
    pub fn new(values: Vec<f32>, device: &Device) -> Result<Self> {
        Ok(Self(match device {
            Device::Cpu => Place::Host(values),
            #[cfg(feature = "gpu")]
            Device::Gpu(gpu) => Place::Gpu(gpu.clone(), gpu.upload(&values)?),
            Device::Split(_) => return Err(not_split()),
        }))
    }

    /// As many zeros, in the same place.
    ///
    /// # Errors
    /// If a GPU has no memory for them.
    pub fn zeros(&self) -> Result<Self> {
        Ok(Self(match &self.0 {
            Place::Host(values) => Place::Host(vec![0.0; values.len()]),
            #[cfg(feature = "gpu")]
            Place::Gpu(gpu, values) => Place::Gpu(gpu.clone(), gpu.zeros(values.len())?),
        }))
    }

    /// The same on a device.
    ///
    /// # Errors
    /// If a GPU has no memory for them, or has failed.
    pub fn on(self, device: &Device) -> Result<Self> {
        match self.0 {
            Place::Host(values) => Self::new(values, device),
            #[cfg(feature = "gpu")]
            Place::Gpu(_, values) => Self::new(values.to_vec()?, device),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Host(values) => values.len(),
            #[cfg(feature = "gpu")]
            Place::Gpu(_, values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In the memory of the process: a copy, if they are not there.
    ///
    /// # Errors
    /// If a GPU has failed.
    pub fn to_host(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match &self.0 {
            Place::Host(values) => Cow::Borrowed(values),
            #[cfg(feature = "gpu")]
            Place::Gpu(_, values) => Cow::Owned(values.to_vec()?),
        })
    }

    /// Those in the memory of the process; `None` if they are elsewhere.
    pub fn host_mut(&mut self) -> Option<&mut [f32]> {
        match &mut self.0 {
            Place::Host(values) => Some(values),
            #[cfg(feature = "gpu")]
            Place::Gpu(..) => None,
        }
    }

    /// Takes those that `set` puts in the place of numbers of which nothing is said.
    ///
    /// # Errors
    /// If a GPU has failed.
    pub fn replace(&mut self, set: impl FnOnce(&mut [f32])) -> Result<()> {
        match &mut self.0 {
            Place::Host(values) => set(values),
            #[cfg(feature = "gpu")]
            Place::Gpu(_, values) => {
                let mut new = vec![0.0; values.len()];
                set(&mut new);
                values.write(0, &new)?;
            }
        }
        Ok(())
    }

    /// All become 0.
    ///
    /// # Errors
    /// If a GPU has failed.
    pub fn clear(&mut self) -> Result<()> {
        match &mut self.0 {
            Place::Host(values) => values.fill(0.0),
            #[cfg(feature = "gpu")]
            Place::Gpu(gpu, values) => gpu.fill(values.all_mut(), 0.0)?,
        }
        Ok(())
    }

    /// The sum of their squares.
    ///
    /// # Errors
    /// If a GPU has failed.
    pub fn sum_of_squares(&self) -> Result<f64> {
        Ok(match &self.0 {
            Place::Host(values) => sum_of_squares(values),
            #[cfg(feature = "gpu")]
            Place::Gpu(gpu, values) => gpu.sum_of_squares(values.all())?,
        })
    }
}

/// For numbers that are not where they are needed.
pub(in super::super) fn elsewhere() -> Error {
    Error::InvalidInput("numbers of a decoder are not on the device on which it computes".into())
}

/// Models are served by several devices, but not trained.
pub(super) fn not_split() -> Error {
    Error::Device("a model is trained on one device; train in several processes to use more of them".to_owned())
}
