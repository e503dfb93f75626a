//! From the data sets of Askell et al. 2021, and others, to lines that a run learns from.
//!
//! Files are read as streams, packed or not. Records go into a number of drawers by a hash of their content, are sorted by
//! that hash, and written: the order of a file never reaches the model, equal records meet and one of them stays, and no
//! more than a drawer is ever in memory. Whole questions go to the dev side, by a hash of the question.

mod code;
mod drawers;
mod html;
mod parts;
mod reddit;
pub(crate) mod sets;
mod stack_exchange;
mod wikipedia;
mod wikitext;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;

use crate::data::TAGS;
use crate::input::BadLines;
use crate::output::{Whole, Written};
use crate::sandbox::Sandbox;
use crate::{Error, Result};
use drawers::Drawers;

/// A data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dataset {
    /// Stack Exchange: Posts.xml of a dump, or JSONL of questions with their answers
    StackExchange,
    /// Reddit: Pushshift's JSONL of submissions and of comments, all files at once
    Reddit,
    /// Wikipedia: MediaWiki XML with all revisions; a section before and after a revert of vandalism
    Wikipedia,
    /// Edits: JSONL with before, after and is_revert or comment, or WikiSplit's TSV
    WikiEdits,
    /// Summaries of posts: JSONL of OpenAI's comparisons, with info, summaries and choice
    SummarizeFromFeedback,
    /// Anthropic's helpful and harmless dialogues: JSONL with chosen and rejected transcripts
    HhRlhf,
    /// HellaSwag: JSONL with ctx, endings and label; the right ending and a wrong one
    Hellaswag,
    /// Ethics, utilitarianism: CSV with the more pleasant scenario first
    EthicsUtilitarianism,
    /// Ethics, justice: CSV with label and scenario
    EthicsJustice,
    /// Ethics, deontology: CSV with label, scenario and excuse
    EthicsDeontology,
    /// Ethics, commonsense morality: CSV with label and input
    EthicsCommonsense,
    /// Ethics, virtue: CSV with label and a scenario that ends in `[SEP]` and a trait
    EthicsVirtue,
    /// WebGPT comparisons: a JSON list with two dialogues and two scores
    Webgpt,
    /// Solutions marked right or wrong: JSONL of GSM8K's example model solutions
    Gsm8kSolutions,
    /// Code: JSONL of HumanEval, MBPP or QuixBugs, and of samples with response and prompt or id; all files at once
    Code,
    /// Anything: JSONL with chosen and rejected, with or without a prompt
    Pairs,
    /// Plain text: a document a file, or JSONL with text
    Text,
}

/// How records become lines.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Share of the questions that goes to the dev side.
    pub dev_share: f64,
    /// Of the order, the split and what is drawn.
    pub seed: u64,
    /// Makes two pairs of each: GOOD:A over BAD:A, and BAD:B over GOOD:B (Askell et al. 2021, section 4.1).
    pub binarise: bool,
    /// Bad lines after which to stop.
    pub max_bad_lines: u64,
    /// Where programs are run, for `code`.
    pub sandbox: Option<Sandbox>,
}

/// What was read and written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Questions, scenarios or lines that were read.
    pub read: u64,
    /// Lines of train.jsonl.
    pub train: u64,
    /// Lines of dev.jsonl.
    pub dev: u64,
    /// Records that were left out, by reason.
    pub dropped: BTreeMap<String, u64>,
}

/// What is learned from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    /// Records of one group are on one side of the split.
    pub(crate) group: String,
    pub(crate) body: Body,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Body {
    Text(String),
    /// The better and the worse continuation of a prompt.
    Pair {
        prompt: String,
        chosen: String,
        rejected: String,
    },
    /// The same for a dialogue, as role and content; the sides are whole dialogues where `prompt` is empty.
    Dialogue {
        prompt: Vec<Turn>,
        chosen: Vec<Turn>,
        rejected: Vec<Turn>,
    },
}

/// Role and content.
pub(crate) type Turn = (&'static str, String);

/// Reads files of a data set and writes `train.jsonl`, `dev.jsonl` and `counts.json` into a folder that holds none yet.
///
/// # Errors
/// If a file cannot be read, more lines are bad than allowed, or the folder holds prepared data.
pub fn prepare(
    dataset: Dataset,
    files: &[PathBuf],
    output: &Path,
    options: &Options,
    warn: &mut dyn FnMut(&str),
) -> Result<Counts> {
    if !(0.0..1.0).contains(&options.dev_share) {
        return Err(Error::Recipe(format!(
            "dev-share is {}; it has to be at least 0 and less than 1",
            options.dev_share
        )));
    }
    fs::create_dir_all(output).map_err(Error::io(output))?;
    let [train, dev, counted] = ["train.jsonl", "dev.jsonl", "counts.json"].map(|name| output.join(name));
    if let Some(old) = [&train, &dev, &counted].into_iter().find(|path| path.exists()) {
        return Err(Error::Recipe(format!("{} exists: name another folder", old.display())));
    }
    let mut drawers = Drawers::new(output, options.seed)?;
    let mut counts = Counts::default();
    let mut sink = Sink {
        drawers: &mut drawers,
        counts: &mut counts,
        options,
        bad: BadLines::at_most(options.max_bad_lines),
        warn,
    };
    match dataset {
        // A comment and its post may lie in different files.
        Dataset::Reddit => reddit::read(files, &mut sink)?,
        // So may a sample and its problem.
        Dataset::Code => code::read(files, &mut sink)?,
        _ => files.iter().try_for_each(|file| sets::read(dataset, file, &mut sink))?,
    }
    let is_dev = |group: &str| drawers::share(options.seed, "dev", group) < options.dev_share;
    let mut outputs = [Whole::create(&train)?, Whole::create(&dev)?];
    let [train, dev] = &mut outputs;
    let [written_train, written_dev, twice] = drawers.write([train, dev], is_dev)?;
    (counts.train, counts.dev) = (written_train, written_dev);
    if twice > 0 {
        counts.dropped.insert("exact duplicate".to_owned(), twice);
    }
    let names = files.iter().map(|file| file.file_name().unwrap_or_default().to_string_lossy());
    let about = json!({
        "dataset": dataset.to_possible_value().map(|value| value.get_name().to_owned()),
        "files": names.collect::<Vec<_>>(),
        "seed": options.seed,
        "dev-share": options.dev_share,
        "binarise": options.binarise,
        "counts": counts,
    });
    let [train, dev] = outputs;
    let mut about_file = Whole::create(&counted)?;
    about_file.line(&format!("{about:#}"))?;
    // All are on the disk before any has its name.
    let written = [train, dev, about_file].map(Whole::written);
    written.into_iter().collect::<Result<Vec<_>>>()?.into_iter().try_for_each(Written::publish)?;
    Ok(counts)
}

/// Where readers put what they find.
pub(crate) struct Sink<'a> {
    drawers: &'a mut Drawers,
    counts: &'a mut Counts,
    options: &'a Options,
    bad: BadLines,
    warn: &'a mut dyn FnMut(&str),
}

impl Sink<'_> {
    /// One more question, scenario or line.
    pub(crate) fn read(&mut self) {
        self.counts.read += 1;
    }

    /// A folder for what does not fit into memory, which goes when it is dropped.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir> {
        self.drawers.scratch()
    }

    /// A number from 0 to 1 that belongs to a question and a purpose.
    pub(crate) fn draw(&self, purpose: &str, group: &str) -> f64 {
        drawers::share(self.options.seed, purpose, group)
    }

    /// A number that belongs to a text.
    pub(crate) fn number(&self, text: &str) -> u64 {
        u64::from(drawers::number(self.options.seed, "number", text))
    }

    /// Something to learn from.
    pub(crate) fn record(&mut self, record: Record) -> Result<()> {
        let useless = match &record.body {
            Body::Text(text) => text.trim().is_empty().then_some("empty text"),
            Body::Pair { chosen, rejected, .. } if chosen == rejected => Some("equal sides"),
            Body::Dialogue { chosen, rejected, .. } if chosen == rejected => Some("equal sides"),
            Body::Pair { chosen, rejected, .. } => {
                (chosen.trim().is_empty() || rejected.trim().is_empty()).then_some("empty response")
            }
            Body::Dialogue { chosen, rejected, .. } => {
                let empty = |side: &[Turn]| side.last().is_none_or(|(_, content)| content.trim().is_empty());
                (empty(chosen) || empty(rejected)).then_some("empty response")
            }
        };
        if let Some(reason) = useless {
            self.drop(reason);
            return Ok(());
        }
        if !self.options.binarise {
            return self.drawers.put(&record);
        }
        let Body::Pair { prompt, chosen, rejected } = record.body else {
            return Err(Error::Recipe("binarise goes with pairs of texts, not with dialogues or plain text".into()));
        };
        let [good, bad] = TAGS;
        for (side, better, worse) in [(chosen, good, bad), (rejected, bad, good)] {
            let tagged = |tag: &str| format!("{tag}{prompt}{side}");
            let body = Body::Pair { prompt: String::new(), chosen: tagged(better), rejected: tagged(worse) };
            self.drawers.put(&Record { group: record.group.clone(), body })?;
        }
        Ok(())
    }

    /// Nothing can be learned from something, and why.
    pub(crate) fn drop(&mut self, reason: &str) {
        *self.counts.dropped.entry(reason.to_owned()).or_default() += 1;
    }

    /// A line that makes no sense.
    pub(crate) fn bad(&mut self, path: &Path, line: u64, reason: &str) -> Result<()> {
        self.drop("bad line");
        self.bad.skip(path, line, reason, self.warn)
    }
}
