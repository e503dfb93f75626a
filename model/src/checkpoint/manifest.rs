//! `manifest.json`: the sha256 of every file of a published version, and how a version is published.
//!
//! A version folder is complete when its manifest is there: files are written and synced first, then the manifest, and
//! the folder gets its number last, by a rename. Readers therefore see a whole version or none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::fields::read_json;
use crate::{Error, Result};

/// Name of the manifest's file.
pub const MANIFEST: &str = "manifest.json";

/// The only layout there has been.
const FORMAT: u32 = 1;

/// The files of a version folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    files: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads a folder's manifest; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is not a manifest of this format.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MANIFEST);
        if !path.exists() {
            return Ok(None);
        }
        let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };
        let manifest: Self =
            serde_json::from_value(read_json(&path)?).map_err(|error| malformed(format!("not a manifest: {error}")))?;
        if manifest.format != FORMAT {
            return Err(malformed(format!("format {} is not known, {FORMAT} is", manifest.format)));
        }
        for (name, digest) in &manifest.files {
            if !is_file_name(name) {
                return Err(malformed(format!("`{name}` is not the name of a file in this folder")));
            }
            if digest.len() != 64 || hex::decode(digest).is_err() {
                return Err(malformed(format!("the sha256 of `{name}` is not 64 hexadecimal digits")));
            }
        }
        Ok(Some(manifest))
    }

    /// Hashes every file of a folder and writes its manifest, which is complete or absent at any moment.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the folder holds a folder: a version is flat.
    pub fn write(folder: &Path) -> Result<Self> {
        let names = files_of(folder)?.into_keys().filter(|name| name != MANIFEST);
        let manifest = Self { format: FORMAT, files: digests(folder, &names.collect::<Vec<_>>())? };
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|error| Error::Malformed { path: folder.join(MANIFEST), reason: error.to_string() })?;
        let temporary = folder.join(format!(".{MANIFEST}.{}", std::process::id()));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
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

    /// Hashes the listed files and compares.
    ///
    /// # Errors
    /// [`Error::MissingFile`] or [`Error::Malformed`] with the first file that is not as listed.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        self.verify_with(folder, &[]).map(|_| ())
    }

    /// The digests of the listed files and of `read`, which have to be listed too.
    fn verify_with(&self, folder: &Path, read: &[String]) -> Result<BTreeMap<String, String>> {
        let names: BTreeSet<&String> = self.files.keys().chain(read).collect();
        if let Some(name) = self.files.keys().find(|name| !folder.join(name).is_file()) {
            let what = format!("`{name}`, which {MANIFEST} lists,");
            return Err(Error::MissingFile { path: folder.to_owned(), what });
        }
        let found = digests(folder, names)?;
        for (name, found) in &found {
            let reason = match self.files.get(name) {
                Some(listed) if listed.eq_ignore_ascii_case(found) => continue,
                Some(listed) => format!(
                    "sha256 is {found}, {MANIFEST} says {listed}; the file is damaged or was changed: publish the \
                     version again"
                ),
                None => format!("{MANIFEST} does not list this file; publish the version again"),
            };
            return Err(Error::Malformed { path: folder.join(name), reason });
        }
        Ok(found)
    }
}

/// The sha256 of files of a folder, by name; if the folder has a manifest, all that it lists is verified.
pub(super) fn verified_digests(folder: &Path, read: &[String]) -> Result<BTreeMap<String, String>> {
    match Manifest::read(folder)? {
        None => digests(folder, read),
        Some(manifest) => {
            let mut found = manifest.verify_with(folder, read)?;
            found.retain(|name, _| read.contains(name));
            Ok(found)
        }
    }
}

/// Copies a checkpoint to `<root>/<model>/<version>/` and returns that folder. Without a `version` it becomes the one
/// after the highest there, or 1.
///
/// The copy is made in a hidden folder beside the versions, which a crash may leave behind and nothing reads. Files of
/// `added`, by name and content, are written beside the copies, in place of those that have the same name.
///
/// # Errors
/// [`Error::InvalidInput`] for an unusable model name or a version that exists; [`Error::MissingFile`] if `source`
/// holds no `config.json`.
pub fn publish(
    source: &Path,
    root: &Path,
    model: &str,
    version: Option<u64>,
    added: &[(&str, &str)],
) -> Result<PathBuf> {
    if !is_file_name(model) || model.starts_with('.') {
        return Err(Error::InvalidInput(format!("`{model}` cannot be the name of a model: it has to name one folder")));
    }
    if !source.join("config.json").is_file() {
        return Err(Error::MissingFile { path: source.to_owned(), what: "config.json".to_owned() });
    }
    let versions = root.join(model);
    std::fs::create_dir_all(&versions).map_err(|error| io(&versions, error))?;
    if let Some(version) = version {
        refuse_existing(&versions.join(version.to_string()))?;
    }

    let draft = Draft::new(&versions)?;
    for (name, path) in files_of(source)? {
        if name != MANIFEST && added.iter().all(|(other, _)| name != *other) {
            copy_synced(&path, &draft.0.join(name))?;
        }
    }
    for (name, content) in added {
        let path = draft.0.join(name);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()
        };
        write().map_err(|error| io(&path, error))?;
    }
    Manifest::write(&draft.0)?;

    loop {
        let folder = versions.join(match version {
            Some(version) => version.to_string(),
            None => next_version(&versions)?.to_string(),
        });
        // A published folder is never empty, and a rename onto one that is not empty fails: no version is replaced,
        // even when two publish at once.
        match std::fs::rename(&draft.0, &folder) {
            Ok(()) => {
                sync_folder(&versions)?;
                sync_folder(root)?;
                return Ok(folder);
            }
            Err(_) if version.is_none() && folder.exists() => continue,
            Err(error) => {
                refuse_existing(&folder)?;
                return Err(io(&folder, error));
            }
        }
    }
}

/// A version that is being written; removed unless it was renamed.
struct Draft(PathBuf);

impl Draft {
    fn new(versions: &Path) -> Result<Self> {
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let folder = versions.join(format!(".publishing-{}-{}", std::process::id(), started.as_nanos()));
        std::fs::create_dir(&folder).map_err(|error| io(&folder, error))?;
        Ok(Self(folder))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Not there after the rename; otherwise the error that ends the publishing matters more than this one.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn refuse_existing(folder: &Path) -> Result<()> {
    if folder.exists() {
        let folder = folder.display();
        return Err(Error::InvalidInput(format!("{folder} exists; a published version never changes: choose another")));
    }
    Ok(())
}

fn next_version(versions: &Path) -> Result<u64> {
    let mut highest = 0;
    for entry in std::fs::read_dir(versions).map_err(|error| io(versions, error))? {
        let entry = entry.map_err(|error| io(versions, error))?;
        if let Some(version) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()) {
            highest = highest.max(version);
        }
    }
    highest.checked_add(1).ok_or_else(|| Error::InvalidInput(format!("{}: versions are used up", versions.display())))
}

/// The files of a folder by name, hidden ones left out.
fn files_of(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
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

fn copy_synced(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map_err(|error| io(from, error))?;
    File::open(to).and_then(|file| file.sync_all()).map_err(|error| io(to, error))
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| io(folder, error))
}

/// The sha256 of files of a folder, in hexadecimal, by name.
fn digests<'a>(folder: &Path, names: impl IntoIterator<Item = &'a String>) -> Result<BTreeMap<String, String>> {
    let names: Vec<&String> = names.into_iter().collect();
    names.into_par_iter().map(|name| Ok((name.clone(), digest(&folder.join(name))?))).collect()
}

pub(super) fn digest(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut hash = || {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                read => hasher.update(&buffer[..read]),
            }
        }
    };
    hash().map_err(|error| io(path, error))?;
    Ok(hex::encode(hasher.finalize()))
}

/// One digest of several files: the sha256 of a line `name\0sha256\n` for each, in the order of the names.
pub(super) fn combined(digests: &BTreeMap<String, String>) -> String {
    let mut hasher = Sha256::new();
    for (name, digest) in digests {
        hasher.update(format!("{name}\0{digest}\n"));
    }
    hex::encode(hasher.finalize())
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}
