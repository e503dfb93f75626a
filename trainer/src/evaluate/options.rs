//! What is to be measured, of what, and how.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::recipe::ComputeType;
use crate::{Error, Result};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// How often the chosen side is found better, by how much, and how well that is calibrated: JSONL with chosen and
    /// rejected, with or without a prompt, as a run learns from
    Pairs,
    /// The same, and how often all lines with the same group are right
    Groups,
    /// How often the right one of several responses is found best: JSONL with prompt, choices and label
    Choices,
    /// HellaSwag: JSONL with ctx, endings and label
    Hellaswag,
    /// Ethics, utilitarianism: CSV with the more pleasant scenario first
    EthicsUtilitarianism,
    /// Ethics, justice: CSV with label and scenario, four rows a group
    EthicsJustice,
    /// Ethics, deontology: CSV with label, scenario and excuse, four rows a group
    EthicsDeontology,
    /// Ethics, commonsense morality: CSV with label and input
    EthicsCommonsense,
    /// Ethics, virtue: CSV with label and a scenario that ends in `[SEP]` and a trait, five rows a group
    EthicsVirtue,
    /// BIG-bench's hhh_alignment: task.json files, a category each
    Hhh,
    /// TruthfulQA, one right answer (MC1): mc_task.json
    Truthfulqa,
    /// LAMBADA: whether the likeliest continuation is the last word; JSONL with context and continuation, or with text
    Lambada,
    /// How often the best-scored of k samples is correct: JSONL with id, prompt, response and correct
    Rerank,
    /// Reward of the best of k samples for every k, and how far that is from one sample at most: JSONL with id, prompt and
    /// response, as `plumb-train sample --samples` writes it
    BestOfN,
    /// RewardBench: JSONL with prompt, chosen, rejected and subset, of version 1 or 2
    Rewardbench,
    /// RM-Bench: JSON lists of prompts with three styles of chosen and of rejected
    RmBench,
    /// Elo of players, without any model: JSONL with a, b, games and wins_a, or win_rate
    Elo,
}

/// What a language model's sequences are compared by (a preference model's by their rewards).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Mean log-probability of the response's tokens
    Mean,
    /// Sum of the log-probabilities
    Sum,
    /// log P(response | query) - log P(response)
    MutualInformation,
}

/// Which HHH prompt stands before a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HhhPrompt {
    /// None
    None,
    /// One example conversation, for small contexts
    Short,
    /// All conversations
    Full,
}

/// How a prompt that is a string becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As it is, the response following
    Plain,
    /// As the user's turn, the response being the assistant's
    Dialogue,
}

/// How a conversation becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChatFormat {
    /// The model's own template
    Template,
    /// Human: and Assistant: turns separated by a blank line
    HumanAssistant,
}

/// An evaluation.
#[derive(Clone, Debug, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    /// What is measured
    #[arg(value_enum)]
    pub task: Task,
    /// Files, plain or packed by gzip, bzip2 or zstd
    #[arg(value_name = "FILE", required = true)]
    #[serde(serialize_with = "names_only")]
    pub files: Vec<PathBuf>,

    /// Checkpoint to measure: a folder, a .gguf file or a Hugging Face repository
    #[arg(long, value_name = "SOURCE", help_heading = MODEL)]
    pub model: Option<String>,
    /// LoRA adapter to merge into it
    #[arg(long, value_name = "SOURCE", requires = "model", help_heading = MODEL)]
    pub adapter: Option<String>,
    /// Address of a running server to ask instead
    #[arg(long, value_name = "URL", conflicts_with = "model", help_heading = MODEL)]
    pub server: Option<String>,
    /// Which of its models [default: the one for the task]
    #[arg(long, value_name = "MODEL", requires = "server", help_heading = MODEL)]
    pub name: Option<String>,
    /// Which version of that [default: the one labelled stable, else the newest]
    #[arg(long, value_name = "N", requires = "server", help_heading = MODEL)]
    pub version: Option<u64>,
    /// Bearer token for the server
    #[arg(long, value_name = "KEY", env = "PLUMB_API_KEY", hide_env_values = true, help_heading = MODEL)]
    #[serde(skip)]
    pub api_key: Option<String>,
    /// Type in which the checkpoint computes [default: bf16 if it is bf16 or quantised, else f32]
    #[arg(long, value_enum, requires = "model", help_heading = MODEL)]
    pub dtype: Option<ComputeType>,
    /// Most memory for keys and values of a checkpoint, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, help_heading = MODEL)]
    #[serde(skip)]
    pub kv_cache_mib: usize,
    /// Threads that compute [default: one for each physical core]
    #[arg(long, value_name = "N", help_heading = MODEL)]
    #[serde(skip)]
    pub threads: Option<usize>,

    /// What a language model's sequences are compared by; may be given several times [default: mean; all three for hhh
    /// and truthfulqa]
    #[arg(long, value_enum, help_heading = TEXT)]
    pub objective: Vec<Objective>,
    /// HHH prompt before each text; may be given several times
    #[arg(long, value_enum, default_value = "none", help_heading = TEXT)]
    pub hhh_prompt: Vec<HhhPrompt>,
    /// File with another HHH prompt than Plumb's own, for a checkpoint
    #[arg(long, value_name = "FILE", requires = "model", help_heading = TEXT)]
    pub hhh_prompt_file: Option<PathBuf>,
    /// What becomes of prompts that are strings [default: plain; for truthfulqa dialogue with a preference model, and
    /// for it and lambada with an HHH prompt]
    #[arg(long, value_enum, help_heading = TEXT)]
    pub form: Option<Form>,
    /// How a conversation becomes text [default: the model's template, or human-assistant if it has none]
    #[arg(long, value_enum, help_heading = TEXT)]
    pub chat_format: Option<ChatFormat>,
    /// Cut texts over the model's limit at the left, instead of leaving their items out
    #[arg(long, help_heading = TEXT)]
    pub auto_truncate: bool,

    /// Items to take from each file: lines, groups or problems
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Player of elo who is at 0 [default: the first]
    #[arg(long, value_name = "PLAYER")]
    pub anchor: Option<String>,
    /// Of intervals, and of which side is first in the calibration
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Resamples of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub resamples: u32,
    /// Bad lines after which to stop
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_bad_lines: u64,
    /// Folder for results.json, items.jsonl and plots
    #[arg(long, value_name = "FOLDER")]
    #[serde(skip)]
    pub output: Option<PathBuf>,
    /// Print results.json instead of a table
    #[arg(long)]
    #[serde(skip)]
    pub json: bool,
}

const MODEL: &str = "Model";
const TEXT: &str = "Scores and text";

impl Options {
    /// What the parser cannot check.
    ///
    /// # Errors
    /// [`Error::Recipe`] with the option and what it may be.
    pub fn check(&self) -> Result<()> {
        let problem = |reason: &str| Err(Error::Recipe(reason.to_owned()));
        match (self.task, self.model.is_some() || self.server.is_some()) {
            (Task::Elo, true) => return problem("elo needs no model: leave --model and --server out"),
            (Task::Elo, false) => {}
            (_, false) => return problem("name a checkpoint by --model, or a server by --server"),
            (_, true) => {}
        }
        if self.anchor.is_some() && self.task != Task::Elo {
            return problem("--anchor goes with elo");
        }
        if self.task == Task::Lambada && !self.objective.is_empty() {
            return problem("lambada compares tokens, no scores: leave --objective out");
        }
        if self.limit == Some(0) || self.threads == Some(0) || self.resamples == 0 {
            return problem("limit, threads and resamples have to be at least 1");
        }
        if let Some(folder) = &self.output
            && let Some(old) = super::report::OUTPUTS.map(|name| folder.join(name)).iter().find(|path| path.exists())
        {
            return Err(Error::Recipe(format!("{} exists: name another folder", old.display())));
        }
        Ok(())
    }
}

/// Files by their names: where they lie is nobody's business.
fn names_only<S: serde::Serializer>(files: &[PathBuf], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(files.iter().map(|file| file.file_name().unwrap_or_default().to_string_lossy()))
}
