//! Tables and JSON lines.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use plumb_client::{ItemFailure, code_name, v1};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tabled::builder::Builder;
use tabled::settings::{Padding, Style};

use super::Usage;
use super::input::Place;

/// A table for a terminal; empty columns are left out.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = rows.into_iter().collect();
    let used: Vec<usize> = (0..N).filter(|&column| rows.iter().any(|row| !row[column].is_empty())).collect();
    let mut builder = Builder::default();
    builder.push_record(used.iter().map(|&column| header[column]));
    for row in &rows {
        builder.push_record(used.iter().map(|&column| row[column].as_str()));
    }
    // Trailing spaces would only show when copied.
    let text = builder.build().with(Style::empty()).with(Padding::new(0, 2, 0, 0)).to_string();
    text.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// A Markdown table.
pub(crate) fn markdown(header: Vec<String>, rows: Vec<Vec<String>>) -> String {
    let mut builder = Builder::default();
    builder.push_record(header);
    for row in rows {
        builder.push_record(row);
    }
    builder.build().with(Style::markdown()).to_string() + "\n"
}

/// Where JSON lines go: a file, or standard output.
pub(crate) struct Lines(Box<dyn Write>);

impl Lines {
    /// A new file, or standard output.
    pub(crate) fn open(file: Option<&Path>) -> Result<Self, Usage> {
        let Some(path) = file else { return Ok(Self(Box::new(BufWriter::new(io::stdout().lock())))) };
        let file = File::create(path).map_err(|e| Usage(format!("--output {}: {e}", path.display())))?;
        Ok(Self(Box::new(BufWriter::new(file))))
    }

    pub(crate) fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.0, line)?;
        self.0.write_all(b"\n")
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Writes to standard output without the panic of `print!` when a pipe closes.
pub(crate) fn print(text: impl AsRef<str>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_ref().as_bytes())?;
    stdout.flush()
}

/// Writes one JSON line to standard output.
pub(crate) fn print_json(line: &impl Serialize) -> anyhow::Result<()> {
    Ok(print(serde_json::to_string(line)? + "\n")?)
}

/// Where an answer belongs: the first fields of every JSON line about an input.
#[derive(Clone, Default, Serialize)]
pub(crate) struct Origin {
    /// Only where several files are read.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    line: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
}

impl Origin {
    pub(crate) fn new(place: &Place, id: Option<&Value>, several_files: bool) -> Self {
        let file = place.file.as_ref().filter(|_| several_files).map(|file| file.to_path_buf());
        Self { file, line: place.line, id: id.cloned() }
    }

    /// For a table's first column.
    pub(crate) fn short(&self) -> String {
        let file = self.file.as_ref().and_then(|f| f.file_name()).map(|f| f.to_string_lossy().into_owned() + ":");
        file.unwrap_or_default() + &self.line.to_string()
    }

    /// For a table's second column.
    pub(crate) fn id(&self) -> String {
        match &self.id {
            Some(Value::String(id)) => id.clone(),
            Some(id) => id.to_string(),
            None => String::new(),
        }
    }
}

/// The model that answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Model {
    pub(crate) model: String,
    pub(crate) version: u64,
    pub(crate) weights_digest: String,
}

impl From<&v1::ModelIdentity> for Model {
    fn from(model: &v1::ModelIdentity) -> Self {
        Self { model: model.name.clone(), version: model.version, weights_digest: model.weights_digest.clone() }
    }
}

/// Name, version and the digest's start, for people.
pub(crate) fn describe(model: Option<&v1::ModelIdentity>) -> String {
    match model {
        Some(m) => format!("{} version {} ({})", m.name, m.version, digest(&m.weights_digest)),
        None => "no model answered".into(),
    }
}

/// The start of a digest, which is enough to tell weights apart.
pub(crate) fn digest(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// The reason why an item has no answer.
#[derive(Clone, Serialize)]
pub(crate) struct Failure {
    code: &'static str,
    message: String,
}

impl From<&ItemFailure> for Failure {
    fn from(failure: &ItemFailure) -> Self {
        Self { code: code_name(failure.code), message: failure.message.clone() }
    }
}

/// A tokenizer's text, safe for a terminal.
pub(crate) fn visible(text: &str) -> String {
    text.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_leave_empty_columns_out() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned);
        let text = table(["a", "b", "c"], [row(["1", "", "long text"]), row(["22", "", "x"])]);
        assert_eq!(text, "a   c\n1   long text\n22  x\n");
    }

    #[test]
    fn markdown_tables() {
        let text = markdown(vec!["a".into(), "b".into()], vec![vec!["1".into(), "x".into()]]);
        assert_eq!(text, "| a | b |\n|---|---|\n| 1 | x |\n");
    }
}
