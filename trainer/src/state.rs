//! What a run needs to go on where it was: weights, the optimiser's memory and the number of steps.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use plumb_model::decoder::Device;
use plumb_model::decoder::gradient::Numbers;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::{Error, Result};

/// States that are kept.
const KEPT: usize = 2;
const NAMES: [&str; 3] = ["weights", "mean", "square"];

/// Weights and the optimiser's memory after a number of steps.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) step: u64,
    pub(crate) weights: Numbers,
    /// Running mean of gradients, and of their squares.
    pub(crate) mean: Numbers,
    pub(crate) square: Numbers,
}

impl State {
    /// In the memory of the process, as all that is read.
    pub(crate) fn new(weights: Vec<f32>) -> Result<Self> {
        let weights = Numbers::new(weights, &Device::Cpu)?;
        Ok(Self { step: 0, mean: weights.zeros()?, square: weights.zeros()?, weights })
    }

    /// The same on a device.
    pub(crate) fn on(self, device: &Device) -> Result<Self> {
        let Self { step, weights, mean, square } = self;
        Ok(Self { step, weights: weights.on(device)?, mean: mean.on(device)?, square: square.on(device)? })
    }

    /// Writes it into the folder of states, whole or not at all, and removes the oldest ones.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(file_name(self.step));
        let unfinished = path.with_extension("unfinished");
        let wrong = |error: safetensors::SafeTensorError| Error::Malformed {
            path: unfinished.clone(),
            reason: error.to_string(),
        };
        let arrays = [self.weights.to_host()?, self.mean.to_host()?, self.square.to_host()?];
        let views = NAMES.into_iter().zip(&arrays).map(|(name, values)| {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            Ok((name, TensorView::new(Dtype::F32, vec![values.len()], bytes)?))
        });
        let views: Vec<_> = views.collect::<std::result::Result<_, _>>().map_err(wrong)?;
        let metadata = HashMap::from([("step".to_owned(), self.step.to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &unfinished).map_err(wrong)?;
        fs::File::open(&unfinished).and_then(|file| file.sync_all()).map_err(Error::io(&unfinished))?;
        fs::rename(&unfinished, &path).map_err(Error::io(&path))?;
        let mut old = saved(folder)?;
        old.truncate(old.len().saturating_sub(KEPT));
        for (_, path) in old {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        Ok(())
    }

    /// The last one of the folder, if it holds any, for a decoder of so many weights.
    pub(crate) fn last(folder: &Path, weights: usize) -> Result<Option<Self>> {
        if !folder.is_dir() {
            return Ok(None);
        }
        let Some((step, path)) = saved(folder)?.pop() else { return Ok(None) };
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let wrong = |reason: String| Error::Malformed { path: path.clone(), reason };
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
        let mut arrays = NAMES.into_iter().map(|name| {
            let tensor = tensors.tensor(name).map_err(|error| wrong(error.to_string()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [weights] {
                return Err(wrong(format!(
                    "`{name}` is {:?} of {:?}, not F32 of {weights}",
                    tensor.shape(),
                    tensor.dtype()
                )));
            }
            let (numbers, _) = tensor.data().as_chunks::<4>();
            let values = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            Ok(Numbers::new(values, &Device::Cpu)?)
        });
        let mut next = || arrays.next().unwrap_or_else(|| Err(wrong("it holds too little".to_owned())));
        Ok(Some(Self { step, weights: next()?, mean: next()?, square: next()? }))
    }
}

fn file_name(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// Saved states, the oldest first.
fn saved(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = name.strip_prefix("step-").and_then(|rest| rest.strip_suffix(".safetensors"));
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_state_comes_back_and_the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("states");
        assert!(State::last(&folder, 3).unwrap().is_none());
        let mut state = State::new(vec![1.0, -0.0, f32::MIN_POSITIVE]).unwrap();
        for step in [10, 20, 100] {
            state.step = step;
            state.mean.host_mut().unwrap()[1] = step as f32;
            state.save(&folder).unwrap();
        }
        // What a killed process leaves is not a state.
        fs::write(folder.join("step-00000200.unfinished"), "half").unwrap();
        let last = State::last(&folder, 3).unwrap().unwrap();
        assert_eq!(last.step, 100);
        for (found, expected) in
            [(&last.weights, &state.weights), (&last.mean, &state.mean), (&last.square, &state.square)]
        {
            assert_eq!(found.to_host().unwrap(), expected.to_host().unwrap());
        }
        assert_eq!(saved(&folder).unwrap().iter().map(|(step, _)| *step).collect::<Vec<_>>(), [20, 100]);
        assert!(State::last(&folder, 4).unwrap_err().to_string().contains("[3]"));
    }
}
