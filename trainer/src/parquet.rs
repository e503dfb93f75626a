//! Rows of a Parquet file as the lines that they would be in JSONL.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// Rows, read group by group.
pub(crate) struct Rows {
    path: PathBuf,
    rows: RowIter<'static>,
}

impl Rows {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let rows = guarded(|| {
            let reader = SerializedFileReader::new(file)?;
            Ok(RowIter::from_file_into(Box::new(reader)))
        });
        Ok(Self { path: path.to_owned(), rows: rows.map_err(malformed(path))? })
    }

    /// The next row, as an object.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let row = guarded(|| self.rows.next().transpose()).map_err(malformed(&self.path))?;
        Ok(row.map(|row| object(&row).to_string().into_bytes()))
    }
}

/// The crate panics at column types that it does not know, and at some files that are broken.
fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
    let panicked = |_| Err(ParquetError::General("a column that cannot be read".to_owned()));
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(panicked).map_err(|error| error.to_string())
}

fn malformed(path: &Path) -> impl FnOnce(String) -> Error {
    let path = path.to_owned();
    move |reason| Error::Malformed { path, reason }
}

/// A column without a value is a key that is not there.
fn object(row: &Row) -> Value {
    let present = row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null));
    Value::Object(present.map(|(name, field)| (name.clone(), value(field))).collect::<Map<_, _>>())
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => json!(value),
        Field::Byte(value) => json!(value),
        Field::Short(value) => json!(value),
        Field::Int(value) => json!(value),
        Field::Long(value) => json!(value),
        Field::UByte(value) => json!(value),
        Field::UShort(value) => json!(value),
        Field::UInt(value) => json!(value),
        Field::ULong(value) => json!(value),
        Field::Float(value) => json!(value),
        Field::Double(value) => json!(value),
        Field::Str(text) => json!(text),
        // Some programs write strings without saying that they are text.
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, |text| json!(text)),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        // Dates, decimals and maps, which none of our readers asks for.
        other => Value::String(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_is_an_error_or_other_rows() {
        let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/parquet/dialogues.parquet");
        let whole = std::fs::read(whole).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.parquet");
        let read = |bytes: &[u8]| -> Result<usize> {
            std::fs::write(&path, bytes).unwrap();
            let mut rows = Rows::open(&path)?;
            let mut count = 0;
            while rows.next()?.is_some() {
                count += 1;
            }
            Ok(count)
        };
        assert_eq!(read(&whole).unwrap(), 2);
        for at in (0..whole.len()).step_by(13) {
            let mut changed = whole.clone();
            changed[at] ^= 0x15;
            for bytes in [&changed[..], &whole[..at]] {
                if let Err(error) = read(bytes) {
                    assert!(error.to_string().contains("broken.parquet"), "{error}");
                }
            }
            assert!(read(&whole[..at]).is_err(), "{at}");
        }
    }
}
