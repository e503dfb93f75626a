//! What is to be trained and how: every key of a recipe is a flag too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, ValueEnum};
use plumb_model::decoder::DeviceChoice;
use serde::{Serialize, Serializer};

use crate::{Error, Result};

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// A preference model: softplus(r_rejected - r_chosen) and the language loss of the chosen side
    Preference,
    /// A language model: the next token of every token
    Language,
    /// A language model of the chosen side's response only
    Imitation,
    /// A language model that expects what a teacher does, which had a prompt before the text: see `teach`
    Distillation,
}

/// Type in which the decoder computes; weights, gradients and the optimiser's state are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComputeType {
    /// 16 bits, sums in f32
    Bf16,
    /// 32 bits
    F32,
}

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It stays
    Constant,
    /// To 0 in a straight line
    Linear,
    /// To 0 along half a cosine
    Cosine,
}

/// A recipe.
#[derive(Clone, Debug, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Recipe {
    /// What is learned
    #[arg(long, value_enum)]
    pub objective: Objective,
    /// Checkpoint to begin with: a folder, a Hugging Face repository or, for an adapter, a .gguf file. Its chat template
    /// gives way to the Human:/Assistant: form of the paper
    #[arg(long, value_name = "SOURCE")]
    pub init: String,
    /// JSONL or Parquet files to learn from; for distillation, what `teach` wrote
    #[arg(long, value_name = "FILE", required = true, num_args = 1.., action = ArgAction::Append)]
    pub train: Vec<PathBuf>,
    /// Files to measure on, of the same kinds
    #[arg(long, value_name = "FILE", num_args = 1.., action = ArgAction::Append)]
    pub dev: Vec<PathBuf>,
    /// Folder of the run; one that holds a run goes on with it
    #[arg(long, value_name = "FOLDER")]
    pub output: PathBuf,

    /// Times that the data is gone through
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub epochs: u64,
    /// Steps after which to stop, if the data lasts longer
    #[arg(long, value_name = "N")]
    pub max_steps: Option<u64>,
    /// Pairs, or texts, in a step
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub batch: usize,
    /// Tokens in a sequence; longer ones lose their beginning, longer texts of a language model become several
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_tokens: usize,
    /// Of the order of the data and of new weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 1e-5)]
    pub lr: f32,
    /// How it goes on after the warm-up
    #[arg(long, value_enum, default_value_t = Schedule::Constant)]
    pub schedule: Schedule,
    /// Steps in which it grows from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup_steps: u64,
    /// AdamW's share of every matrix that is taken away, times the learning rate
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub weight_decay: f32,
    /// AdamW's decay of the mean of gradients
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub beta1: f32,
    /// AdamW's decay of the mean of their squares
    #[arg(long, value_name = "X", default_value_t = 0.95)]
    pub beta2: f32,
    /// AdamW's smallest divisor
    #[arg(long, value_name = "X", default_value_t = 1e-8)]
    pub eps: f32,
    /// Norm to which a larger gradient is scaled down; 0 leaves every gradient as it is
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub clip: f32,

    /// Weight of the preference loss (lambda)
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub preference_weight: f32,
    /// Weight of the language loss on the chosen side (mu)
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub language_weight: f32,
    /// Adapter to go on with, of the rank and matrices that the recipe says: a folder
    #[arg(long, value_name = "FOLDER")]
    pub init_adapter: Option<PathBuf>,
    /// Rank of the changes of an adapter (LoRA, in PEFT layout), which is trained instead of all weights; 0 trains these
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub lora_rank: usize,
    /// An adapter's changes are multiplied by this and divided by the rank
    #[arg(long, value_name = "X", default_value_t = 16.0)]
    pub lora_alpha: f32,
    /// Matrices that an adapter changes, such as q_proj [default: all of every layer]
    #[arg(long, value_name = "NAME", num_args = 1.., action = ArgAction::Append)]
    pub lora_targets: Vec<String>,
    /// Token that ends every sequence, on which the reward is read [default: the tokenizer's EOS]
    #[arg(long, value_name = "TOKEN")]
    pub end_of_context: Option<String>,

    /// Where the decoder computes: cpu, cuda:N, or auto, which takes a GPU if there is one and the program was built with
    /// CUDA, the first for the first process of a machine, and so on
    #[arg(long, default_value_t = DeviceChoice::Auto, value_name = "DEVICE")]
    #[serde(serialize_with = "as_text")]
    pub device: DeviceChoice,
    /// Type in which the decoder computes
    #[arg(long, value_enum, default_value_t = ComputeType::Bf16)]
    pub dtype: ComputeType,
    /// Tokens that go through the decoder at once; a step's gradient is summed up
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub micro_batch_tokens: usize,
    /// Parts that a batch is cut into; their gradients are added up in a fixed order, so that any number of processes that
    /// divides it gives the same bits
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub shards: usize,
    /// Computes layers again on the way back instead of keeping what they computed
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub checkpointing: bool,
    /// Threads that compute, in each process [default: one for each physical core; processes on a machine share them]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Steps between two measurements on the dev data; 0 measures at the end only
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub evaluate_every: u64,
    /// Steps between two saved states
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub save_every: u64,
    /// Bad lines after which to stop
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_bad_lines: u64,
}

fn as_text<S: Serializer>(value: &DeviceChoice, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Recipe {
    /// What the parser cannot check.
    ///
    /// # Errors
    /// [`Error::Recipe`] with the key and what it may be.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("epochs", self.epochs),
            ("batch", self.batch as u64),
            ("micro-batch-tokens", self.micro_batch_tokens as u64),
            ("save-every", self.save_every),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Recipe(format!("{name} has to be at least 1")));
        }
        if !(1..=self.batch).contains(&self.shards) {
            let (shards, batch) = (self.shards, self.batch);
            return Err(Error::Recipe(format!("shards is {shards}; it has to be from 1 to the batch, {batch}")));
        }
        if self.max_tokens < 2 {
            return Err(Error::Recipe("max-tokens has to be at least 2".into()));
        }
        let fractions = [("beta1", self.beta1), ("beta2", self.beta2)];
        if let Some((name, value)) = fractions.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return Err(Error::Recipe(format!("{name} is {value}; it has to be at least 0 and less than 1")));
        }
        let numbers = [
            ("lr", self.lr),
            ("weight-decay", self.weight_decay),
            ("eps", self.eps),
            ("clip", self.clip),
            ("preference-weight", self.preference_weight),
            ("language-weight", self.language_weight),
            ("lora-alpha", self.lora_alpha),
        ];
        if self.init_adapter.is_some() && self.lora_rank == 0 {
            return Err(Error::Recipe("init-adapter: lora-rank has to be the adapter's".into()));
        }
        match numbers.iter().find(|(_, value)| !value.is_finite() || *value < 0.0) {
            Some((name, value)) => Err(Error::Recipe(format!("{name} is {value}; it has to be a number from 0 on"))),
            None => Ok(()),
        }
    }

    /// The learning rate of a step, from 1 on, out of `total`.
    pub fn lr_at(&self, step: u64, total: u64) -> f32 {
        if step <= self.warmup_steps {
            return (f64::from(self.lr) * step as f64 / self.warmup_steps as f64) as f32;
        }
        // The last step still moves.
        let done = (step - 1 - self.warmup_steps) as f64 / total.saturating_sub(self.warmup_steps).max(1) as f64;
        let factor = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        (f64::from(self.lr) * factor) as f32
    }
}

/// Puts the values of the recipe file that `--config` names among the arguments, unless they are there already. Keys are
/// the flags' names; underscores may stand for dashes.
///
/// # Errors
/// If the file cannot be read or holds what no flag can.
pub fn with_file(arguments: Vec<OsString>) -> Result<Vec<OsString>> {
    let text = |argument: &OsString| argument.to_string_lossy().into_owned();
    let mut file = None;
    let mut given = Vec::new();
    for (i, argument) in arguments.iter().enumerate() {
        let argument = text(argument);
        let Some(flag) = argument.strip_prefix("--") else { continue };
        let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value.to_owned())));
        if name == "config" {
            file = value.or_else(|| arguments.get(i + 1).map(text)).map(PathBuf::from);
        }
        given.push(name.to_owned());
    }
    let Some(file) = file else { return Ok(arguments) };
    let mut all = arguments;
    all.extend(
        read(&file)?.into_iter().filter(|(name, _)| !given.contains(name)).flat_map(|(name, values)| {
            values.into_iter().map(move |value| OsString::from(format!("--{name}={value}")))
        }),
    );
    Ok(all)
}

fn read(path: &Path) -> Result<Vec<(String, Vec<String>)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| malformed(error.to_string()))?;
    let entries = table.into_iter().map(|(key, value)| {
        let values = match value {
            toml::Value::Array(items) => items.iter().map(scalar).collect::<Option<Vec<_>>>(),
            single => scalar(&single).map(|text| vec![text]),
        };
        let wrong = || malformed(format!("`{key}` is not a string, number, boolean or array of these"));
        Ok((key.replace('_', "-"), values.ok_or_else(wrong)?))
    });
    entries.collect()
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[arg(long)]
        config: Option<PathBuf>,
        #[command(flatten)]
        recipe: Recipe,
    }

    #[test]
    fn the_recipes_that_come_with_it_make_sense() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let files = [folder.clone(), folder.join("default")]
            .into_iter()
            .flat_map(|folder| std::fs::read_dir(folder).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
        let mut read = 0;
        for file in files {
            let given = ["plumb-train", "--init=lm", "--train=train.jsonl", "--output=run", "--config"];
            let arguments = given.iter().map(OsString::from).chain([file.clone().into_os_string()]).collect();
            let command = Command::try_parse_from(with_file(arguments).unwrap()).unwrap();
            assert_eq!(command.config, Some(file));
            command.recipe.check().unwrap();
            read += 1;
        }
        assert!(read >= 9, "{read} recipes");
    }
}
