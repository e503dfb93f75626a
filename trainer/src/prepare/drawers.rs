//! Records on disk, sorted by a hash of their content.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{Body, Record, Turn};
use crate::output::Whole;
use crate::{Error, Result};

/// Files that records go into. Of a hundred gigabytes, a drawer holds half of one.
const DRAWERS: usize = 256;

/// Files of `hash, tab, group's JSON, tab, line` by the first byte of the hash.
pub(super) struct Drawers {
    seed: u64,
    folder: TempDir,
    files: Vec<BufWriter<File>>,
}

impl Drawers {
    /// Empty ones, beside what they are to become: they take as much room. They go when this does.
    pub(super) fn new(output: &Path, seed: u64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix(".drawers-").tempdir_in(output).map_err(Error::io(output))?;
        let open = |i| {
            let path = drawer(&folder, i);
            File::create(&path).map(BufWriter::new).map_err(Error::io(path))
        };
        let files = (0..DRAWERS).map(open).collect::<Result<_>>()?;
        Ok(Self { seed, folder, files })
    }

    /// Another folder beside the drawers.
    pub(super) fn scratch(&self) -> Result<TempDir> {
        tempfile::tempdir_in(self.folder.path()).map_err(Error::io(self.folder.path()))
    }

    pub(super) fn put(&mut self, record: &Record) -> Result<()> {
        let line = line(&record.body).to_string();
        let hash = hash(self.seed, "order", &line);
        let i = usize::from(hash[0]);
        let group = Value::String(record.group.clone());
        writeln!(self.files[i], "{}\t{group}\t{line}", hex::encode(hash))
            .map_err(|error| Error::io(drawer(&self.folder, i))(error))
    }

    /// Writes all records into the two files; answers how many went into each, and how many were there twice.
    pub(super) fn write(self, outputs: [&mut Whole; 2], is_dev: impl Fn(&str) -> bool) -> Result<[u64; 3]> {
        let Self { folder, files, .. } = self;
        for (i, file) in files.into_iter().enumerate() {
            file.into_inner().map_err(|error| Error::io(drawer(&folder, i))(error.into_error()))?;
        }
        let mut counts = [0; 3];
        for i in 0..DRAWERS {
            let path = drawer(&folder, i);
            let file = File::open(&path).map_err(Error::io(&path))?;
            let mut lines =
                BufReader::new(file).lines().collect::<std::io::Result<Vec<_>>>().map_err(Error::io(&path))?;
            lines.sort();
            let mut last = None;
            for line in &lines {
                let mut parts = line.splitn(3, '\t');
                let (Some(hash), Some(group), Some(line)) = (parts.next(), parts.next(), parts.next()) else {
                    continue;
                };
                // The hash is that of the line.
                if last.replace(hash) == Some(hash) {
                    counts[2] += 1;
                    continue;
                }
                let group: String = serde_json::from_str(group).unwrap_or_default();
                let side = usize::from(is_dev(&group));
                outputs[side].line(line)?;
                counts[side] += 1;
            }
        }
        Ok(counts)
    }
}

fn drawer(folder: &TempDir, i: usize) -> PathBuf {
    folder.path().join(i.to_string())
}

fn line(body: &Body) -> Value {
    let turns = |turns: &[Turn]| {
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect::<Value>()
    };
    match body {
        Body::Text(text) => json!({"text": text}),
        Body::Pair { prompt, chosen, rejected } if prompt.is_empty() => json!({"chosen": chosen, "rejected": rejected}),
        Body::Pair { prompt, chosen, rejected } => json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}),
        Body::Dialogue { prompt, chosen, rejected } if prompt.is_empty() => {
            json!({"chosen": turns(chosen), "rejected": turns(rejected)})
        }
        Body::Dialogue { prompt, chosen, rejected } => {
            json!({"prompt": turns(prompt), "chosen": turns(chosen), "rejected": turns(rejected)})
        }
    }
}

/// A hash of a text for a purpose.
fn hash(seed: u64, purpose: &str, text: &str) -> [u8; 32] {
    Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(purpose)
        .chain_update([0])
        .chain_update(text)
        .finalize()
        .into()
}

/// A number, evenly spread over texts.
pub(super) fn number(seed: u64, purpose: &str, text: &str) -> u32 {
    let [a, b, c, d, ..] = hash(seed, purpose, text);
    u32::from_le_bytes([a, b, c, d])
}

/// One from 0 to 1.
pub(super) fn share(seed: u64, purpose: &str, text: &str) -> f64 {
    f64::from(number(seed, purpose, text)) / f64::from(u32::MAX)
}
