//! Files as they are published: packed or not, a record a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use plumb_client::parquet::{Rows, is_parquet};

use crate::{Error, Result};

/// Most bytes of a line.
const MAX_LINE: u64 = 64 << 20;

/// The content of a file, unpacked as its name asks for.
pub(crate) fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let file = File::open(path).map_err(Error::io(path))?;
    Ok(match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => Box::new(BufReader::new(MultiGzDecoder::new(file))),
        Some("bz2") => Box::new(BufReader::new(bzip2::read::MultiBzDecoder::new(file))),
        Some("zst") => {
            let mut decoder = zstd::Decoder::new(file).map_err(Error::io(path))?;
            // Pushshift's files were packed with windows of 2 GiB.
            decoder.window_log_max(31).map_err(Error::io(path))?;
            Box::new(BufReader::new(decoder))
        }
        _ => Box::new(BufReader::new(file)),
    })
}

/// Lines that are not empty, with their numbers; the rows of a Parquet file are lines of JSON.
pub(crate) struct Lines {
    path: PathBuf,
    reader: Format,
    number: u64,
}

enum Format {
    Text(Box<dyn BufRead>),
    Parquet(Box<Rows>),
}

impl Lines {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let reader = match is_parquet(path) {
            true => Format::Parquet(Box::new(Rows::open(path).map_err(Error::io(path))?)),
            false => Format::Text(open(path)?),
        };
        Ok(Self { path: path.to_owned(), reader, number: 0 })
    }

    /// The next line, without the spaces around it.
    ///
    /// # Errors
    /// If the file cannot be read or a line is too long to be one.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        let reader = match &mut self.reader {
            Format::Text(reader) => reader,
            Format::Parquet(rows) => {
                self.number += 1;
                let row = rows.next().transpose().map_err(Error::io(&self.path))?;
                return Ok(row.map(|row| (self.number, row)));
            }
        };
        loop {
            let mut line = Vec::new();
            let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(Error::io(&self.path))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if line.len() as u64 == MAX_LINE {
                let reason = format!("line {} is longer than {MAX_LINE} bytes", self.number);
                return Err(Error::Malformed { path: self.path.clone(), reason });
            }
            let line = line.trim_ascii();
            if !line.is_empty() {
                return Ok(Some((self.number, line.to_vec())));
            }
        }
    }
}

/// Lines that make no sense: some are skipped, too many end the reading.
pub(crate) struct BadLines {
    left: u64,
    most: u64,
}

impl BadLines {
    pub(crate) fn at_most(most: u64) -> Self {
        Self { left: most, most }
    }

    /// How many there were so far.
    pub(crate) fn skipped(&self) -> u64 {
        self.most - self.left
    }

    /// One more, of a file.
    ///
    /// # Errors
    /// If it is one too many.
    pub(crate) fn skip(&mut self, path: &Path, line: u64, reason: &str, warn: &mut dyn FnMut(&str)) -> Result<()> {
        let reason = format!("line {line}: {reason}");
        if self.left == 0 {
            let reason = format!("{reason}; with it, more than {} lines are bad", self.most);
            return Err(Error::Malformed { path: path.to_owned(), reason });
        }
        self.left -= 1;
        warn(&format!("{}: {reason}; skipped", path.display()));
        Ok(())
    }
}
