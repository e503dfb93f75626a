//! Checkpoints: what a folder, a GGUF file or a Hugging Face repository holds, checked and ready to be taken.
//!
//! [`Checkpoint::open`] finds the files (`hub` fetches them), verifies a [`manifest`] where there is one, parses the
//! configuration (`hf_config`), the tokenizer and the headers of the weights (`safetensors`, `gguf`), and puts an
//! adapter (`lora`) on top. [`Weights`] then gives out each tensor once, and refuses to end while one is left.
//!
//! Nothing here knows what a decoder does with the tensors.

mod fields;
mod gguf;
mod gguf_blocks;
mod gguf_header;
mod gguf_tensors;
mod gguf_tokenizer;
mod hf_config;
mod hf_rope;
mod hub;
mod lora;
pub mod manifest;
mod probe;
mod publish;
mod read;
mod safetensors;
mod tokenizer;
mod tokenizer_json;
mod tokenizer_regex;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use tokenizers::Tokenizer;

use self::fields::{Fields, read_json};
use self::hf_config::Holdings;
use self::hub::Hub;
use self::lora::Adapter;
use self::manifest::{Manifest, Probe};
pub(crate) use self::read::Reader;
use self::safetensors::Safetensors;
pub use self::tokenizer::SpecialTokens;
use self::tokenizer::TextParts;
pub(crate) use self::weights::Foreseen;
use self::weights::TensorStore;
pub use self::weights::{Stored, Weights};
use crate::config::Config;
use crate::{Error, Result};

const CONFIG: &str = "config.json";

/// What the user named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// A folder, a `.gguf` file, or the id of a Hugging Face repository, `org/name`.
    pub model: String,
    /// A LoRA adapter to merge: a folder or a repository id.
    pub adapter: Option<String>,
    /// A branch, tag or commit of the model's repository; `main` without it.
    pub revision: Option<String>,
}

/// A model as it was saved: its description, and its weights still on disk.
pub struct Checkpoint {
    /// The decoder and its head.
    pub config: Config,
    /// The tensors, by Hugging Face names.
    pub weights: Weights,
    /// Text to token ids; neither pads nor truncates.
    pub tokenizer: Tokenizer,
    /// Its special tokens.
    pub special: SpecialTokens,
    /// The Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// Type of the linear weights: F32, BF16 or F16; for a quantised GGUF file BF16, the type to compute in.
    pub stored_dtype: DType,
    /// Hex sha256 of a line `name\0sha256\n` for every file that was read (configuration, tokenizer, weights, adapter),
    /// in the order of the names; an adapter's names begin with `adapter/`.
    pub files_digest: String,
    /// Where it came from.
    pub source: Source,
    /// The folder that it was found in; unset for a file.
    pub folder: Option<PathBuf>,
    /// Those of its manifest; none with an adapter, which changes the scores.
    pub probes: Vec<Probe>,
}

impl Checkpoint {
    /// Opens a checkpoint. Files are hashed, headers and configuration are read and checked; tensors are not read.
    ///
    /// # Errors
    /// What is missing, damaged or not served is named, with what was expected.
    pub fn open(source: &Source) -> Result<Self> {
        Self::open_with(source, &Reader::default())
    }

    pub(crate) fn open_with(source: &Source, reader: &Reader) -> Result<Self> {
        let Places { base, adapter } = Places::find(source)?;
        let manifest = match &base {
            Location::Folder(folder) => Manifest::read(folder)?,
            Location::Gguf(_) => None,
        };
        let files_digest = files_digest(&base, manifest.as_ref(), adapter.as_deref(), reader)?;
        let opened_adapter = adapter.as_deref().map(|folder| Adapter::open(folder, reader)).transpose()?;
        let Base { config, store, mut text } = match &base {
            Location::Folder(folder) => open_folder(folder, opened_adapter.as_ref(), reader)?,
            Location::Gguf(path) => open_gguf(path, opened_adapter.as_ref(), reader)?,
        };
        if let Some(folder) = &adapter {
            text.override_from(folder)?;
        }
        text.check_vocabulary(config.vocab_size)?;
        let (weights, stored_dtype) = weights(&config, store, opened_adapter)?;
        let probes =
            manifest.filter(|_| adapter.is_none()).map_or_else(Vec::new, |manifest| manifest.probes().to_vec());
        Ok(Self {
            probes,
            config,
            weights,
            tokenizer: text.tokenizer,
            special: text.special,
            chat_template: text.chat_template,
            stored_dtype,
            files_digest,
            source: source.clone(),
            folder: match base {
                Location::Folder(folder) => Some(folder),
                Location::Gguf(_) => None,
            },
        })
    }
}

/// What the headers of a checkpoint say: nothing is hashed, and no tensor may be taken for what it should be.
pub(crate) struct Headers {
    pub(crate) config: Config,
    pub(crate) weights: Weights,
    pub(crate) stored_dtype: DType,
    /// Bytes of the tokenizer; 0 for that of a GGUF file, which is part of its header.
    pub(crate) tokenizer_bytes: u64,
}

impl Headers {
    pub(crate) fn read(source: &Source) -> Result<Self> {
        let Places { base, adapter } = Places::find(source)?;
        let reader = &Reader::default();
        let adapter = adapter.as_deref().map(|folder| Adapter::open(folder, reader)).transpose()?;
        let (config, store, tokenizer_bytes) = match &base {
            Location::Folder(folder) => {
                let (config, store) = read_folder(folder, adapter.as_ref(), reader)?;
                let tokenizer = std::fs::metadata(folder.join(tokenizer::TOKENIZER));
                (config, store, tokenizer.map_or(0, |metadata| metadata.len()))
            }
            Location::Gguf(path) => {
                let Base { config, store, .. } = open_gguf(path, adapter.as_ref(), reader)?;
                (config, store, 0)
            }
        };
        let (weights, stored_dtype) = weights(&config, store, adapter)?;
        Ok(Self { config, weights, stored_dtype, tokenizer_bytes })
    }
}

fn weights(config: &Config, store: Box<dyn TensorStore>, adapter: Option<Adapter>) -> Result<(Weights, DType)> {
    let mut weights = Weights::new(store, adapter);
    weights.configure(config);
    let dtype = weights.dtype();
    let unsupported = || Error::Unsupported("weights that are not F32, F16, BF16 or quantised GGUF".to_owned());
    Ok((weights, dtype.ok_or_else(unsupported)?))
}

/// What the `config.json` of a folder describes, whose weights may not be there yet.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn read_config(folder: &Path) -> Result<Config> {
    let path = folder.join(CONFIG);
    hf_config::parse(&path, &read_json(&path)?, &Holdings { store: None, adapter: None })
}

impl Source {
    /// The same, with every repository's files fetched and the repository replaced by their folder.
    ///
    /// # Errors
    /// If there is no such folder, file or repository, or it cannot be fetched.
    pub fn fetch(&self) -> Result<Self> {
        let Places { base, adapter } = Places::find(self)?;
        let (Location::Folder(base) | Location::Gguf(base)) = base;
        let name = |path: PathBuf| {
            let name = path.into_os_string().into_string();
            name.map_err(|path| Error::Unsupported(format!("a path that is not UTF-8: {}", path.display())))
        };
        Ok(Self { model: name(base)?, adapter: adapter.map(name).transpose()?, revision: None })
    }
}

/// Where a source turned out to be, its adapter included.
struct Places {
    base: Location,
    adapter: Option<PathBuf>,
}

impl Places {
    fn find(source: &Source) -> Result<Self> {
        let base = locate(&source.model, source.revision.as_deref())?;
        let adapter = source.adapter.as_deref().map(locate_adapter).transpose()?;
        Ok(Self { base, adapter })
    }
}

#[derive(Debug)]
enum Location {
    Folder(PathBuf),
    Gguf(PathBuf),
}

fn locate(name: &str, revision: Option<&str>) -> Result<Location> {
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(Location::Folder(path.to_owned()));
    }
    if path.is_file() {
        return match path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            true => Ok(Location::Gguf(path.to_owned())),
            false => Err(Error::Unsupported(format!("the file {name}; name a folder or a .gguf file"))),
        };
    }
    if is_repository_id(name) {
        return Ok(Location::Folder(Hub::from_env()?.fetch(name, revision)?));
    }
    let what = "a folder or .gguf file (a Hugging Face repository is written `org/name`)".to_owned();
    Err(Error::MissingFile { path: path.to_owned(), what })
}

fn locate_adapter(name: &str) -> Result<PathBuf> {
    match locate(name, None)? {
        Location::Folder(folder) if folder.join(lora::CONFIG).is_file() => Ok(folder),
        Location::Folder(path) => {
            Err(Error::MissingFile { path, what: format!("`{}`, which makes a folder an adapter,", lora::CONFIG) })
        }
        Location::Gguf(_) => Err(Error::Unsupported(format!("the adapter {name}; adapters are folders"))),
    }
}

/// `org/name`, of the characters that the hub allows.
fn is_repository_id(name: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    name.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name))
}

/// Hashes what will be read, and checks it against the manifests.
fn files_digest(
    base: &Location,
    manifest: Option<&Manifest>,
    adapter: Option<&Path>,
    reader: &Reader,
) -> Result<String> {
    let mut digests = match base {
        Location::Folder(folder) => {
            let mut files = safetensors::weight_files(&with_config(folder)?)?;
            files.push(CONFIG.to_owned());
            files.extend(tokenizer::files(folder));
            manifest::verified_digests(folder, manifest, &files, reader)?
        }
        Location::Gguf(path) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            BTreeMap::from([(name, reader.digest(path)?)])
        }
    };
    if let Some(folder) = adapter {
        let mut files = vec![lora::CONFIG.to_owned(), lora::weight_file(folder)?];
        files.extend(tokenizer::files(folder));
        let found = manifest::verified_digests(folder, Manifest::read(folder)?.as_ref(), &files, reader)?;
        digests.extend(found.into_iter().map(|(name, digest)| (format!("adapter/{name}"), digest)));
    }
    Ok(manifest::combined(&digests))
}

/// The folder, if it is that of a model.
fn with_config(folder: &Path) -> Result<PathBuf> {
    if folder.join(CONFIG).is_file() {
        return Ok(folder.to_owned());
    }
    let what = match folder.join(lora::CONFIG).is_file() {
        true => format!(
            "`{CONFIG}` (the folder holds an adapter: name the model that it was trained on, and this folder as its \
             adapter)"
        ),
        false => format!("`{CONFIG}`"),
    };
    Err(Error::MissingFile { path: folder.to_owned(), what })
}

/// What lies under an adapter.
struct Base {
    config: Config,
    store: Box<dyn TensorStore>,
    text: TextParts,
}

fn open_folder(folder: &Path, adapter: Option<&Adapter>, reader: &Reader) -> Result<Base> {
    let path = folder.join(CONFIG);
    let text = tokenizer::read_folder(folder, &Fields::new(&path, &read_json(&path)?)?)?;
    let (config, store) = read_folder(folder, adapter, reader)?;
    Ok(Base { config, store, text })
}

/// All but the text.
fn read_folder(folder: &Path, adapter: Option<&Adapter>, reader: &Reader) -> Result<(Config, Box<dyn TensorStore>)> {
    let path = with_config(folder)?.join(CONFIG);
    let json = read_json(&path)?;
    let store = Safetensors::open_folder(folder, &safetensors::weight_files(folder)?, reader)?;
    let config = hf_config::parse(&path, &json, &Holdings { store: Some(&store), adapter })?;
    Ok((config, Box::new(store)))
}

fn open_gguf(path: &Path, adapter: Option<&Adapter>, reader: &Reader) -> Result<Base> {
    let gguf = gguf::open(path, &Holdings { store: None, adapter }, reader)?;
    Ok(Base { config: gguf.config, store: Box::new(gguf.tensors), text: gguf.text })
}
