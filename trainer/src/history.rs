//! What a run's folder tells about the run, at its end and at any time before.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use plumb_client::stats::wilson;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::input::Lines;
use crate::record::{DEV, METRICS, Pair, scalars};
use crate::{Error, Result};

/// Most bytes of a file that is not made of lines.
const MAX_FILE: u64 = 16 << 20;

/// What is told first of what was measured.
const FIRST: [&str; 5] = ["accuracy", "margin", "loss", "preference_loss", "language_loss"];

/// A run, as its files tell it.
#[derive(Debug)]
pub(crate) struct History {
    /// The folder's.
    pub(crate) name: String,
    pub(crate) recipe: Map<String, Value>,
    /// The same as it was written.
    pub(crate) recipe_text: String,
    /// What was read of the data, and what was not, by split.
    pub(crate) data: Map<String, Value>,
    /// How the train files were prepared, where that is known.
    pub(crate) prepared: Vec<Prepared>,
    /// Points by the tags of [`scalars`].
    pub(crate) curves: BTreeMap<String, Vec<(f64, f64)>>,
    /// What the dev pairs got last.
    pub(crate) pairs: Vec<Pair>,
    /// Lines that were skipped: a run that is going on, or was killed, may leave half of one.
    pub(crate) bad_lines: u64,
}

/// A folder that `plumb-train prepare` made: its `counts.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) dataset: Option<String>,
    #[serde(default)]
    pub(crate) files: Vec<String>,
    #[serde(default)]
    pub(crate) binarise: bool,
    #[serde(default)]
    pub(crate) counts: Map<String, Value>,
}

/// The last measurement on the dev data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) step: u64,
    /// Pairs among the dev data.
    pub(crate) pairs: u64,
    /// By the names in `metrics.jsonl`.
    pub(crate) values: BTreeMap<String, f64>,
}

impl History {
    /// Reads the folder of a run.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("recipe.toml");
        let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };
        let text = small(&path)?.ok_or_else(|| malformed("not there: name the folder of a run".to_owned()))?;
        let recipe: Map<String, Value> = toml::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        let prepared = prepared(&paths(&recipe, "train"))?;
        let data = json(&folder.join("data.json"))?.unwrap_or_default();
        let (mut curves, mut bad_lines) = (BTreeMap::<String, Vec<(f64, f64)>>::new(), 0);
        bad_lines += each(&folder.join(METRICS), |line: Value| {
            let step = line["step"].as_u64().unwrap_or(0) as f64;
            scalars(&line).into_iter().for_each(|(tag, value)| curves.entry(tag).or_default().push((step, value)));
        })?;
        let mut pairs = Vec::new();
        bad_lines += each(&folder.join(DEV), |pair: Pair| pairs.push(pair))?;
        let full = folder.canonicalize().map_err(Error::io(folder))?;
        let name = full.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, recipe, recipe_text: text, data, prepared, curves, pairs, bad_lines })
    }

    /// Steps that were taken.
    pub(crate) fn steps(&self) -> u64 {
        self.curves.get("train/loss").and_then(|points| points.last()).map_or(0, |(step, _)| *step as u64)
    }

    /// The last measurement on the dev data, if there is one.
    pub(crate) fn measured(&self) -> Option<Measured> {
        let (step, _) = self.curves.get("dev/loss")?.last()?;
        let last = |(tag, points): (&String, &Vec<(f64, f64)>)| {
            let (at, value) = points.last()?;
            let name = tag.strip_prefix("dev/").filter(|name| at == step && *name != "tokens_per_second")?;
            Some((name.to_owned(), *value))
        };
        let values = self.curves.iter().filter_map(last).collect();
        Some(Measured { step: *step as u64, pairs: self.pairs.len() as u64, values })
    }
}

impl Measured {
    /// Names and values for a table, with the 95 % Wilson interval of the accuracy.
    pub(crate) fn rows(&self) -> Vec<(String, String)> {
        let row = |(name, value): (&String, &f64)| {
            let text = match (&name[..], self.accuracy_interval()) {
                ("accuracy", Some((low, high))) => {
                    let [value, low, high] = [*value, low, high].map(|share| 100.0 * share);
                    format!("{value:.1} % ({low:.1} to {high:.1} %) of {} pairs", self.pairs)
                }
                ("accuracy", None) => format!("{:.1} %", 100.0 * value),
                ("loss" | "preference_loss" | "language_loss", _) => format!("{value:.4} nats"),
                _ => format!("{value:.4}"),
            };
            (name.replace('_', " "), text)
        };
        let place = |(name, _): &(&String, &f64)| FIRST.iter().position(|first| first == name).unwrap_or(FIRST.len());
        let mut values: Vec<_> = self.values.iter().collect();
        values.sort_by_key(place);
        values.into_iter().map(row).collect()
    }

    /// Where the accuracy lies with 95 % confidence.
    pub(crate) fn accuracy_interval(&self) -> Option<(f64, f64)> {
        wilson(self.values.get("accuracy")? * self.pairs as f64, self.pairs)
    }
}

/// Paths in a recipe.
pub(crate) fn paths(recipe: &Map<String, Value>, key: &str) -> Vec<PathBuf> {
    let list = recipe.get(key).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|path| Some(PathBuf::from(path.as_str()?))).collect()
}

/// What stands beside files about how they were prepared, once for each folder.
fn prepared(files: &[PathBuf]) -> Result<Vec<Prepared>> {
    let mut folders: Vec<&Path> = files.iter().filter_map(|file| file.parent()).collect();
    folders.dedup();
    // Another file may have that name.
    let known = |folder: &Path| json::<Value>(&folder.join("counts.json")).ok().flatten();
    let found = folders.into_iter().filter_map(known).filter_map(|value| serde_json::from_value(value).ok());
    Ok(found.filter(|set: &Prepared| set.dataset.is_some()).collect())
}

/// The content of a file that is not large; `None` if it is not there.
pub(crate) fn small(path: &Path) -> Result<Option<String>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::metadata(path).map_err(Error::io(path))?.len();
    if bytes > MAX_FILE {
        let reason = format!("{bytes} bytes are more than such a file has, which is {MAX_FILE} at most");
        return Err(Error::Malformed { path: path.to_owned(), reason });
    }
    fs::read_to_string(path).map(Some).map_err(Error::io(path))
}

/// A JSON file that is not large; `None` if it is not there.
pub(crate) fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let malformed = |error: serde_json::Error| Error::Malformed { path: path.to_owned(), reason: error.to_string() };
    small(path)?.map(|text| serde_json::from_str(&text).map_err(malformed)).transpose()
}

/// Goes through the lines of a file, if it is there, and tells how many made no sense.
fn each<T: DeserializeOwned>(path: &Path, mut take: impl FnMut(T)) -> Result<u64> {
    let mut bad = 0;
    if path.exists() {
        let mut lines = Lines::open(path)?;
        while let Some((_, line)) = lines.next()? {
            serde_json::from_slice(&line).map_or_else(|_| bad += 1, &mut take);
        }
    }
    Ok(bad)
}
