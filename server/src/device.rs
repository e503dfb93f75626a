//! The devices on which models compute, and an engine for each, or for several that share models.

use std::collections::BTreeMap;

use plumb_model::decoder::Device;
use tokio::sync::watch;

use crate::config::{DeviceChoice, Devices};
use crate::engine::{Engine, EngineOptions, Loss};
use crate::error::{Error, Result};
use crate::telemetry::events::Computing;

/// Where a model computes.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) engine: Engine,
    pub(crate) device: Device,
}

/// Where all models compute.
pub(crate) struct Places {
    default: Place,
    models: BTreeMap<String, Place>,
}

impl Places {
    /// Opens the devices, each once, and starts their engines.
    ///
    /// # Errors
    /// If a GPU was named that is not there, or that this program was not built for.
    pub(crate) fn open(devices: &Devices, options: EngineOptions) -> Result<Self> {
        let mut opener = Opener { options, gpus: BTreeMap::new(), places: Vec::new() };
        let default = opener.place(&devices.default)?;
        let models = devices.models.iter().map(|(name, choice)| Ok((name.clone(), opener.place(choice)?)));
        Ok(Self { models: models.collect::<Result<_>>()?, default })
    }

    /// That of a model.
    pub(crate) fn of(&self, model: &str) -> &Place {
        self.models.get(model).unwrap_or(&self.default)
    }

    /// Tells when an engine is lost.
    pub(crate) fn lost(&self) -> watch::Receiver<Option<Loss>> {
        self.default.engine.lost()
    }
}

struct Opener {
    options: EngineOptions,
    gpus: BTreeMap<usize, Device>,
    /// By the numbers of their GPUs: none for the CPU.
    places: Vec<(Vec<usize>, Place)>,
}

impl Opener {
    fn place(&mut self, choice: &DeviceChoice) -> Result<Place> {
        let (numbers, reason) = match choice {
            DeviceChoice::Cpu => (Vec::new(), None),
            DeviceChoice::Cuda(numbers) => (numbers.clone(), None),
            DeviceChoice::Auto => match self.gpu(0) {
                Ok(_) => (vec![0], None),
                Err(reason) => (Vec::new(), Some(reason)),
            },
        };
        if let Some((_, place)) = self.places.iter().find(|(of, _)| *of == numbers) {
            return Ok(place.clone());
        }
        let gpus = numbers.iter().map(|number| self.gpu(*number));
        let mut gpus = gpus.collect::<Result<Vec<_>, _>>().map_err(Error::failed_precondition)?;
        let device = match gpus.len() {
            0 => Device::Cpu,
            1 => gpus.remove(0),
            _ => Device::split(gpus).map_err(|error| Error::failed_precondition(error.to_string()))?,
        };
        Computing { device: &device, reason }.emit();
        // A GPU is asked by one.
        let options = EngineOptions { threads: if device.is_cpu() { self.options.threads } else { 1 }, ..self.options };
        let engine = match self.places.first() {
            Some((_, first)) => first.engine.start_beside(options)?,
            None => Engine::start(options)?,
        };
        let place = Place { engine, device };
        self.places.push((numbers, place.clone()));
        Ok(place)
    }

    fn gpu(&mut self, number: usize) -> Result<Device, String> {
        if let Some(device) = self.gpus.get(&number) {
            return Ok(device.clone());
        }
        let device = gpu(number)?;
        self.gpus.insert(number, device.clone());
        Ok(device)
    }
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> Result<Device, String> {
    Device::cuda(number).map_err(|error| error.to_string())
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> Result<Device, String> {
    Err("this plumb-server was built without CUDA (cargo build --features plumb-server/cuda)".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn models_on_one_device_share_an_engine() {
        let options = EngineOptions {
            max_batch_tokens: 64,
            max_batch_sequences: 4,
            max_prefill_beside_decode: 64,
            decode_share: 0.5,
            prefix_cache: true,
            threads: 1,
            stall_timeout: Duration::from_secs(60),
        };
        let mut opener = Opener { options, gpus: BTreeMap::new(), places: Vec::new() };
        for _ in 0..2 {
            assert!(opener.place(&DeviceChoice::Cpu).unwrap().device.is_cpu());
        }
        assert_eq!(opener.places.len(), 1);
        let error = opener.place(&DeviceChoice::Cuda(vec![999])).unwrap_err().to_string();
        assert!(error.contains("GPU") || error.contains("without CUDA"), "{error}");
    }
}
