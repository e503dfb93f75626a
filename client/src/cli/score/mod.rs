//! `plumb score`: texts, dialogues and pairs, from the command line, files, folders or standard input.

mod bulk;

mod manifest;
mod table;
mod target;

use std::path::PathBuf;

use clap::Args;
use futures::{StreamExt, stream};
use plumb_client::{ItemFailure, v1};
use serde::Serialize;

use self::bulk::BulkArgs;
use self::target::{Sink, Target};
use super::args::{Global, HhhPrompt, Objective, Priority};
use super::input::{Body, Reading, Record, preview, prompt_input, with_response};
use super::output::{Failure, Lines, Model, Origin, describe, print, table, visible};
use super::progress::Progress;
use super::scoring::{Batch, ScoringArgs};
use super::source::{self, ReadLine, SourceArgs};
use super::stats::{Distribution, Preferences};
use super::{Outcome, Usage};

const EXAMPLES: &str = "\
A line of a file, or a row of a Parquet file by its columns, is one of
  {\"text\": \"...\"}
  {\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, ...]}
  {\"prompt\": \"...\" or messages, \"response\": \"...\"}
  {\"prompt\": \"...\" or messages, \"candidates\": [\"...\", ...]}
  {\"chosen\": \"...\" or messages, \"rejected\": \"...\" or messages}, with or without \"prompt\"
An \"id\" is carried through; other keys are passed over.

Examples:
  plumb score --prompt 'What is 2 + 2?' --response '4.' --response 'Five.'
  plumb score --text 'A text as it is.'
  plumb score --model pm --json pairs.jsonl.gz > rewards.jsonl
  zcat dialogues.jsonl.gz | plumb score --limit 100 -
  plumb --server http://gpu1:50051,http://gpu2:50051 score --output-dir scored/ --concurrency 64 texts/
  plumb score --output-dir scored/ --shard \"$JOB_COMPLETION_INDEX/16\" --keep '*' texts/
  plumb score --model lm --objective mutual-information --hhh-prompt full dialogues.jsonl";

/// Arguments of `plumb score`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ScoreArgs {
    /// Parquet or JSONL files, JSONL also packed (.gz, .zst); - is standard input; with --output-dir also folders
    #[arg(value_name = "FILE", conflicts_with_all = ["text", "prompt"])]
    pub(crate) files: Vec<PathBuf>,
    /// A text to score as it is; may be given several times
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt")]
    text: Vec<String>,
    /// A user's prompt, whose responses are scored
    #[arg(long, value_name = "TEXT", requires = "response")]
    prompt: Option<String>,
    /// A response to --prompt; may be given several times
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    response: Vec<String>,
    /// Score of a language model; a preference model ignores it
    #[arg(long, value_enum, default_value_t = Objective::Mean)]
    objective: Objective,
    /// Put the helpful, honest, harmless prompt before each conversation
    #[arg(long, value_enum, default_value_t = HhhPrompt::None, value_name = "WHICH")]
    hhh_prompt: HhhPrompt,
    /// Also show a value for every token
    #[arg(long)]
    per_token: bool,
    /// Write JSON lines to this file, and the summary to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    bulk: BulkArgs,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    scoring: ScoringArgs,
}

pub(crate) async fn run(global: &Global, args: ScoreArgs) -> anyhow::Result<Outcome> {
    if args.bulk.is_asked_for() {
        return bulk::run(global, args).await;
    }
    let reading = args.source.reading();
    let literal = literals(&args, reading)?;
    let files = if literal.is_empty() { source::files_or_stdin(args.files)? } else { Vec::new() };
    let sink = match &args.output {
        Some(path) => Sink::Lines(Lines::open(Some(path))?),
        None if global.json => Sink::Lines(Lines::open(None)?),
        None => Sink::Shown,
    };
    let client = global.connect().await?;
    let scorer = args.scoring.scorer(&client, args.objective, args.hhh_prompt, args.per_token, Priority::Normal);

    let progress = if files.is_empty() { Progress::hidden() } else { Progress::files(&files, args.source.limit) };
    let several_files = files.len() > 1;
    let mut report = Report { several_files, ..Report::new(progress) };
    let mut target = Target::new(sink);
    let reads = stream::iter(literal).chain(source::read(files, reading, args.source.limit));
    let batches = scorer.run(reads.flat_map(|read| stream::iter(slots(read))));
    let mut batches = std::pin::pin!(batches);
    while let Some(batch) = batches.next().await {
        report.batch(&mut target, batch?)?;
    }
    // With JSON on standard output the summary belongs beside it.
    report.finish(&target, global.json && args.output.is_none())
}

fn literals(args: &ScoreArgs, reading: Reading) -> Result<Vec<ReadLine>, Usage> {
    let mut bodies: Vec<Body> = args.text.iter().map(|text| Body::Single(plumb_client::text(text.as_str()))).collect();
    if let Some(prompt) = &args.prompt {
        let prompt = prompt_input(prompt.clone(), reading).map_err(Usage)?;
        bodies.extend(args.response.iter().map(|response| Body::Single(with_response(&prompt, response))));
    }
    Ok(source::records(bodies))
}

/// An item's place in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Chosen,
    Rejected,
}

/// What is remembered of an item while it is scored.
struct Slot {
    record: Result<Header, source::Broken>,
    side: Option<Side>,
    candidate: Option<usize>,
    preview: String,
    /// Whether this is the record's last item.
    last: bool,
}

/// A record without its texts.
struct Header {
    place: super::input::Place,
    id: Option<serde_json::Value>,
}

fn slots(read: ReadLine) -> Vec<(Slot, Option<v1::Input>)> {
    let Record { place, id, body } = match read {
        Ok(record) => record,
        Err(broken) => {
            let slot = Slot { record: Err(broken), side: None, candidate: None, preview: String::new(), last: true };
            return vec![(slot, None)];
        }
    };
    let slot = |input: v1::Input, side, candidate, last| {
        let record = Ok(Header { place: place.clone(), id: id.clone() });
        (Slot { record, side, candidate, preview: preview(&input), last }, Some(input))
    };
    match body {
        Body::Single(input) => vec![slot(input, None, None, true)],
        Body::Pair { chosen, rejected } => {
            vec![slot(chosen, Some(Side::Chosen), None, false), slot(rejected, Some(Side::Rejected), None, true)]
        }
        Body::Candidates { prompt, candidates } => {
            let last = candidates.len().saturating_sub(1);
            let input = |candidate: &String| with_response(&prompt, candidate);
            candidates.iter().enumerate().map(|(i, c)| slot(input(c), None, Some(i), i == last)).collect()
        }
    }
}

/// A line of JSON for an item.
#[derive(Serialize)]
struct ItemLine<'a> {
    #[serde(flatten)]
    origin: &'a Origin,
    #[serde(skip_serializing_if = "Option::is_none")]
    side: Option<Side>,
    #[serde(skip_serializing_if = "Option::is_none")]
    candidate: Option<usize>,
    #[serde(flatten)]
    scored: Option<Scored>,
    #[serde(flatten)]
    model: Option<Model>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

#[derive(Serialize)]
struct Scored {
    reward: f32,
    input_tokens: u32,
    cached_tokens: u32,
    truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    log_probs: Option<LogProbs>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tokens: Vec<TokenValue>,
}

#[derive(Serialize)]
struct LogProbs {
    sum: f32,
    mean: f32,
    response_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    unconditional_sum: Option<f32>,
    greedy: bool,
}

#[derive(Serialize)]
struct TokenValue {
    id: u32,
    text: String,
    value: f32,
}

impl From<&v1::Score> for Scored {
    fn from(score: &v1::Score) -> Self {
        let token = |t: &v1::TokenValue| TokenValue { id: t.id, text: t.text.clone(), value: t.value };
        Self {
            reward: score.reward,
            input_tokens: score.input_tokens,
            cached_tokens: score.cached_tokens,
            truncated: score.truncated,
            log_probs: score.log_probs.as_ref().map(|l| LogProbs {
                sum: l.sum,
                mean: l.mean,
                response_tokens: l.response_tokens,
                unconditional_sum: l.unconditional_sum,
                greedy: l.greedy,
            }),
            tokens: score.tokens.iter().map(token).collect(),
        }
    }
}

/// More rows than this are summed up instead of shown.
const ROWS: usize = 50;

/// What is said about the items: a line each, or a table, or numbers.
struct Report {
    progress: Progress,
    several_files: bool,
    model: Option<v1::ModelIdentity>,
    rows: Vec<[String; 8]>,
    tokens: String,
    rewards: Distribution,
    pairs: Preferences,
    cached: u64,
    truncated: u64,
    failed: u64,
    broken: u64,
}

impl Report {
    fn new(progress: Progress) -> Self {
        Self {
            progress,
            several_files: false,
            model: None,
            rows: Vec::new(),
            tokens: String::new(),
            rewards: Distribution::default(),
            pairs: Preferences::default(),
            cached: 0,
            truncated: 0,
            failed: 0,
            broken: 0,
        }
    }

    fn batch(&mut self, target: &mut Target, batch: Batch<Slot>) -> anyhow::Result<()> {
        target.totals.answered_by(batch.model.as_ref());
        for (slot, outcome) in batch.items {
            match (&slot.record, outcome) {
                (Ok(record), Some(outcome)) => {
                    let origin = Origin::new(&record.place, record.id.as_ref(), self.several_files);
                    self.item(target, &slot, &origin, outcome, batch.model.as_ref())?;
                }
                (Ok(_), None) => {}
                (Err(broken), _) => self.broken(target, broken)?,
            }
        }
        self.model = batch.model.or(self.model.take());
        if let Sink::Lines(lines) = &mut target.sink {
            lines.flush()?;
        }
        Ok(())
    }

    fn item(
        &mut self,
        target: &mut Target,
        slot: &Slot,
        origin: &Origin,
        outcome: Result<v1::Score, ItemFailure>,
        model: Option<&v1::ModelIdentity>,
    ) -> anyhow::Result<()> {
        let outcome = target.count(outcome, model, slot.last);
        let tokens = outcome.as_ref().map_or(0, |score| u64::from(score.input_tokens));
        self.progress.advance(u64::from(slot.last), 1, tokens);
        self.count(&mut target.chosen, slot.side, &outcome);
        let lines = match &mut target.sink {
            Sink::Lines(lines) => lines,
            Sink::Table(table) => return Ok(table.item(&outcome, slot.last, model)?),
            Sink::Shown => {
                self.row(slot, origin, &outcome);
                return Ok(());
            }
        };
        let line = ItemLine {
            origin,
            side: slot.side,
            candidate: slot.candidate,
            scored: outcome.as_ref().ok().map(Scored::from),
            model: model.filter(|_| outcome.is_ok()).map(Model::from),
            error: outcome.as_ref().err().map(Failure::from),
        };
        Ok(lines.write(&line)?)
    }

    fn count(&mut self, first: &mut Option<f32>, side: Option<Side>, outcome: &Result<v1::Score, ItemFailure>) {
        let reward = outcome.as_ref().ok().map(|score| score.reward);
        match outcome {
            Ok(score) => {
                self.rewards.add(f64::from(score.reward));
                self.cached += u64::from(score.cached_tokens);
                self.truncated += u64::from(score.truncated);
            }
            Err(_) => self.failed += 1,
        }
        match side {
            Some(Side::Chosen) => *first = reward,
            Some(Side::Rejected) => {
                if let (Some(chosen), Some(rejected)) = (first.take(), reward) {
                    self.pairs.add(chosen, rejected);
                }
            }
            None => {}
        }
    }

    fn row(&mut self, slot: &Slot, origin: &Origin, outcome: &Result<v1::Score, ItemFailure>) {
        if self.rows.len() > ROWS {
            return;
        }
        let side = match (slot.side, slot.candidate) {
            (Some(Side::Chosen), _) => "chosen".into(),
            (Some(Side::Rejected), _) => "rejected".into(),
            (None, Some(i)) => i.to_string(),
            (None, None) => String::new(),
        };
        let [reward, tokens, cached, response, text] = match outcome {
            Ok(score) => [
                format!("{:.6}", score.reward),
                score.input_tokens.to_string() + if score.truncated { " (cut)" } else { "" },
                score.cached_tokens.to_string(),
                score.log_probs.as_ref().map(|l| l.response_tokens.to_string()).unwrap_or_default(),
                slot.preview.clone(),
            ],
            Err(failure) => ["failed".into(), String::new(), String::new(), String::new(), failure.to_string()],
        };
        self.rows.push([origin.short(), origin.id(), side, reward, tokens, cached, response, text]);
        if let Ok(score) = outcome
            && !score.tokens.is_empty()
        {
            let rows = score.tokens.iter().map(|t| [t.id.to_string(), format!("{:.6}", t.value), visible(&t.text)]);
            self.tokens += &format!("\nline {}:\n{}", origin.short(), table(["id", "value", "token"], rows));
        }
    }

    fn broken(&mut self, target: &mut Target, broken: &source::Broken) -> anyhow::Result<()> {
        target.count_broken();
        self.broken += 1;
        self.progress.advance(1, 0, 0);
        self.progress.note(&format!("plumb: {}: {}", broken.place, broken.reason));
        let lines = match &mut target.sink {
            Sink::Lines(lines) => lines,
            Sink::Table(table) => return Ok(table.broken(&broken.reason)?),
            Sink::Shown => return Ok(()),
        };
        let failure = ItemFailure { code: plumb_client::Code::InvalidArgument, message: broken.reason.clone() };
        Ok(lines.write(&ItemLine {
            origin: &Origin::new(&broken.place, None, self.several_files),
            side: None,
            candidate: None,
            scored: None,
            model: None,
            error: Some(Failure::from(&failure)),
        })?)
    }

    fn finish(self, target: &Target, json_on_stdout: bool) -> anyhow::Result<Outcome> {
        let is_shown = matches!(target.sink, Sink::Shown);
        let (items, tokens, seconds) = self.progress.finish();
        let mut text = String::new();
        if is_shown && self.rows.len() <= ROWS && !self.rows.is_empty() {
            let header = ["line", "id", "side", "reward", "tokens", "cached", "response", "text"];
            text += &table(header, self.rows);
            text += &self.tokens;
            text += "\n";
        } else if self.rewards.n() > ROWS as u64 {
            text += &self.rewards.describe("reward");
        }
        text += &self.pairs.describe();
        text += &format!(
            "{items} items, {tokens} tokens ({} cached), {seconds:.1} s, {:.1} items/s, {:.0} tok/s, {}\n",
            self.cached,
            items as f64 / seconds,
            tokens as f64 / seconds,
            describe(self.model.as_ref()),
        );
        for (n, what) in
            [(self.truncated, "items cut to fit"), (self.failed, "items failed"), (self.broken, "broken lines")]
        {
            if n > 0 {
                text += &format!("{n} {what}\n");
            }
        }
        if json_on_stdout {
            eprint!("{text}");
        } else {
            print(text)?;
        }
        Ok(if self.failed + self.broken > 0 { Outcome::SomeFailed } else { Outcome::Done })
    }
}
