//! What a checkpoint is, and how it becomes a version.

use std::fmt;
use std::path::{Path, PathBuf};

use plumb_model::Error;
use plumb_model::checkpoint::{Source, manifest};
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel, ModelInfo, ModelKind};

use crate::{Probes, Result, card};

/// What a checkpoint is. Displayed as a table of names and values.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// What was found in it, with the type `auto` and the whole context.
    pub info: ModelInfo,
    /// sha256 of the chat template in hexadecimal, where there is one.
    pub chat_template_sha256: Option<String>,
    /// How many probes its manifest has.
    pub probes: usize,
}

/// Loads a checkpoint and tells what it is.
///
/// # Errors
/// Whatever makes a server refuse it.
pub fn inspect(source: &Source) -> Result<Inspection> {
    Ok(Inspection::of(load(source)?))
}

fn load(source: &Source) -> Result<LoadedModel> {
    let options = LoadOptions {
        dtype: DTypeChoice::Auto,
        hhh: Default::default(),
        max_input_tokens: None,
        // Only counted here, never taken: no limit but the model's own.
        kv_cache_bytes: usize::MAX,
        device: Default::default(),
        background: Background::default(),
    };
    Ok(LoadedModel::load(source, &options)?)
}

impl Inspection {
    fn of(model: LoadedModel) -> Self {
        let chat_template_sha256 = model.text.chat_template_sha256().map(str::to_owned);
        Self { chat_template_sha256, probes: model.probes.len(), info: model.info }
    }
}

/// A version that was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// `<root>/<model>/<version>`.
    pub folder: PathBuf,
    /// The digest that a server reports for it with the type `auto`.
    pub weights_digest: String,
    /// How many scores the manifest has, for whoever loads it to compare.
    pub probes: usize,
}

/// Copies the folder of a checkpoint that loads to `<root>/<model>/<version>/`, whole or not at all. Without a `version`
/// it becomes the one after the highest there, or 1.
///
/// A model card is written beside the copies, with the scores of `results`, which are files of `plumb-train evaluate`; a
/// card that somebody else wrote stays as it is. The manifest gets the scores of `probes`.
///
/// # Errors
/// If the checkpoint does not load or score, the name is none for a folder, the version exists, or the results make no sense, are
/// another model's or have no card to stand in; nothing is published then.
pub fn publish(
    folder: &Path,
    root: &Path,
    model: &str,
    version: Option<u64>,
    results: &[PathBuf],
    probes: &Probes,
) -> Result<Published> {
    // Anything else would be taken for a file or a repository, neither of which has a folder to copy.
    let name = match folder.to_str() {
        Some(name) if folder.is_dir() => name.to_owned(),
        _ => {
            let what = "a folder with a checkpoint".to_owned();
            return Err(Error::MissingFile { path: folder.to_owned(), what }.into());
        }
    };
    let loaded = load(&Source { model: name, ..Source::default() })?;
    let probes = probes.record(&loaded)?;
    let Inspection { info, chat_template_sha256, .. } = Inspection::of(loaded);
    let card = card::for_publishing(folder, model, &info, chat_template_sha256.is_some(), results)?;
    let added: Vec<(&str, &str)> = card.iter().map(|text| (card::CARD, &text[..])).collect();
    let folder = manifest::publish(folder, root, model, version, &added, &probes)?;
    Ok(Published { folder, weights_digest: info.weights_digest, probes: probes.len() })
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { info, chat_template_sha256, probes } = self;
        let (kind, head) = match (info.kind, &info.reward_head, info.normalization) {
            (ModelKind::Language, ..) => ("language", "vocabulary".to_owned()),
            (ModelKind::Preference, Some(head), Some((mean, std))) => {
                ("preference", format!("{head}, normalised by mean {mean} and std {std}"))
            }
            (ModelKind::Preference, head, _) => ("preference", head.clone().unwrap_or_default()),
        };
        let rows = [
            ("source", info.source.clone()),
            ("architecture", info.architecture.clone()),
            ("kind", kind.to_owned()),
            ("head", head),
            ("dtype", info.dtype.to_owned()),
            ("parameters", info.parameters.to_string()),
            ("vocabulary", info.vocab_size.to_string()),
            ("context", info.max_input_tokens.to_string()),
            ("chat template", chat_template_sha256.clone().unwrap_or_else(|| "none".to_owned())),
            ("probes", probes.to_string()),
            ("digest", info.weights_digest.clone()),
        ];
        for (name, value) in rows {
            writeln!(f, "{name:<15}{value}")?;
        }
        Ok(())
    }
}
