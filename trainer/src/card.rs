//! `README.md` of a checkpoint: a model card as Hugging Face reads it, and `training.json`, which it is written from.

mod front_matter;
mod sections;

use std::fmt;
use std::path::{Component, Path, PathBuf};

use plumb_model::config::Head;
use plumb_model::loaded::{ModelInfo, ModelKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::draft::Draft;
use crate::history::{History, Measured, Prepared, json, small};
use crate::{Error, Result};

pub(crate) const CARD: &str = "README.md";
pub(crate) const TRAINING: &str = "training.json";

/// Stands in the card of a run's checkpoint, and lets that of the published version take its place.
const MARK: &str = "<!-- Written by plumb-train run. plumb-train publish writes it anew: to keep changes, take this line \
                    out. -->\n\n";

/// How a checkpoint was made: what stays with its weights of the folder of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Training {
    /// Version of plumb-train.
    pub(crate) plumb_train: String,
    /// Without places on the machine: of a path, only its end.
    pub(crate) recipe: Map<String, Value>,
    /// Repository that it began with, if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) base_model: Option<String>,
    pub(crate) steps: u64,
    #[serde(default)]
    pub(crate) data: Map<String, Value>,
    #[serde(default)]
    pub(crate) prepared: Vec<Prepared>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dev: Option<Measured>,
}

/// What `plumb-train evaluate` leaves in `results.json`, as far as a card tells it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Results {
    #[serde(default)]
    task: String,
    model: Option<Evaluated>,
    results: Vec<Score>,
}

#[derive(Clone, Debug, Deserialize)]
struct Evaluated {
    #[serde(default)]
    dtype: String,
    #[serde(default)]
    weights_digest: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Score {
    name: String,
    metric: String,
    score: Option<String>,
    value: f64,
    low: Option<f64>,
    high: Option<f64>,
    n: Option<u64>,
}

/// What a checkpoint is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    preference: bool,
    architecture: String,
    parameters: u64,
    vocabulary: usize,
    context: usize,
    /// `f32` or `bf16`.
    dtype: String,
    chat_template: bool,
}

/// All that a card tells. Displayed as Markdown.
pub(crate) struct Card<'a> {
    pub(crate) name: &'a str,
    pub(crate) model: &'a Model,
    pub(crate) training: Option<&'a Training>,
    pub(crate) results: &'a [Results],
    /// Whether a version that is published gets another one.
    pub(crate) draft: bool,
}

impl Training {
    /// Of the run that a folder holds.
    pub(crate) fn of(run: &Path) -> Result<Self> {
        let history = History::read(run)?;
        let (steps, dev) = (history.steps(), history.measured());
        let init = history.recipe.get("init").and_then(Value::as_str);
        let base_model = init.filter(|init| is_repository(init)).map(str::to_owned);
        let History { mut recipe, data, prepared, .. } = history;
        recipe.retain(|key, _| !matches!(&key[..], "output" | "threads" | "device"));
        for key in ["init", "train", "dev"] {
            match recipe.get_mut(key) {
                Some(Value::Array(paths)) => paths.iter_mut().for_each(shorten),
                Some(path) => shorten(path),
                None => {}
            }
        }
        Ok(Self { plumb_train: env!("CARGO_PKG_VERSION").to_owned(), recipe, base_model, steps, data, prepared, dev })
    }

    fn text(&self, key: &str) -> &str {
        self.recipe.get(key).and_then(Value::as_str).unwrap_or_default()
    }
}

/// The end of a path on this machine; the id of a repository stays.
fn shorten(path: &mut Value) {
    let Some(text) = path.as_str() else { return };
    let names = Path::new(text).components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    });
    let names: Vec<String> = names.collect();
    *path = json!(names[names.len().saturating_sub(2)..].join("/"));
}

/// `org/name`, and no folder of that name.
fn is_repository(init: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let names = init.split_once('/');
    names.is_some_and(|(org, name)| part(org) && part(name)) && !Path::new(init).exists()
}

/// Adds `training.json` and a card to the checkpoint that a run is about to write.
pub(crate) fn describe(run: &Path, draft: &mut Draft) -> Result<()> {
    let training = Training::of(run)?;
    let name = run.file_name().unwrap_or_default().to_string_lossy();
    let model = Model::of(draft, training.text("dtype"));
    let card = Card { name: &name, model: &model, training: Some(&training), results: &[], draft: true };
    let text = card.to_string();
    draft.add(TRAINING, format!("{:#}\n", json!(training)));
    draft.add(CARD, text);
    Ok(())
}

/// The card for a checkpoint that is published under a name; `None` if it has one that somebody else wrote.
pub(crate) fn for_publishing(
    checkpoint: &Path,
    name: &str,
    info: &ModelInfo,
    chat_template: bool,
    results: &[PathBuf],
) -> Result<Option<String>> {
    if small(&checkpoint.join(CARD))?.is_some_and(|card| !card.contains(MARK.trim_end())) {
        if let Some(path) = results.first() {
            let reason = format!(
                "the checkpoint has a {CARD} of its own, which stays as it is: put the results into it by hand, and \
                 leave {} away",
                path.display()
            );
            return Err(Error::Malformed { path: checkpoint.join(CARD), reason });
        }
        return Ok(None);
    }
    let training: Option<Training> = json(&checkpoint.join(TRAINING))?;
    let results: Vec<Results> = results.iter().map(|path| read_results(path, info)).collect::<Result<_>>()?;
    let model = Model {
        preference: info.kind == ModelKind::Preference,
        architecture: info.architecture.clone(),
        parameters: info.parameters,
        vocabulary: info.vocab_size,
        context: info.max_input_tokens,
        dtype: info.dtype.to_owned(),
        chat_template,
    };
    let card = Card { name, model: &model, training: training.as_ref(), results: &results, draft: false };
    Ok(Some(card.to_string()))
}

fn read_results(path: &Path, info: &ModelInfo) -> Result<Results> {
    let wrong = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let results: Results = json(path)?.ok_or_else(|| wrong("there is no such file".to_owned()))?;
    // In another type the same weights have another digest.
    let other = |found: &&Evaluated| found.dtype == info.dtype && found.weights_digest != info.weights_digest;
    if let Some(found) = results.model.as_ref().filter(other) {
        let digest: String = found.weights_digest.chars().take(12).collect();
        return Err(wrong(format!("these are results of another model, with the digest {digest}")));
    }
    Ok(results)
}

impl Model {
    /// Of what a run is about to write, in a type.
    fn of(draft: &Draft, dtype: &str) -> Self {
        let preference = matches!(draft.config.head, Head::Reward(_));
        Self {
            preference,
            architecture: draft.config.architecture.clone(),
            parameters: draft.served().map(|parameter| parameter.range.len() as u64).sum(),
            vocabulary: draft.config.vocab_size,
            context: draft.config.max_position_embeddings,
            dtype: dtype.to_owned(),
            chat_template: true,
        }
    }

    /// Whether Transformers has a class for it.
    fn is_known_to_transformers(&self) -> bool {
        let classes = ["ForSequenceClassification", "ForCausalLM"];
        classes.iter().any(|class| self.architecture.ends_with(class))
    }
}

impl fmt::Display for Card<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.draft { MARK } else { "" };
        write!(f, "---\n{}---\n\n{mark}", front_matter::yaml(self))?;
        f.write_str(&sections::markdown(self))
    }
}

#[cfg(test)]
mod tests;
