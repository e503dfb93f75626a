//! Typed reading of JSON objects, with errors that name the key, what was found and what was expected.

use std::borrow::Cow;
use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use super::read;
use crate::{Error, Result};

/// Bytes of a JSON file. The largest are indices of shards, about 100 bytes a tensor. As values in memory, a byte can
/// become 32.
const MOST_JSON: u64 = 16 << 20;

/// A JSON object and the file it came from.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            _ => Err(Error::Malformed { path: path.to_owned(), reason: "expected a JSON object".to_owned() }),
        }
    }

    /// The value, unless it is absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be it with null: null may mean "none" where absence means a default.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// An error about the value at `key`.
    pub(super) fn wrong(&self, key: &str, expected: impl Display) -> Error {
        let reason = match self.get(key) {
            Some(found) => format!("`{key}` is {}, expected {expected}", excerpt(&found.to_string())),
            None => format!("`{key}` is missing, expected {expected}"),
        };
        Error::Malformed { path: self.path.to_owned(), reason }
    }

    /// A whole number from 1 to `most`.
    pub(super) fn size(&self, key: &str, most: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=most).contains(&size) => Ok(Some(size)),
            _ => Err(self.wrong(key, format_args!("a whole number from 1 to {most}"))),
        }
    }

    pub(super) fn required_size(&self, key: &str, most: usize) -> Result<usize> {
        self.size(key, most)?.ok_or_else(|| self.wrong(key, format_args!("a whole number from 1 to {most}")))
    }

    /// A finite number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, "a finite number")),
        }
    }

    /// A number above zero that stays so as f32.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(number) if !(number as f32 > 0.0 && (number as f32).is_finite()) => {
                Err(self.wrong(key, "a number above 0"))
            }
            number => Ok(number),
        }
    }

    pub(super) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.wrong(key, "a number above 0"))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string")),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong(key, "a list")),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: self.path, map })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// Token ids: a number or a list of them; empty when absent.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(key, "a token id or a list of them"))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}

/// Reads and parses a JSON file of up to [`MOST_JSON`] bytes.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_slice(&read::whole(path, MOST_JSON)?)
        .map_err(|error| Error::Malformed { path: path.to_owned(), reason: format!("not valid JSON: {error}") })
}

/// The beginning of a text that is to be shown: what a file says can be long.
pub(super) fn excerpt(text: &str) -> Cow<'_, str> {
    const SHOWN: usize = 200;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => Cow::Owned(format!("{}...", &text[..end])),
        None => Cow::Borrowed(text),
    }
}
