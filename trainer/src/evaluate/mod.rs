//! Measures models as Askell et al. 2021 does, against a checkpoint or a running server.
//!
//! Files become items: texts of which some are right. A scorer gives every text a score; what follows is
//! arithmetic over scores, and knows neither models nor files. A text that does not fit into the model's context, or that
//! makes no sense to it, leaves its item out: that is counted and named, and never hidden in a number.

mod checkpoint;
mod elo;
mod items;
mod lambada;
mod measure;
mod options;
mod plots;
mod ranking;
mod report;
mod rewardbench;
mod scorer;
mod server;
mod sets;
mod tally;

use indicatif::ProgressBar;
use plumb_model::text::TextInput;
use serde::Serialize;
use serde_json::{Value, json};

use self::items::Item;
use self::scorer::{How, Outcome, Scorer};
use crate::input::BadLines;
use crate::{Error, Result, progress};

pub(crate) use measure::calibration;
pub use measure::{ALL, Bin, Calibration, Measurement};
pub use options::{ChatFormat, Form, HhhPrompt, Objective, Options, Task};
pub(crate) use plots::calibration_plot;
pub use scorer::Model;

/// Texts that are rendered and scored together: so many are in memory as tokens.
const CHUNK: usize = 1024;

/// Failures that are named one by one; all are counted.
const NAMED_FAILURES: usize = 100;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Version of the program.
    pub plumb: &'static str,
    /// What was measured.
    pub task: Task,
    /// The model; none for elo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Model>,
    /// How it was measured.
    pub options: Options,
    /// The numbers.
    pub results: Vec<Measurement>,
    /// Calibration curves, where pairs are compared by rewards.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub calibration: Vec<Calibration>,
    /// Items that were read.
    pub items: u64,
    /// Lines that make no sense.
    pub bad_lines: u64,
    /// Items without a score, in all settings together.
    pub failed: u64,
    /// The first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
    /// A line for every item and setting, with its scores.
    #[serde(skip)]
    pub lines: Vec<Value>,
}

/// An item that could not be scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Its file.
    pub file: String,
    /// Its line, row or number there.
    pub line: u64,
    /// Why.
    pub reason: String,
}

/// Measures what the options say, and writes the result into their folder if they name one. `warn` hears of every line
/// that is skipped.
///
/// # Errors
/// If the options make no sense, files or model cannot be read, more lines are bad than allowed, or nothing could be
/// scored.
pub fn evaluate(options: &Options, warn: &mut dyn FnMut(&str)) -> Result<Evaluation> {
    options.check()?;
    let evaluation = match options.task {
        Task::Elo => players(options, warn)?,
        Task::Lambada => lambada::evaluate(options, warn)?,
        _ => Comparing::new(options, warn)?.run()?,
    };
    if evaluation.results.is_empty() {
        let reason = evaluation.failures.first().map_or("the files hold no items", |failure| &failure.reason);
        return Err(Error::Recipe(format!("nothing was measured: {reason}")));
    }
    if let Some(folder) = &options.output {
        report::write(folder, &evaluation)?;
    }
    Ok(evaluation)
}

impl Evaluation {
    fn new(options: &Options, model: Option<Model>) -> Self {
        Self {
            plumb: env!("CARGO_PKG_VERSION"),
            task: options.task,
            model,
            options: options.clone(),
            results: Vec::new(),
            calibration: Vec::new(),
            items: 0,
            bad_lines: 0,
            failed: 0,
            failures: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// The numbers as a table, for people.
    #[must_use]
    pub fn table(&self) -> String {
        report::table(self)
    }

    /// All of it but the items, as JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!(self)
    }

    fn fail(&mut self, file: &str, line: u64, reason: &str) {
        self.failed += 1;
        if self.failures.len() < NAMED_FAILURES {
            self.failures.push(Failure { file: file.to_owned(), line, reason: reason.to_owned() });
        }
    }
}

fn players(options: &Options, warn: &mut dyn FnMut(&str)) -> Result<Evaluation> {
    let mut bad = BadLines::at_most(options.max_bad_lines);
    let read = elo::read(&options.files, options.limit.unwrap_or(usize::MAX), &mut bad, warn)?;
    let results = read.fit(options.anchor.as_deref())?;
    let mut evaluation = Evaluation::new(options, None);
    evaluation.items = read.comparisons.len() as u64;
    evaluation.bad_lines = bad.skipped();
    evaluation.lines = read.lines(&results);
    evaluation.results = results;
    Ok(evaluation)
}

/// The model that the options name.
fn open(options: &Options) -> Result<Box<dyn Scorer>> {
    Ok(match (&options.model, &options.server) {
        (Some(source), _) => Box::new(checkpoint::Checkpoint::open(source, options)?),
        (None, Some(url)) => Box::new(server::Server::open(url, options)?),
        (None, None) => return Err(Error::Recipe("name a checkpoint by --model, or a server by --server".into())),
    })
}

/// Everything that compares scores.
struct Comparing<'a> {
    options: &'a Options,
    files: Vec<String>,
    items: Vec<Item>,
    scorer: Box<dyn Scorer>,
    evaluation: Evaluation,
}

impl<'a> Comparing<'a> {
    fn new(options: &'a Options, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        let (items, bad_lines) = sets::read(options, warn)?;
        let scorer = open(options)?;
        let mut evaluation = Evaluation::new(options, Some(scorer.model().clone()));
        (evaluation.items, evaluation.bad_lines) = (items.len() as u64, bad_lines);
        Ok(Self { options, files: items::names(&options.files), items, scorer, evaluation })
    }

    fn run(mut self) -> Result<Evaluation> {
        let texts: usize = self.items.iter().map(|item| item.texts.len()).sum();
        let bar = progress::bar((texts * self.options.hhh_prompt.len()) as u64, "texts");
        let preference = self.scorer.model().is_preference();
        let objectives = objectives(self.options, preference);
        for &hhh_prompt in &self.options.hhh_prompt {
            let form = self.options.form.unwrap_or_else(|| usual_form(self.options.task, preference, hhh_prompt));
            let items: Vec<Item> = self.items.iter().map(|item| item.clone().in_form(form)).collect();
            let how = How::new(self.options, hhh_prompt, &objectives);
            let outcomes = score(&mut *self.scorer, &items, &how, &bar)?;
            for (item, outcomes) in items.iter().zip(&outcomes) {
                self.keep(item, outcomes, hhh_prompt);
            }
            for &objective in &objectives {
                let views =
                    items.iter().zip(&outcomes).map(|(item, outcomes)| tally::View::new(item, outcomes, objective));
                let views: Vec<_> = views.collect();
                let name = setting(preference, objective, hhh_prompt);
                let (results, calibration) = tally::measure(self.options, preference, &views);
                let named = results.into_iter().map(|m| Measurement { score: Some(name.clone()), ..m });
                self.evaluation.results.extend(named);
                let curve = calibration.map(|curve| Calibration { score: Some(name.clone()), ..curve });
                self.evaluation.calibration.extend(curve);
            }
        }
        bar.finish_and_clear();
        Ok(self.evaluation)
    }

    /// Keeps what an item's texts came to.
    fn keep(&mut self, item: &Item, outcomes: &[Outcome], hhh_prompt: HhhPrompt) {
        let file = &self.files[item.file];
        if let Some(reason) = outcomes.iter().find_map(|outcome| outcome.as_ref().err()) {
            self.evaluation.fail(file, item.line, reason);
        }
        let score = |outcome: &Outcome| match outcome {
            Ok(score) => json!(score),
            Err(reason) => json!({"error": reason}),
        };
        let mut line = json!({
            "file": file,
            "line": item.line,
            "category": item.category,
            "hhh_prompt": hhh_prompt,
            "right": item.right,
            "scores": outcomes.iter().map(score).collect::<Vec<_>>(),
        });
        if let Some(id) = &item.id {
            line["id"] = json!(id);
        }
        if let Some((group, _)) = &item.group {
            line["group"] = json!(group);
        }
        self.evaluation.lines.push(line);
    }
}

/// Scores the texts of all items, and puts what they came to by item.
fn score(scorer: &mut dyn Scorer, items: &[Item], how: &How, bar: &ProgressBar) -> Result<Vec<Vec<Outcome>>> {
    let mut found = Vec::with_capacity(items.len());
    let mut rest = items;
    while !rest.is_empty() {
        let mut texts: Vec<&TextInput> = Vec::new();
        let mut count = 0;
        while count < rest.len() && (texts.is_empty() || texts.len() < CHUNK) {
            texts.extend(&rest[count].texts);
            count += 1;
        }
        let mut outcomes = scorer.score(&texts, how, &mut |done| bar.inc(done))?.into_iter();
        found.extend(rest[..count].iter().map(|item| outcomes.by_ref().take(item.texts.len()).collect()));
        rest = &rest[count..];
    }
    Ok(found)
}

/// What a language model's texts are compared by.
fn objectives(options: &Options, preference: bool) -> Vec<Objective> {
    use Objective::{Mean, MutualInformation, Sum};
    match (preference, &options.objective[..], options.task) {
        // A reward is a reward.
        (true, ..) => vec![Mean],
        // The paper's own first: sections 2.2.1 and B.3.
        (false, [], Task::Hhh) => vec![MutualInformation, Mean, Sum],
        (false, [], Task::Truthfulqa) => vec![Sum, Mean, MutualInformation],
        (false, [], _) => vec![Mean],
        (false, given, _) => given.to_vec(),
    }
}

/// Askell et al. 2021, appendices B.1 and B.3: dialogues behind a prompt of dialogues, and for a model of them.
fn usual_form(task: Task, preference: bool, hhh_prompt: HhhPrompt) -> Form {
    let prompted = hhh_prompt != HhhPrompt::None;
    match task {
        Task::Truthfulqa if preference || prompted => Form::Dialogue,
        Task::Lambada if prompted => Form::Dialogue,
        _ => Form::Plain,
    }
}

/// What a setting is called in a table.
fn setting(preference: bool, objective: Objective, hhh_prompt: HhhPrompt) -> String {
    let score = match (preference, objective) {
        (true, _) => "reward",
        (false, Objective::Mean) => "mean",
        (false, Objective::Sum) => "sum",
        (false, Objective::MutualInformation) => "mutual information",
    };
    match prompt_name(hhh_prompt) {
        None => score.to_owned(),
        Some(prompt) => format!("{score}, {prompt}"),
    }
}

fn prompt_name(hhh_prompt: HhhPrompt) -> Option<&'static str> {
    match hhh_prompt {
        HhhPrompt::None => None,
        HhhPrompt::Short => Some("short HHH prompt"),
        HhhPrompt::Full => Some("full HHH prompt"),
    }
}
