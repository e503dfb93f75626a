//! Rows of a Parquet file as the lines that they would be in JSONL.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value, json};

/// Whether a file is a table of rows rather than text, by its name.
pub fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"))
}

/// How many rows a file says that it has.
///
/// # Errors
/// If it cannot be read or is no Parquet file.
pub fn count_rows(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    let rows =
        guarded(|| Ok(SerializedFileReader::new(file)?.metadata().file_metadata().num_rows())).map_err(invalid)?;
    Ok(rows.max(0).cast_unsigned())
}

/// Rows, read group by group, each as an object of JSON: a column without a value is a key that is not there.
pub struct Rows(RowIter<'static>);

impl Rows {
    /// All columns of a file.
    ///
    /// # Errors
    /// If it cannot be read or is no Parquet file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::with(path, |_| true)
    }

    /// Those of the columns that there are; the others are not read.
    ///
    /// # Errors
    /// If the file cannot be read, is no Parquet file or has none of the columns.
    pub fn open_columns(path: &Path, names: &[&str]) -> io::Result<Self> {
        Self::with(path, |name| names.contains(&name))
    }

    fn with(path: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<Self> {
        let file = File::open(path)?;
        guarded(|| {
            let reader = SerializedFileReader::new(file)?;
            let schema = reader.metadata().file_metadata().schema();
            let fields: Vec<_> =
                schema.get_fields().iter().filter(|field| wanted(field.name())).map(Arc::clone).collect();
            if fields.is_empty() {
                return Err(ParquetError::General("none of its columns is known".to_owned()));
            }
            let columns = Type::group_type_builder(schema.name()).with_fields(fields).build()?;
            Ok(Self(RowIter::from_file_into(Box::new(reader)).project(Some(columns))?))
        })
        .map_err(invalid)
    }
}

impl Iterator for Rows {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = guarded(|| self.0.next().transpose()).map_err(invalid).transpose()?;
        Some(row.map(|row| object(&row).to_string().into_bytes()))
    }
}

/// Makes an error of a panic: the crate panics at column types that it does not know, and at some files that are broken.
///
/// # Errors
/// Those of `read`, and if it panics.
pub fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> parquet::errors::Result<T> {
    let panicked = |_| Err(ParquetError::General("a column that cannot be read".to_owned()));
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(panicked)
}

fn invalid(error: ParquetError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

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

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parquet").join(name)
    }

    #[test]
    fn columns_are_chosen() {
        let path = fixture("pairs-zstd.parquet");
        let keys = |rows: Rows| -> Vec<String> {
            let row: Value = serde_json::from_slice(&rows.last().unwrap().unwrap()).unwrap();
            row.as_object().unwrap().keys().cloned().collect()
        };
        assert_eq!(count_rows(&path).unwrap(), 2);
        // The second row has no prompt.
        assert_eq!(keys(Rows::open(&path).unwrap()), ["chosen", "rejected", "score", "raw"]);
        assert_eq!(keys(Rows::open_columns(&path, &["rejected", "prompt", "text"]).unwrap()), ["rejected"]);
        assert!(Rows::open_columns(&path, &["text"]).is_err());
    }

    #[test]
    fn a_broken_file_is_an_error_or_other_rows() {
        let whole = std::fs::read(fixture("dialogues.parquet")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.parquet");
        let read = |bytes: &[u8]| -> io::Result<usize> {
            std::fs::write(&path, bytes).unwrap();
            Rows::open(&path)?.try_fold(0, |count, row| row.map(|_| count + 1))
        };
        assert_eq!(read(&whole).unwrap(), 2);
        for at in (0..whole.len()).step_by(13) {
            let mut changed = whole.clone();
            changed[at] ^= 0x15;
            let _ = read(&changed);
            assert!(read(&whole[..at]).is_err(), "{at}");
        }
    }
}
