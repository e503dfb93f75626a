//! Lists of numbers in a file, read one at a time: what is learned from need not fit into memory.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Records of 32-bit numbers, each behind its length, little-endian.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    file: File,
    /// Where each record's numbers begin, in bytes, and how many there are.
    records: Vec<(u64, u32)>,
}

/// A store that is being written.
pub(crate) struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    at: u64,
    records: Vec<(u64, u32)>,
}

impl Writer {
    /// Into a new file.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        Ok(Self::new(path, file.map_err(Error::io(path))?))
    }

    /// Into a file of the folder that has no name, and goes when the store does.
    pub(crate) fn nameless(folder: &Path) -> Result<Self> {
        Ok(Self::new(folder, tempfile::tempfile_in(folder).map_err(Error::io(folder))?))
    }

    fn new(path: &Path, file: File) -> Self {
        Self { path: path.to_owned(), file: BufWriter::with_capacity(1 << 20, file), at: 0, records: Vec::new() }
    }

    pub(crate) fn push(&mut self, numbers: &[u32]) -> Result<()> {
        let write = |number: &u32| self.file.write_all(&number.to_le_bytes());
        let len = numbers.len() as u32;
        std::iter::once(&len).chain(numbers).try_for_each(write).map_err(Error::io(&self.path))?;
        self.records.push((self.at + 4, len));
        self.at += 4 * (1 + u64::from(len));
        Ok(())
    }

    /// All that was pushed, on disk.
    pub(crate) fn finish(self) -> Result<Store> {
        let Self { path, file, records, .. } = self;
        let file = file.into_inner().map_err(|error| Error::io(&path)(error.into_error()))?;
        file.sync_all().map_err(Error::io(&path))?;
        Ok(Store { path, file, records })
    }
}

impl Store {
    /// A file that was written before.
    ///
    /// # Errors
    /// If it cannot be read or ends within a record.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let size = file.metadata().map_err(Error::io(path))?.len();
        let mut reader = BufReader::new(&file);
        let (mut records, mut at) = (Vec::new(), 0);
        while at < size {
            let mut len = [0; 4];
            let short = |error: std::io::Error| match error.kind() {
                ErrorKind::UnexpectedEof => cut_off(path),
                _ => Error::io(path)(error),
            };
            reader.read_exact(&mut len).map_err(short)?;
            let len = u32::from_le_bytes(len);
            records.push((at + 4, len));
            at += 4 * (1 + u64::from(len));
            if at > size {
                return Err(cut_off(path));
            }
            reader.seek_relative(4 * i64::from(len)).map_err(Error::io(path))?;
        }
        drop(reader);
        Ok(Self { path: path.to_owned(), file, records })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// A record; empty for one that is not there.
    pub(crate) fn get(&self, i: usize) -> Result<Vec<u32>> {
        let Some((at, len)) = self.records.get(i) else { return Ok(Vec::new()) };
        let mut bytes = vec![0; 4 * *len as usize];
        self.file.read_exact_at(&mut bytes, *at).map_err(Error::io(&self.path))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|number| u32::from_le_bytes(*number)).collect())
    }
}

fn cut_off(path: &Path) -> Error {
    Error::Malformed { path: path.to_owned(), reason: "it ends within a record".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let records: Vec<Vec<u32>> = vec![vec![1, 2, u32::MAX], Vec::new(), (0..100_000).collect()];
        let mut writer = Writer::create(&path).unwrap();
        records.iter().for_each(|record| writer.push(record).unwrap());
        let written = writer.finish().unwrap();
        for store in [written, Store::open(&path).unwrap()] {
            assert_eq!((0..store.len()).map(|i| store.get(i).unwrap()).collect::<Vec<_>>(), records);
        }
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(Store::open(&path).unwrap_err().to_string().contains("ends within a record"));
        let mut nameless = Writer::nameless(folder.path()).unwrap();
        nameless.push(&[7]).unwrap();
        assert_eq!(nameless.finish().unwrap().get(0).unwrap(), [7]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
