//! A checkpoint whose files are on this machine.

use plumb_model::checkpoint::Source;
use plumb_model::decoder::StepSize;
use plumb_model::loaded::{LoadOptions, LoadedModel};
use tempfile::TempDir;

use super::{bundled, memory};
use crate::error::Result;

/// Files that can be read, under whatever name they were asked for.
pub(super) struct Local {
    asked: Source,
    files: Source,
    /// A bundled model's, which goes when it is loaded.
    _unpacked: Option<TempDir>,
}

impl Local {
    /// Fetches a repository, which takes as long as the hub likes, and unpacks one of the program's own models.
    ///
    /// # Errors
    /// If there is no such model.
    pub(super) fn new(asked: Source) -> Result<Self> {
        let unpacked = asked.model.strip_prefix(bundled::PREFIX).map(bundled::unpack).transpose()?;
        let files = match &unpacked {
            Some(folder) => {
                let model = folder.path().to_string_lossy().into_owned();
                Source { model, ..asked.clone() }.fetch()?
            }
            None => asked.fetch()?,
        };
        Ok(Self { asked, files, _unpacked: unpacked })
    }

    /// Sets how large its cache is, if its device has memory of its own, which is to do for so many `versions` like it.
    ///
    /// # Errors
    /// What is wrong with its files, as far as headers tell.
    pub(super) fn plan_cache(&self, options: &mut LoadOptions, largest: StepSize, versions: usize) -> Result<()> {
        if let Some(bytes) = LoadedModel::planned_cache(&self.files, options, largest, versions)? {
            options.kv_cache_bytes = bytes;
        }
        Ok(())
    }

    /// Loads it, if there is memory for it and for steps up to the `largest`.
    ///
    /// # Errors
    /// If there is not, or what is wrong with its files.
    pub(super) fn load(self, options: &LoadOptions, largest: StepSize) -> Result<LoadedModel> {
        let footprint = LoadedModel::footprint(&self.files, options, largest)?;
        footprint.check(memory::available(), options.device.free_memory()?)?;
        let mut model = LoadedModel::load(&self.files, options)?;
        model.info.source = self.asked.model;
        model.info.adapter = self.asked.adapter;
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use plumb_model::loaded::{DTypeChoice, ModelKind};

    use super::*;

    #[test]
    fn what_comes_with_the_server_loads() {
        let options = LoadOptions {
            dtype: DTypeChoice::Auto,
            hhh: Default::default(),
            max_input_tokens: None,
            kv_cache_bytes: 1 << 24,
            device: Default::default(),
            background: Default::default(),
        };
        let load = |name: &str| {
            let source = Source { model: format!("{}{name}", bundled::PREFIX), ..Source::default() };
            Local::new(source)?.load(&options, StepSize { tokens: 2048, sequences: 256 })
        };
        let kinds = bundled::NAMES.map(|name| load(name).unwrap().info.kind);
        assert_eq!(kinds, [ModelKind::Preference, ModelKind::Language]);
        assert_eq!(load("pm").unwrap().info.source, "bundled:pm");
        assert!(load("rm").unwrap_err().to_string().contains("bundled:pm and bundled:lm"));
    }
}
