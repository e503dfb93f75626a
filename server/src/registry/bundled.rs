//! The models that come with the server: small ones, trained by plumb-train, that are served where no other is named.

use std::fs;

use plumb_model::checkpoint::Source;
use plumb_model::loaded::{LoadOptions, LoadedModel};
use tempfile::TempDir;

use super::memory;
use crate::error::{Error, Result};

/// Sources that begin like this are part of the program.
pub(crate) const PREFIX: &str = "bundled:";
/// Their names: a preference model and a language model.
pub(crate) const NAMES: [&str; 2] = ["pm", "lm"];

/// Files of a model, by name.
type Files = &'static [(&'static str, &'static [u8])];

macro_rules! files {
    ($folder:literal) => {
        &[
            ("config.json", include_bytes!(concat!("../../models/", $folder, "/config.json"))),
            ("chat_template.jinja", include_bytes!(concat!("../../models/", $folder, "/chat_template.jinja"))),
            ("model.safetensors", include_bytes!(concat!("../../models/", $folder, "/model.safetensors"))),
            ("tokenizer.json", include_bytes!(concat!("../../models/", $folder, "/tokenizer.json"))),
            ("tokenizer_config.json", include_bytes!(concat!("../../models/", $folder, "/tokenizer_config.json"))),
        ]
    };
}

/// Loads a model, one of the program's own or any other, if there is memory for it.
pub(super) fn load(source: &Source, options: &LoadOptions) -> Result<LoadedModel> {
    let Some(name) = source.model.strip_prefix(PREFIX) else {
        return load_if_it_fits(source, options);
    };
    let folder = unpack(name)?;
    let path = folder.path().to_string_lossy().into_owned();
    let mut model = load_if_it_fits(&Source { model: path, ..source.clone() }, options)?;
    model.info.source.clone_from(&source.model);
    Ok(model)
}

fn load_if_it_fits(source: &Source, options: &LoadOptions) -> Result<LoadedModel> {
    let footprint = LoadedModel::footprint(source, options)?;
    if let Some(free) = memory::available() {
        footprint.check(free)?;
    }
    Ok(LoadedModel::load(source, options)?)
}

/// A checkpoint is a folder, for as long as it is read.
fn unpack(name: &str) -> Result<TempDir> {
    let files: Files = match name {
        "pm" => files!("pm"),
        "lm" => files!("lm"),
        _ => {
            let message = format!(
                "no model `{PREFIX}{name}`: there are {}",
                NAMES.map(|name| format!("{PREFIX}{name}")).join(" and ")
            );
            return Err(plumb_model::Error::Unsupported(message).into());
        }
    };
    let unpacked = tempfile::tempdir().and_then(|folder| {
        files.iter().try_for_each(|(name, content)| fs::write(folder.path().join(name), content))?;
        Ok(folder)
    });
    unpacked.map_err(|error| Error::internal(format!("unpacking a bundled model into a temporary folder: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use plumb_model::loaded::{DTypeChoice, ModelKind};

    #[test]
    fn what_comes_with_the_server_loads() {
        let options = LoadOptions {
            dtype: DTypeChoice::Auto,
            hhh: Default::default(),
            max_input_tokens: None,
            kv_cache_bytes: 1 << 24,
            background: Default::default(),
        };
        let load = |name: &str| load(&Source { model: format!("{PREFIX}{name}"), ..Source::default() }, &options);
        let kinds = NAMES.map(|name| load(name).unwrap().info.kind);
        assert_eq!(kinds, [ModelKind::Preference, ModelKind::Language]);
        assert_eq!(load("pm").unwrap().info.source, "bundled:pm");
        assert!(load("rm").unwrap_err().to_string().contains("bundled:pm and bundled:lm"));
    }
}
