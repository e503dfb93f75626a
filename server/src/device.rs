//! The devices on which models compute, and an engine for each, or for several that share models.

use std::collections::BTreeMap;

use plumb_model::decoder::{self, Device};
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
    /// Numbers of the GPUs.
    gpus: Vec<usize>,
}

/// Where all models compute.
pub(crate) struct Places {
    default: Place,
    models: BTreeMap<String, Place>,
}

impl Places {
    /// Opens the devices, each once, to be invariant or not, and starts their engines.
    ///
    /// # Errors
    /// If a GPU was named that is not there, or that this program was not built for, or if more of them than can be
    /// invariant are to share a model.
    pub(crate) fn open(devices: &Devices, invariant: bool, options: EngineOptions) -> Result<Self> {
        let mut opener = Opener { options, invariant, gpus: BTreeMap::new(), places: Vec::new() };
        let default = opener.place(&devices.default)?;
        let models = devices.models.iter().map(|(name, choice)| Ok((name.clone(), opener.place(choice)?)));
        Ok(Self { models: models.collect::<Result<_>>()?, default })
    }

    /// That of a model.
    pub(crate) fn of(&self, model: &str) -> &Place {
        self.models.get(model).unwrap_or(&self.default)
    }

    /// How many of some models compute on a GPU on which this one does.
    pub(crate) fn beside(&self, model: &str, models: &[String]) -> usize {
        let here = &self.of(model).gpus;
        models.iter().filter(|other| self.of(other).gpus.iter().any(|gpu| here.contains(gpu))).count()
    }

    /// Tells when an engine is lost.
    pub(crate) fn lost(&self) -> watch::Receiver<Option<Loss>> {
        self.default.engine.lost()
    }
}

struct Opener {
    options: EngineOptions,
    invariant: bool,
    gpus: BTreeMap<usize, Device>,
    /// Of the CPU without GPUs.
    places: Vec<Place>,
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
        if let Some(place) = self.places.iter().find(|place| place.gpus == numbers) {
            return Ok(place.clone());
        }
        // NCCL sums in an order that depends on how much there is, which makes no difference to the sum of two.
        if self.invariant && numbers.len() > 2 {
            return Err(Error::failed_precondition(format!(
                "--batch-invariant is not kept by sums over {} GPUs; share a model between two at most (--device), or \
                 leave it out",
                numbers.len()
            )));
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
            Some(first) => first.engine.start_beside(options)?,
            None => Engine::start(options)?,
        };
        let place = Place { engine, device, gpus: numbers };
        self.places.push(place.clone());
        Ok(place)
    }

    fn gpu(&mut self, number: usize) -> Result<Device, String> {
        if let Some(device) = self.gpus.get(&number) {
            return Ok(device.clone());
        }
        let device = if self.invariant { gpu(number)?.invariant() } else { gpu(number)? };
        self.gpus.insert(number, device.clone());
        Ok(device)
    }
}

fn gpu(number: usize) -> Result<Device, String> {
    let opened = decoder::DeviceChoice::Cuda(number).open(number, env!("CARGO_PKG_NAME"));
    opened.map(|(device, _)| device).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const OPTIONS: EngineOptions = EngineOptions {
        max_batch_tokens: 64,
        max_batch_sequences: 4,
        max_prefill_beside_decode: 64,
        decode_share: 0.5,
        prefix_cache: true,
        threads: 1,
        stall_timeout: Duration::from_secs(60),
    };

    #[test]
    fn models_on_one_device_share_an_engine() {
        let mut opener = Opener { options: OPTIONS, invariant: true, gpus: BTreeMap::new(), places: Vec::new() };
        for _ in 0..2 {
            assert!(opener.place(&DeviceChoice::Cpu).unwrap().device.is_cpu());
        }
        assert_eq!(opener.places.len(), 1);
        let error = opener.place(&DeviceChoice::Cuda(vec![999])).unwrap_err().to_string();
        assert!(error.contains("GPU") || error.contains("without CUDA"), "{error}");
        let error = opener.place(&DeviceChoice::Cuda(vec![0, 1, 2])).unwrap_err().to_string();
        assert!(error.contains("--batch-invariant") && error.contains("3 GPUs"), "{error}");
    }

    #[test]
    fn models_are_beside_those_with_which_they_have_a_gpu_in_common() {
        let engine = Engine::start(OPTIONS).unwrap();
        let on = |gpus: &[usize]| Place { engine: engine.clone(), device: Device::Cpu, gpus: gpus.to_vec() };
        let models = [("a", on(&[0, 1])), ("b", on(&[1])), ("c", on(&[2])), ("d", on(&[]))];
        let models = models.map(|(name, place)| (name.to_owned(), place));
        let places = Places { default: on(&[0]), models: models.into() };
        let all = ["a", "b", "c", "d", "e"].map(str::to_owned);
        let beside = ["a", "b", "c", "d", "e", "other"].map(|name| places.beside(name, &all));
        assert_eq!(beside, [3, 2, 1, 0, 2, 2]);
    }
}
