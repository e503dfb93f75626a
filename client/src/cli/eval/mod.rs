//! `plumb eval`: how often a model prefers the better of two answers, by file and by setting.

mod comparisons;
mod tally;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use futures::{StreamExt, stream};
use plumb_client::{ItemFailure, v1};
use serde_json::json;

use self::comparisons::{Comparison, Task};
use self::tally::{Interval, Tally};
use super::args::{Global, HhhPrompt, Objective, Priority};
use super::output::{Lines, describe, markdown, print, print_json};
use super::progress::Progress;
use super::scoring::{Outcome as ItemOutcome, Scorer, ScoringArgs};
use super::{Outcome, Usage};

/// Arguments of `plumb eval`.
#[derive(Args)]
#[command(after_help = "\
Every --objective is measured with every --hhh-prompt, in one command and one table.

Examples:
  plumb eval hhh hhh_alignment/*.task.json --model lm --objective mutual-information \\
      --hhh-prompt none --hhh-prompt full
  plumb eval pairs --model pm helpful.dev.jsonl.gz harmless.dev.jsonl.gz
  plumb eval pairs --model lm --split-turns --objective mean --objective sum helpful.dev.jsonl.gz")]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    task: TaskCommand,
}

#[derive(Subcommand)]
enum TaskCommand {
    /// Files of BIG-bench's hhh_alignment; 95% intervals by cluster bootstrap over prompts
    Hhh(RunArgs),
    /// JSONL files of {"chosen", "rejected"} lines; 95% Wilson intervals
    Pairs(RunArgs),
}

#[derive(Args)]
struct RunArgs {
    /// The files
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Put the helpful, honest, harmless prompt before each conversation; may be given several times
    #[arg(long, value_enum, value_name = "WHICH", default_value = "none")]
    hhh_prompt: Vec<HhhPrompt>,
    /// Score of a language model, a preference model ignores it; may be given several times
    #[arg(long, value_enum, default_value = "mean")]
    objective: Vec<Objective>,
    /// Read Human: and Assistant: markers in strings as turns (hhh files always are)
    #[arg(long)]
    split_turns: bool,
    /// Use this many comparisons of each file
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Resamples of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    resamples: u32,
    /// Write a JSON line for every comparison and setting to this file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    scoring: ScoringArgs,
}

/// A column of the table.
#[derive(Clone, Copy)]
struct Setting {
    objective: Objective,
    hhh_prompt: HhhPrompt,
}

pub(crate) async fn run(global: &Global, args: EvalArgs) -> anyhow::Result<Outcome> {
    let (task, args) = match args.task {
        TaskCommand::Hhh(args) => (Task::Hhh, args),
        TaskCommand::Pairs(args) => (Task::Pairs { split_turns: args.split_turns }, args),
    };
    let names = comparisons::names(&args.files);
    let mut all = Vec::new();
    let mut broken = 0;
    for (file, path) in args.files.iter().enumerate() {
        let read = task.read(file, path).map_err(Usage)?;
        broken += read.broken.len();
        read.broken.iter().for_each(|reason| eprintln!("plumb: {}: {reason}", path.display()));
        all.extend(read.comparisons.into_iter().take(args.limit.unwrap_or(usize::MAX)));
    }
    if all.is_empty() {
        return Err(Usage("no comparisons in these files".into()).into());
    }
    let mut output = args.output.as_deref().map(|path| Lines::open(Some(path))).transpose()?;

    let client = global.connect().await?;
    let settings: Vec<Setting> = args
        .hhh_prompt
        .iter()
        .flat_map(|&hhh_prompt| args.objective.iter().map(move |&objective| Setting { objective, hhh_prompt }))
        .collect();
    let interval = match task {
        Task::Hhh => Interval::ByPrompt { resamples: args.resamples, seed: args.seed },
        Task::Pairs { .. } => Interval::Wilson,
    };
    let mut results = Results::default();
    let mut progress = Progress::over((settings.len() * all.len()) as u64);
    for &setting in &settings {
        let scorer = args.scoring.scorer(&client, setting.objective, setting.hhh_prompt, false, Priority::Low);
        results
            .measure(
                &scorer,
                setting,
                &all,
                &mut progress,
                &mut |line| match &mut output {
                    Some(lines) => lines.write(&line),
                    None => Ok(()),
                },
                &names,
            )
            .await?;
    }
    if let Some(lines) = &mut output {
        lines.flush()?;
    }
    let (items, tokens, seconds) = progress.finish();
    if global.json {
        results.json(&settings, &names, interval)?;
    } else {
        print(results.table(&settings, &names, interval))?;
        print(format!(
            "\n{}. {}\n{items} items, {tokens} tokens, {seconds:.1} s.\n",
            describe(results.model.as_ref()),
            interval.words()
        ))?;
    }
    let failed: u64 = results.columns.iter().map(|tally| tally.failed).sum();
    if failed + broken as u64 > 0 {
        eprintln!("plumb: {failed} comparisons without scores and {broken} broken ones are not counted");
        results.reasons.iter().for_each(|reason| eprintln!("plumb: for example: {reason}"));
        return Ok(Outcome::SomeFailed);
    }
    Ok(Outcome::Done)
}

/// What was measured: a tally for each setting.
#[derive(Default)]
struct Results {
    columns: Vec<Tally>,
    model: Option<v1::ModelIdentity>,
    language: bool,
    /// Why the first few items have no score.
    reasons: Vec<ItemFailure>,
}

impl Results {
    async fn measure(
        &mut self,
        scorer: &Scorer,
        setting: Setting,
        all: &[Comparison],
        progress: &mut Progress,
        write: &mut dyn FnMut(serde_json::Value) -> std::io::Result<()>,
        names: &[String],
    ) -> anyhow::Result<()> {
        // Better and worse of a comparison follow one another; the server sees single items and no order.
        let items = all.iter().flat_map(|c| [(c, Some(c.better.clone())), (c, Some(c.worse.clone()))]);
        let mut batches = std::pin::pin!(scorer.run(stream::iter(items)));
        let mut tally = Tally::default();
        let mut better: Option<Option<f32>> = None;
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            self.model = batch.model.or(self.model.take());
            for (comparison, outcome) in batch.items {
                let (reward, tokens) = self.reward(outcome);
                let Some(first) = better.take() else {
                    progress.advance(0, 1, tokens);
                    better = Some(reward);
                    continue;
                };
                progress.advance(1, 1, tokens);
                tally.add(comparison, first.zip(reward));
                write(json!({
                    "file": names[comparison.file],
                    "comparison": comparison.number,
                    "objective": setting.objective.to_string(),
                    "hhh_prompt": setting.hhh_prompt.to_string(),
                    "better": first,
                    "worse": reward,
                }))?;
            }
        }
        self.columns.push(tally);
        Ok(())
    }

    fn reward(&mut self, outcome: ItemOutcome) -> (Option<f32>, u64) {
        const REASONS: usize = 3;
        match outcome {
            Some(Ok(score)) => {
                self.language |= score.log_probs.is_some();
                (Some(score.reward), u64::from(score.input_tokens))
            }
            Some(Err(failure)) => {
                if self.reasons.len() < REASONS && !self.reasons.contains(&failure) {
                    self.reasons.push(failure);
                }
                (None, 0)
            }
            None => (None, 0),
        }
    }

    fn table(&self, settings: &[Setting], names: &[String], interval: Interval) -> String {
        let mut header = vec!["file".into(), "comparisons".into(), "prompts".into()];
        header.extend(settings.iter().map(|setting| {
            let objective = if self.language { setting.objective.to_string() } else { "reward".into() };
            match setting.hhh_prompt {
                HhhPrompt::None => format!("{objective}, no HHH prompt"),
                which => format!("{objective}, {which} HHH prompt"),
            }
        }));
        let row = |file: Option<usize>| {
            let name = file.map_or("all", |file| names[file].as_str());
            let (n, prompts) = self.columns.first().map(|tally| tally.size(file)).unwrap_or_default();
            let mut row = vec![name.to_owned(), n.to_string(), prompts.to_string()];
            row.extend(self.columns.iter().map(|tally| tally.cell(file, interval)));
            row
        };
        let files = (0..names.len()).map(Some).chain((names.len() > 1).then_some(None));
        markdown(header, files.map(row).collect())
    }

    fn json(&self, settings: &[Setting], names: &[String], interval: Interval) -> anyhow::Result<()> {
        for file in (0..names.len()).map(Some).chain([None]) {
            for (setting, tally) in settings.iter().zip(&self.columns) {
                let accuracy = tally.accuracy(file, interval);
                let (comparisons, prompts) = tally.size(file);
                print_json(&json!({
                    "file": file.map_or("all", |file| names[file].as_str()),
                    "objective": self.language.then(|| setting.objective.to_string()),
                    "hhh_prompt": setting.hhh_prompt.to_string(),
                    "comparisons": comparisons,
                    "prompts": prompts,
                    "measured": accuracy.as_ref().map_or(0, |a| a.n),
                    "ties": accuracy.as_ref().map(|a| a.ties),
                    "accuracy": accuracy.as_ref().map(|a| a.rate),
                    "low": accuracy.as_ref().map(|a| a.low),
                    "high": accuracy.as_ref().map(|a| a.high),
                    "model": self.model.as_ref().map(|m| &m.name),
                    "version": self.model.as_ref().map(|m| m.version),
                    "weights_digest": self.model.as_ref().map(|m| &m.weights_digest),
                }))?;
            }
        }
        Ok(())
    }
}
