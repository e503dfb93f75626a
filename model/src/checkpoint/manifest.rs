//! `manifest.json`: the sha256 of every file of a published version, and probes with their scores.
//!
//! A version folder is complete when its manifest is there; [`publish`] says how one comes to be. What a manifest lists
//! are plain files of its own folder: neither links nor devices, which could lead a reader anywhere, or never end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use super::probe::{Probe, ProbeInput};
pub use super::publish::publish;
use super::read::{self, Reader};
use crate::{Error, Result};

/// Name of the manifest's file.
pub const MANIFEST: &str = "manifest.json";

/// The most probes that a manifest holds: all are computed whenever the version is loaded.
pub const MOST_PROBES: usize = 64;

/// The only layout there has been.
const FORMAT: u32 = 1;

/// Bytes of the largest manifest: all of [`MOST_FILES`] and [`MOST_PROBES`] of some pages each.
const MOST_BYTES: u64 = 1 << 20;

/// Files of a version; the largest checkpoints there are have some two hundred shards.
const MOST_FILES: usize = 1024;

/// The files of a version folder, and its probes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    files: BTreeMap<String, String>,
    /// Bytes of the files: what is cut short is found before gigabytes are hashed. Absent from older manifests.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    sizes: BTreeMap<String, u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    probes: Vec<Probe>,
}

impl Manifest {
    /// Reads a folder's manifest; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is not a manifest of this format.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MANIFEST);
        let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };
        match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(&path, error)),
            Ok(metadata) if !metadata.is_file() => return Err(malformed("not a plain file".to_owned())),
            Ok(_) => {}
        }
        let manifest: Self = serde_json::from_slice(&read::whole(&path, MOST_BYTES)?)
            .map_err(|error| malformed(format!("not a manifest: {error}")))?;
        manifest.check().map_err(malformed)?;
        Ok(Some(manifest))
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {} is not known, {FORMAT} is", self.format));
        }
        if self.files.len() > MOST_FILES || self.probes.len() > MOST_PROBES {
            let (files, probes) = (self.files.len(), self.probes.len());
            return Err(format!("{files} files and {probes} probes; {MOST_FILES} and {MOST_PROBES} are allowed"));
        }
        for (name, digest) in &self.files {
            if !is_file_name(name) {
                return Err(format!("`{name}` is not the name of a file in this folder"));
            }
            if digest.len() != 64 || hex::decode(digest).is_err() {
                return Err(format!("the sha256 of `{name}` is not 64 hexadecimal digits"));
            }
        }
        match self.sizes.keys().find(|name| !self.files.contains_key(*name)) {
            Some(name) => Err(format!("there is a size for `{name}`, which is not listed")),
            None => Ok(()),
        }
    }

    /// Hashes every file of a folder and writes its manifest, which is complete or absent at any moment.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the folder holds a folder: a version is flat; or if there are more files or probes than
    /// are read again.
    pub fn write(folder: &Path, probes: &[Probe]) -> Result<Self> {
        let mut paths = files_of(folder)?;
        paths.remove(MANIFEST);
        let size = |(name, path): (&String, &PathBuf)| {
            Ok((name.clone(), std::fs::metadata(path).map_err(|error| io(path, error))?.len()))
        };
        let manifest = Self {
            format: FORMAT,
            files: digests(folder, paths.keys(), &Reader::default())?,
            sizes: paths.iter().map(size).collect::<Result<_>>()?,
            probes: probes.to_vec(),
        };
        let malformed = |reason: String| Error::Malformed { path: folder.join(MANIFEST), reason };
        manifest.check().map_err(malformed)?;
        let text = serde_json::to_string_pretty(&manifest).map_err(|error| malformed(error.to_string()))? + "\n";
        if text.len() as u64 > MOST_BYTES {
            return Err(malformed(format!(
                "{} bytes, {MOST_BYTES} are allowed: use fewer or shorter probes",
                text.len()
            )));
        }
        let temporary = folder.join(format!(".{MANIFEST}.{}", std::process::id()));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&temporary, folder.join(MANIFEST))
        };
        write().map_err(|source| Error::Io { path: folder.join(MANIFEST), source })?;
        sync_folder(folder)?;
        Ok(manifest)
    }

    /// The sha256 of each file, by name.
    pub fn files(&self) -> &BTreeMap<String, String> {
        &self.files
    }

    /// Inputs with the scores that they had where the version was published.
    pub fn probes(&self) -> &[Probe] {
        &self.probes
    }

    /// Hashes the listed files and compares.
    ///
    /// # Errors
    /// [`Error::MissingFile`] or [`Error::Malformed`] with the first file that is not as listed.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        self.verify_with(folder, &[], &Reader::default()).map(|_| ())
    }

    /// The digests of the listed files and of `read`, which have to be listed too.
    fn verify_with(&self, folder: &Path, read: &[String], reader: &Reader) -> Result<BTreeMap<String, String>> {
        const AGAIN: &str = "the file is damaged or was changed: publish the version again";
        self.files.keys().try_for_each(|name| self.check_file(folder, name, AGAIN))?;
        let malformed = |name: &String, reason| Error::Malformed { path: folder.join(name), reason };
        if let Some(name) = read.iter().find(|name| !self.files.contains_key(*name)) {
            let reason = format!("{MANIFEST} does not list this file; publish the version again");
            return Err(malformed(name, reason));
        }
        let found = digests(folder, self.files.keys(), reader)?;
        for (name, found) in &found {
            let listed = self.files.get(name).map_or("", String::as_str);
            if !listed.eq_ignore_ascii_case(found) {
                return Err(malformed(name, format!("sha256 is {found}, {MANIFEST} says {listed}; {AGAIN}")));
            }
        }
        Ok(found)
    }

    /// What can be seen of a listed file without reading it.
    fn check_file(&self, folder: &Path, name: &str, again: &str) -> Result<()> {
        let path = folder.join(name);
        let metadata = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let what = format!("`{name}`, which {MANIFEST} lists,");
                return Err(Error::MissingFile { path: folder.to_owned(), what });
            }
            other => other.map_err(|error| io(&path, error))?,
        };
        if !metadata.is_file() {
            let reason = "not a plain file: a version holds no links, so that it is what it was; publish a copy";
            return Err(Error::Malformed { path, reason: reason.to_owned() });
        }
        match self.sizes.get(name) {
            Some(size) if *size != metadata.len() => {
                let reason = format!("{} bytes, {MANIFEST} says {size}; {again}", metadata.len());
                Err(Error::Malformed { path, reason })
            }
            _ => Ok(()),
        }
    }
}

/// The sha256 of files of a folder, by name; if the folder has a manifest, all that it lists is verified.
pub(super) fn verified_digests(
    folder: &Path,
    manifest: Option<&Manifest>,
    read: &[String],
    reader: &Reader,
) -> Result<BTreeMap<String, String>> {
    match manifest {
        None => digests(folder, read, reader),
        Some(manifest) => {
            let mut found = manifest.verify_with(folder, read, reader)?;
            found.retain(|name, _| read.contains(name));
            Ok(found)
        }
    }
}

/// The files of a folder by name, hidden ones left out.
pub(super) fn files_of(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(|error| io(folder, error))? {
        let path = entry.map_err(|error| io(folder, error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else {
            return Err(Error::Malformed { path, reason: "the file's name is not UTF-8".to_owned() });
        };
        if name.starts_with('.') {
            continue;
        }
        if !path.is_file() {
            let reason = "not a file; a version folder holds files only".to_owned();
            return Err(Error::Malformed { path, reason });
        }
        files.insert(name, path);
    }
    Ok(files)
}

/// Whether a path made of this stays in its folder.
pub(super) fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| io(folder, error))
}

/// The sha256 of files of a folder, in hexadecimal, by name.
fn digests<'a>(
    folder: &Path,
    names: impl IntoIterator<Item = &'a String>,
    reader: &Reader,
) -> Result<BTreeMap<String, String>> {
    // Each once: an index may name a file again.
    let names: BTreeSet<&String> = names.into_iter().collect();
    names.into_par_iter().map(|name| Ok((name.clone(), reader.digest(&folder.join(name))?))).collect()
}

/// One digest of several files: the sha256 of a line `name\0sha256\n` for each, in the order of the names.
pub(super) fn combined(digests: &BTreeMap<String, String>) -> String {
    let mut hasher = Sha256::new();
    for (name, digest) in digests {
        hasher.update(format!("{name}\0{digest}\n"));
    }
    hex::encode(hasher.finalize())
}

pub(super) fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}
