//! What is known of a file that has been scored. Its manifest is written last: what has none is not done.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::cli::output::Model;

/// The version of the format.
pub(super) const VERSION: u32 = 1;

/// A file's scores.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// [`VERSION`].
    pub(super) plumb_manifest: u32,
    pub(super) input: Input,
    pub(super) output: Output,
    /// All that scores depend on, the weights aside.
    pub(super) options: Value,
    /// Whose scores these are; one, unless mixed versions were asked for.
    pub(super) models: Vec<Model>,
    pub(super) rows: u64,
    /// Rows in which something has no score.
    pub(super) errors: u64,
    pub(super) tokens: u64,
}

/// The file that was read.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Input {
    /// Below the folder that was named.
    pub(super) path: PathBuf,
    #[serde(flatten)]
    pub(super) stamp: Stamp,
    pub(super) sha256: String,
}

/// The file that was written.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Output {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// What a file system tells of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stamp {
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

impl Stamp {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self { bytes: metadata.len(), modified: u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX) })
    }
}

impl Input {
    /// Whether a file is still the one that was read. A copy is, whatever its date.
    pub(super) fn is(&self, path: &Path) -> io::Result<bool> {
        let stamp = Stamp::of(path)?;
        Ok(stamp == self.stamp || stamp.bytes == self.stamp.bytes && sha256(path)? == self.sha256)
    }
}

impl Manifest {
    /// `None` if there is none that can be understood; the format's version if it is another than [`VERSION`].
    pub(super) fn read(path: &Path) -> io::Result<Option<Result<Self, u32>>> {
        #[derive(Deserialize)]
        struct Format {
            plumb_manifest: u32,
        }
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(match serde_json::from_slice(&bytes) {
            Ok(Format { plumb_manifest: VERSION }) => serde_json::from_slice(&bytes).ok().map(Ok),
            Ok(Format { plumb_manifest }) => Some(Err(plumb_manifest)),
            Err(_) => None,
        })
    }

    /// Appears whole or not at all.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let part = path.with_added_extension("part");
        let mut file = File::create(&part)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        rename(&part, path)
    }
}

/// Renames a file that is on disk, durably.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    match to.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

impl Output {
    /// Puts a file on disk and learns what it is.
    pub(super) fn sync(path: &Path) -> io::Result<Self> {
        File::open(path)?.sync_all()?;
        Ok(Self { bytes: fs::metadata(path)?.len(), sha256: sha256(path)? })
    }
}

/// The digest of a file's content, in hexadecimal.
pub(super) fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(buffer.get(..n).unwrap_or_default()),
        }
    }
}
