//! The models that come with the server: small ones, trained by plumb-train, that are served where no other is named.

use std::fs;

use tempfile::TempDir;

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

/// A checkpoint is a folder, for as long as it is read.
pub(super) fn unpack(name: &str) -> Result<TempDir> {
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
