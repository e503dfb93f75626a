//! `plumb rank`: candidate responses to a prompt, best first.

use std::path::PathBuf;

use clap::Args;
use futures::{StreamExt, stream};
use plumb_client::{Client, Error, ItemFailure, v1};
use serde::Serialize;

use super::args::{FlowArgs, Global, HhhPrompt, ModelArgs, Objective, Priority, TextArgs};
use super::input::{Body, Reading, Record, prompt_input, shorten};
use super::output::{Failure, Model, Origin, describe, print, print_json, table};
use super::progress::Progress;
use super::scoring::is_passing;
use super::source::{self, ReadLine, SourceArgs};
use super::{Outcome, Usage};

const EXAMPLES: &str = "\
Examples:
  plumb rank --prompt 'What is 2 + 2?' '4.' 'Five.' 'I am not sure.'
  plumb rank --raw --prompt 'Two and two is' ' four' ' five'
  plumb rank --json --file prompts.jsonl     # lines of {\"prompt\", \"candidates\"}
  plumb rank --model lm --objective sum --hhh-prompt short --prompt 'Hello' 'Hi.' 'Go away.'";

/// Arguments of `plumb rank`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RankArgs {
    /// Candidate responses to --prompt
    #[arg(value_name = "CANDIDATE", requires = "prompt")]
    candidates: Vec<String>,
    /// The prompt
    #[arg(long, value_name = "TEXT", requires = "candidates")]
    prompt: Option<String>,
    /// JSONL file of {"prompt", "candidates"} lines, also packed (.gz, .zst); - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Vec<PathBuf>,
    /// The prompt is plain text that candidates continue, not a user's turn
    #[arg(long, conflicts_with = "split_turns")]
    raw: bool,
    /// Score of a language model; a preference model ignores it
    #[arg(long, value_enum, default_value_t = Objective::Mean)]
    objective: Objective,
    /// Put the helpful, honest, harmless prompt before each conversation
    #[arg(long, value_enum, default_value_t = HhhPrompt::None, value_name = "WHICH")]
    hhh_prompt: HhhPrompt,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    flow: FlowArgs,
}

pub(crate) async fn run(global: &Global, args: RankArgs) -> anyhow::Result<Outcome> {
    let reading = Reading { raw: args.raw, ..args.source.reading() };
    let (literal, files) = match &args.prompt {
        Some(prompt) => {
            let prompt = prompt_input(prompt.clone(), reading).map_err(Usage)?;
            (source::records([Body::Candidates { prompt, candidates: args.candidates.clone() }]), Vec::new())
        }
        None => (Vec::new(), source::files_or_stdin(args.file.clone())?),
    };
    let client = global.connect().await?;
    let mut progress = if files.is_empty() { Progress::hidden() } else { Progress::files(&files, args.source.limit) };
    let several_files = files.len() > 1;

    let reads = stream::iter(literal).chain(source::read(files, reading, args.source.limit));
    let answers = reads.map(|read| rank(&client, &args, read, several_files)).buffered(args.flow.concurrency as usize);
    let mut answers = std::pin::pin!(answers);
    let mut failed = 0;
    while let Some(answer) = answers.next().await {
        let Answer { origin, preview, outcome } = answer?;
        let (items, tokens) = outcome.as_ref().map_or((0, 0), |ranking| ranking.size());
        progress.advance(1, items, tokens);
        failed += match &outcome {
            Ok(ranking) => ranking.response.ranked.iter().filter(|r| r.score.is_none()).count(),
            Err(_) => 1,
        };
        match outcome {
            Ok(ranking) if global.json => print_json(&ranking.line(&origin))?,
            Ok(ranking) => print(ranking.table(&origin, &preview))?,
            Err(failure) => {
                progress.note(&format!("plumb: {}: {failure}", origin.short()));
                if global.json {
                    print_json(&FailureLine { origin, error: Failure::from(&failure) })?;
                }
            }
        }
    }
    progress.finish();
    Ok(if failed > 0 { Outcome::SomeFailed } else { Outcome::Done })
}

struct Answer {
    origin: Origin,
    preview: String,
    outcome: Result<Ranking, ItemFailure>,
}

/// Ranks a line's candidates; an error would meet the next line too.
async fn rank(client: &Client, args: &RankArgs, read: ReadLine, several_files: bool) -> Result<Answer, Error> {
    let broken = |reason: String| ItemFailure { code: plumb_client::Code::InvalidArgument, message: reason };
    let Record { place, id, body } = match read {
        Ok(record) => record,
        Err(source::Broken { place, reason, .. }) => {
            let origin = Origin::new(&place, None, several_files);
            return Ok(Answer { origin, preview: String::new(), outcome: Err(broken(reason)) });
        }
    };
    let origin = Origin::new(&place, id.as_ref(), several_files);
    let Body::Candidates { prompt, candidates } = body else {
        let outcome = Err(broken("needs prompt and candidates".into()));
        return Ok(Answer { origin, preview: String::new(), outcome });
    };
    let preview = super::input::preview(&prompt);
    let candidate = |text: &String| v1::Candidate { candidate: Some(v1::candidate::Candidate::Text(text.clone())) };
    let request = v1::RankRequest {
        model: Some(args.model.spec()),
        prompt: Some(prompt),
        candidates: candidates.iter().map(candidate).collect(),
        text: Some(args.text.options(args.hhh_prompt)),
        objective: args.objective.wire() as i32,
        priority: args.flow.priority(Priority::Normal),
        ..Default::default()
    };
    let outcome = match client.rank(request).await {
        Ok(response) => Ok(Ranking { response, candidates }),
        // A single bad line of a file; on the command line it is all there is.
        Err(error) if is_passing(error.code()) || error.code() == plumb_client::Code::InvalidArgument => {
            Err((&error).into())
        }
        Err(error) => return Err(error),
    };
    Ok(Answer { origin, preview, outcome })
}

struct Ranking {
    response: v1::RankResponse,
    candidates: Vec<String>,
}

#[derive(Serialize)]
struct RankLine<'a> {
    #[serde(flatten)]
    origin: &'a Origin,
    ranked: Vec<RankedLine>,
    #[serde(flatten)]
    model: Option<Model>,
}

#[derive(Serialize)]
struct RankedLine {
    rank: u32,
    index: u32,
    #[serde(flatten)]
    scored: Option<ScoredLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

#[derive(Serialize)]
struct ScoredLine {
    reward: f32,
    margin: f32,
    probability: f32,
    input_tokens: u32,
    cached_tokens: u32,
    truncated: bool,
}

#[derive(Serialize)]
struct FailureLine {
    #[serde(flatten)]
    origin: Origin,
    error: Failure,
}

impl Ranking {
    /// Candidates and their tokens.
    fn size(&self) -> (u64, u64) {
        let tokens =
            self.response.ranked.iter().filter_map(|r| r.score.as_ref()).map(|s| u64::from(s.input_tokens)).sum();
        (self.candidates.len() as u64, tokens)
    }

    fn line<'a>(&self, origin: &'a Origin) -> RankLine<'a> {
        let ranked = |r: &v1::Ranked| RankedLine {
            rank: r.rank,
            index: r.index,
            scored: r.score.as_ref().map(|s| ScoredLine {
                reward: s.reward,
                margin: r.margin,
                probability: r.probability,
                input_tokens: s.input_tokens,
                cached_tokens: s.cached_tokens,
                truncated: s.truncated,
            }),
            error: r.score.is_none().then(|| Failure::from(&failure(r))),
        };
        let model = self.response.model.as_ref().map(Model::from);
        RankLine { origin, ranked: self.response.ranked.iter().map(ranked).collect(), model }
    }

    fn table(&self, origin: &Origin, prompt: &str) -> String {
        let row = |r: &v1::Ranked| {
            let text = self.candidates.get(r.index as usize).map(|t| shorten(t)).unwrap_or_default();
            match &r.score {
                Some(score) => [
                    r.rank.to_string(),
                    format!("{:.6}", score.reward),
                    format!("{:.6}", r.margin),
                    format!("{:.4}", r.probability),
                    text,
                ],
                None => ["-".into(), "failed".into(), String::new(), String::new(), failure(r).to_string()],
            }
        };
        let rows = self.response.ranked.iter().map(row);
        let table = table(["rank", "reward", "margin", "probability", "text"], rows);
        let id = origin.id();
        let head = if id.is_empty() { String::new() } else { format!("{id}: ") };
        format!("{head}{prompt}\n{table}{}\n\n", describe(self.response.model.as_ref()))
    }
}

fn failure(ranked: &v1::Ranked) -> ItemFailure {
    ranked.error.as_ref().map_or_else(
        || ItemFailure {
            code: plumb_client::Code::Internal,
            message: "the server sent neither score nor error".into(),
        },
        ItemFailure::from,
    )
}
