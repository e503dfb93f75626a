//! A Parquet file of scores: a row for every row of the input, with columns of the input that are copied as they are.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::column::writer::ColumnCloseResult;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, FloatType, Int64Type};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::Type;
use plumb_client::parquet::guarded;
use plumb_client::{ItemFailure, v1};

use crate::cli::input::Body;
use crate::cli::source::{Broken, ReadLine};

/// What the rows of a file ask for, by its columns.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    Single,
    Pair,
    Candidates,
}

impl Form {
    fn of(schema: &Type) -> Self {
        let has = |name: &str| schema.get_fields().iter().any(|field| field.name() == name);
        if has("chosen") && has("rejected") {
            Self::Pair
        } else if has("candidates") {
            Self::Candidates
        } else {
            Self::Single
        }
    }

    /// A row that asks for something else has no place among the columns.
    pub(super) fn check(self, read: ReadLine) -> ReadLine {
        let record = read?;
        if (self == Self::Pair) == matches!(record.body, Body::Pair { .. }) {
            return Ok(record);
        }
        let reason = "asks for something else than the columns say".to_owned();
        Err(Broken { place: record.place, reason, is_last: false })
    }

    /// The new columns, in the order in which [`write_scores`] fills them.
    fn columns(self) -> &'static str {
        match self {
            Self::Single => "optional float reward; optional int64 input_tokens;",
            Self::Pair => {
                "optional float chosen_reward; optional float rejected_reward; optional float margin;
                 optional int64 chosen_input_tokens; optional int64 rejected_input_tokens;"
            }
            Self::Candidates => {
                "optional group rewards (LIST) { repeated group list { optional float element; } }
                 optional group input_tokens (LIST) { repeated group list { optional int64 element; } }"
            }
        }
    }
}

/// The new columns of every form, which follow its own.
const COLUMNS: &str = "optional boolean truncated; optional binary error (STRING); optional binary model (STRING);
    optional int64 model_version; optional binary weights_digest (STRING);";

/// Which columns of the input are copied.
#[derive(Clone)]
pub(super) enum Keep {
    /// `id`, where there is one.
    Id,
    All,
    These(Vec<String>),
}

impl Keep {
    pub(super) fn new(names: &[String]) -> Self {
        match names {
            [] => Self::Id,
            names if names.iter().any(|name| name == "*") => Self::All,
            names => Self::These(names.to_vec()),
        }
    }

    fn takes(&self, name: &str) -> bool {
        match self {
            Self::Id => name == "id",
            Self::All => true,
            Self::These(names) => names.iter().any(|kept| kept == name),
        }
    }
}

/// A file that is being written; its groups of rows are those of the input. Holds the scores of one group.
pub(super) struct Table {
    file: File,
    /// Of the file.
    bytes: u64,
    source: SerializedFileReader<File>,
    /// Leaves of the input's schema that are copied.
    kept: Vec<usize>,
    form: Form,
    writer: SerializedFileWriter<File>,
    group: usize,
    rows: Vec<Row>,
    row: Row,
    models: Vec<v1::ModelIdentity>,
}

/// A row's scores, complete or not.
#[derive(Default)]
struct Row {
    scores: Vec<Option<(f32, u32)>>,
    truncated: bool,
    errors: Vec<String>,
    /// Index into the table's models.
    model: Option<usize>,
}

impl Row {
    fn reward(&self, item: usize) -> Option<f32> {
        self.scores.get(item).copied().flatten().map(|(reward, _)| reward)
    }

    fn tokens(&self, item: usize) -> Option<i64> {
        self.scores.get(item).copied().flatten().map(|(_, tokens)| i64::from(tokens))
    }

    fn is_scored(&self) -> bool {
        self.scores.iter().any(Option::is_some)
    }
}

impl Table {
    /// # Errors
    /// If the input is no Parquet file, lacks a column that is kept, or has one that would be added.
    pub(super) fn create(source: &Path, keep: &Keep, to: File) -> Result<Self> {
        guarded(|| Self::begin(source, keep, to))
    }

    fn begin(source: &Path, keep: &Keep, to: File) -> Result<Self> {
        let file = File::open(source)?;
        let bytes = file.metadata()?.len();
        let source = SerializedFileReader::new(file.try_clone()?)?;
        let schema = source.metadata().file_metadata().schema_descr();
        let root = schema.root_schema();
        let form = Form::of(root);
        let added = parse_message_type(&format!("message scores {{ {} {COLUMNS} }}", form.columns()))?;
        if let Keep::These(names) = keep {
            let is_missing = |name: &&String| root.get_fields().iter().all(|field| field.name() != name.as_str());
            if let Some(name) = names.iter().find(is_missing) {
                return Err(ParquetError::General(format!("--keep: there is no column {name}")));
            }
        }
        let mut fields: Vec<_> = root.get_fields().iter().filter(|f| keep.takes(f.name())).map(Arc::clone).collect();
        if let Some(both) = fields.iter().find(|kept| added.get_fields().iter().any(|new| new.name() == kept.name())) {
            return Err(ParquetError::General(format!("--keep: the scores have a column {} too", both.name())));
        }
        fields.extend(added.get_fields().iter().map(Arc::clone));
        let is_kept = |&leaf: &usize| keep.takes(schema.get_column_root(leaf).name());
        let kept = (0..schema.num_columns()).filter(is_kept).collect();
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            // Copied columns bring no index of their pages.
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .set_offset_index_disabled(true)
            .build();
        let schema = Type::group_type_builder("schema").with_fields(fields).build()?;
        let writer = SerializedFileWriter::new(to, Arc::new(schema), Arc::new(properties))?;
        let (rows, row, models) = (Vec::new(), Row::default(), Vec::new());
        Ok(Self { file, bytes, source, kept, form, writer, group: 0, rows, row, models })
    }

    /// What its rows may ask for.
    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Whether a score of this model may stand beside those that the row has.
    pub(super) fn row_takes(&self, model: Option<&v1::ModelIdentity>) -> bool {
        let first = self.row.model.and_then(|first| self.models.get(first));
        first.is_none() || first == model
    }

    /// Takes the next item's outcome; `is_last` of its row.
    pub(super) fn item(
        &mut self,
        outcome: &std::result::Result<v1::Score, ItemFailure>,
        is_last: bool,
        model: Option<&v1::ModelIdentity>,
    ) -> Result<()> {
        let row = &mut self.row;
        if let (Ok(_), Some(model)) = (outcome, model) {
            let known = self.models.iter().position(|known| known == model);
            let index = known.unwrap_or(self.models.len());
            if known.is_none() {
                self.models.push(model.clone());
            }
            row.model = Some(index);
        }
        match outcome {
            Ok(score) => {
                row.scores.push(Some((score.reward, score.input_tokens)));
                row.truncated |= score.truncated;
            }
            Err(failure) => {
                row.scores.push(None);
                row.errors.push(failure.to_string());
            }
        }
        if is_last { self.end_row() } else { Ok(()) }
    }

    /// Takes the next row, which cannot be understood.
    pub(super) fn broken(&mut self, reason: &str) -> Result<()> {
        self.row.errors.push(format!("INVALID_ARGUMENT: {reason}"));
        self.end_row()
    }

    fn end_row(&mut self) -> Result<()> {
        self.rows.push(std::mem::take(&mut self.row));
        guarded(|| self.write_full_groups())
    }

    /// Writes the group whose rows are complete, and groups without rows.
    fn write_full_groups(&mut self) -> Result<()> {
        let source = self.source.metadata().row_groups();
        while let Some(group) = source.get(self.group)
            && group.num_rows() == self.rows.len() as i64
        {
            let mut out = self.writer.next_row_group()?;
            for &leaf in &self.kept {
                copy(&mut out, &self.file, self.bytes, group, leaf)?;
            }
            write_scores(&mut out, self.form, &self.rows, &self.models)?;
            out.close()?;
            self.rows.clear();
            self.group += 1;
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// If rows of the input are missing, or it cannot be written.
    pub(super) fn finish(mut self) -> Result<()> {
        guarded(|| self.write_full_groups())?;
        if self.group < self.source.metadata().num_row_groups() || !self.rows.is_empty() {
            return Err(ParquetError::General("not as many rows as the file says that it has".to_owned()));
        }
        self.writer.close().map(drop)
    }
}

/// Copies the pages of a column without looking at them.
fn copy(
    out: &mut SerializedRowGroupWriter<'_, File>,
    from: &File,
    bytes: u64,
    group: &RowGroupMetaData,
    leaf: usize,
) -> Result<()> {
    let metadata = group.column(leaf).clone();
    // Negative numbers are past every end, too.
    let start = metadata.dictionary_page_offset().unwrap_or(metadata.data_page_offset()).cast_unsigned();
    if start.checked_add(metadata.compressed_size().cast_unsigned()).is_none_or(|end| end > bytes) {
        return Err(ParquetError::EOF(format!("column {} ends after the file", metadata.column_path())));
    }
    let chunk = ColumnCloseResult {
        bytes_written: metadata.compressed_size().cast_unsigned(),
        rows_written: group.num_rows().cast_unsigned(),
        metadata,
        bloom_filter: None,
        column_index: None,
        offset_index: None,
    };
    out.append_column(from, chunk)
}

fn write_scores(
    out: &mut SerializedRowGroupWriter<'_, File>,
    form: Form,
    rows: &[Row],
    models: &[v1::ModelIdentity],
) -> Result<()> {
    match form {
        Form::Single => {
            write::<FloatType>(out, rows.iter().map(|row| row.reward(0)))?;
            write::<Int64Type>(out, rows.iter().map(|row| row.tokens(0)))?;
        }
        Form::Pair => {
            let [chosen, rejected] = [0, 1].map(|side| move |row: &Row| row.reward(side));
            write::<FloatType>(out, rows.iter().map(chosen))?;
            write::<FloatType>(out, rows.iter().map(rejected))?;
            write::<FloatType>(out, rows.iter().map(|row| Some(chosen(row)? - rejected(row)?)))?;
            write::<Int64Type>(out, rows.iter().map(|row| row.tokens(0)))?;
            write::<Int64Type>(out, rows.iter().map(|row| row.tokens(1)))?;
        }
        Form::Candidates => {
            write_lists::<FloatType>(out, rows, Row::reward)?;
            write_lists::<Int64Type>(out, rows, Row::tokens)?;
        }
    }
    let model = |row: &Row| row.model.and_then(|model| models.get(model));
    let text = |text: &str| ByteArray::from(text);
    let error = |row: &Row| Some(row.errors.join("; ")).filter(|said| !said.is_empty());
    write::<BoolType>(out, rows.iter().map(|row| row.is_scored().then_some(row.truncated)))?;
    write::<ByteArrayType>(out, rows.iter().map(|row| error(row).map(|said| text(&said))))?;
    write::<ByteArrayType>(out, rows.iter().map(|row| model(row).map(|m| text(&m.name))))?;
    write::<Int64Type>(out, rows.iter().map(|row| model(row).map(|m| m.version.cast_signed())))?;
    write::<ByteArrayType>(out, rows.iter().map(|row| model(row).map(|m| text(&m.weights_digest))))
}

/// The next column, of a value or null for each row.
fn write<T: DataType>(
    out: &mut SerializedRowGroupWriter<'_, File>,
    values: impl Iterator<Item = Option<T::T>> + Clone,
) -> Result<()> {
    let levels: Vec<i16> = values.clone().map(|value| i16::from(value.is_some())).collect();
    let values: Vec<T::T> = values.flatten().collect();
    write_column::<T>(out, &values, &levels, None)
}

/// The next column, of a list for each row, in which an item that failed is null; null for a row without items.
fn write_lists<T: DataType>(
    out: &mut SerializedRowGroupWriter<'_, File>,
    rows: &[Row],
    value: impl Fn(&Row, usize) -> Option<T::T>,
) -> Result<()> {
    let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        if row.scores.is_empty() {
            definition.push(0);
            repetition.push(0);
        }
        for item in 0..row.scores.len() {
            let value = value(row, item);
            definition.push(if value.is_some() { 3 } else { 2 });
            repetition.push(i16::from(item > 0));
            values.extend(value);
        }
    }
    write_column::<T>(out, &values, &definition, Some(&repetition))
}

fn write_column<T: DataType>(
    out: &mut SerializedRowGroupWriter<'_, File>,
    values: &[T::T],
    definition: &[i16],
    repetition: Option<&[i16]>,
) -> Result<()> {
    let mut column = out.next_column()?.ok_or_else(|| ParquetError::General("too many columns".to_owned()))?;
    column.typed::<T>().write_batch(values, Some(definition), repetition)?;
    column.close()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_an_error_or_a_table() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parquet");
        let whole = std::fs::read(fixtures.join("dialogues.parquet")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged.parquet");
        let copied = |bytes: &[u8]| -> Result<()> {
            std::fs::write(&path, bytes).unwrap();
            let mut table = Table::create(&path, &Keep::All, tempfile::tempfile().unwrap())?;
            for _ in 0..2 {
                table.broken("not read")?;
            }
            table.finish()
        };
        copied(&whole).unwrap();
        for at in (0..whole.len()).step_by(3) {
            let mut changed = whole.clone();
            changed[at] ^= 0x15;
            let _ = copied(&changed);
        }
    }
}
