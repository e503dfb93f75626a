//! Lines of a dump sorted into files by what they belong to: what belongs together may stand anywhere in it.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::input::Lines;
use crate::{Error, Result};

/// Files of lines. Of a hundred gigabytes, one holds less than two.
const PARTS: u64 = 64;

/// Records of one dump, by a number that those have in common which belong together.
pub(super) struct Parts {
    folder: TempDir,
    files: Vec<BufWriter<File>>,
}

impl Parts {
    pub(super) fn new(folder: TempDir) -> Result<Self> {
        let create = |part| {
            let path = path(&folder, part);
            File::create(&path).map(BufWriter::new).map_err(Error::io(path))
        };
        let files = (0..PARTS).map(create).collect::<Result<_>>()?;
        Ok(Self { folder, files })
    }

    pub(super) fn put(&mut self, number: u64, record: &impl Serialize) -> Result<()> {
        let file = &mut self.files[(number % PARTS) as usize];
        let line = serde_json::to_string(record).map_err(std::io::Error::from);
        line.and_then(|line| writeln!(file, "{line}")).map_err(Error::io(self.folder.path()))
    }

    /// Calls `each` with all records of a part, part after part.
    pub(super) fn for_each<T: DeserializeOwned>(self, mut each: impl FnMut(Vec<T>) -> Result<()>) -> Result<()> {
        let Self { folder, files } = self;
        for file in files {
            file.into_inner().map_err(|error| Error::io(folder.path())(error.into_error()))?;
        }
        for part in 0..PARTS {
            let path = path(&folder, part);
            let mut lines = Lines::open(&path)?;
            let mut records = Vec::new();
            while let Some((_, line)) = lines.next()? {
                records.push(serde_json::from_slice(&line).map_err(std::io::Error::from).map_err(Error::io(&path))?);
            }
            each(records)?;
        }
        Ok(())
    }
}

fn path(folder: &TempDir, part: u64) -> PathBuf {
    folder.path().join(format!("{part}.jsonl"))
}
