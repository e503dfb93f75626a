//! The configuration file. Its values take the place of the flags' defaults, so that the parser itself gives the
//! precedence flag, environment variable, file, default, and checks a value from a file as it checks any other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use clap::Command;
use toml::Value;

/// Options that have no place in a file.
const NOT_IN_FILES: [&str; 4] = ["config", "print_config", "help", "version"];

/// Bytes of a file: some thousand times what all options take.
const MOST_BYTES: u64 = 1 << 20;

/// Values by the parser's id of the option.
pub(crate) type FileValues = BTreeMap<String, Vec<String>>;

/// Reads a file of `option-name = value` lines; underscores may stand for dashes, arrays for repeated options.
pub(crate) fn read(path: &Path, command: &Command) -> Result<FileValues, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut text));
    read.map_err(|error| format!("{}: {error}", path.display()))?;
    if text.len() as u64 > MOST_BYTES {
        return Err(format!("{}: more than {MOST_BYTES} bytes; is it the configuration?", path.display()));
    }
    parse(&text, command).map_err(|error| format!("{}: {error}", path.display()))
}

pub(super) fn parse(text: &str, command: &Command) -> Result<FileValues, String> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| error.to_string())?;
    let mut values = FileValues::new();
    for (key, value) in table {
        let id = key.replace('-', "_");
        let known = command.get_arguments().any(|argument| argument.get_id() == id.as_str());
        if !known || NOT_IN_FILES.contains(&id.as_str()) {
            return Err(format!("unknown option `{key}`"));
        }
        let texts = match value {
            Value::Array(items) => items.iter().map(scalar).collect::<Option<Vec<_>>>(),
            single => scalar(&single).map(|text| vec![text]),
        };
        let texts = texts.ok_or_else(|| format!("`{key}` is not a string, number, boolean or array of these"))?;
        if values.insert(id, texts).is_some() {
            return Err(format!("`{key}` is given twice"));
        }
    }
    Ok(values)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(flag) => Some(flag.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// The command with the file's values as defaults.
pub(crate) fn apply(mut command: Command, values: &FileValues) -> Command {
    for (id, texts) in values {
        command = command.mut_arg(id, |argument| argument.default_values(texts.clone()));
    }
    command
}
