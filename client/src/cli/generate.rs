//! `plumb generate`: text from a language model, as it comes.

use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use futures::StreamExt;
use plumb_client::{Answers, Client, v1};
use serde::Serialize;

use super::args::{Global, HhhPrompt, ModelArgs, Priority, TextArgs};
use super::input::{Reading, prompt_input};
use super::output::{Model, describe, print, print_json};
use super::{Outcome, Usage};

const EXAMPLES: &str = "\
Examples:
  plumb generate 'How do I boil an egg?'
  plumb generate --hhh-prompt full --temperature 0.7 --max-new-tokens 200 'How do I boil an egg?'
  plumb generate --raw 'Once upon a time'
  plumb generate --best-of 8 --ranker pm 'Write a haiku about rain.'
  plumb generate --json --n 4 --seed 1 --file prompt.txt";

/// Arguments of `plumb generate`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GenerateArgs {
    /// The prompt; - or nothing reads it from standard input
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// The prompt is plain text to go on with, not a user's turn
    #[arg(long, conflicts_with_all = ["split_turns", "system"])]
    raw: bool,
    /// Read Human: and Assistant: markers in the prompt as turns of a conversation
    #[arg(long)]
    split_turns: bool,
    /// A system turn before the prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Put the helpful, honest, harmless prompt before the conversation
    #[arg(long, value_enum, default_value_t = HhhPrompt::None, value_name = "WHICH")]
    hhh_prompt: HhhPrompt,
    /// Samples to answer
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    /// Draw K samples and answer the best by a preference model
    #[arg(long, value_name = "K")]
    best_of: Option<u32>,
    /// Preference model for --best-of [default: the server's]
    #[arg(long, value_name = "NAME", requires = "best_of")]
    ranker: Option<String>,
    /// Most tokens to draw [default: the server's]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u32>,
    /// End a sample before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// How urgent the call is
    #[arg(long, value_enum, default_value_t = Priority::Normal)]
    priority: Priority,
}

/// How tokens are drawn, in the order in which the options act.
#[derive(Args)]
struct SamplingArgs {
    /// Make repeated tokens less likely; 1 is off
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Never produce this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    ban: Vec<String>,
    /// 0 takes the likeliest token [default: 1]
    #[arg(long, value_name = "X")]
    temperature: Option<f32>,
    /// Draw from the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Draw from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Drop tokens less likely than this share of the likeliest one
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// The same seed, request and version give the same text
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

pub(crate) async fn run(global: &Global, args: GenerateArgs) -> anyhow::Result<Outcome> {
    let request = request(&args)?;
    let client = global.connect().await?;
    let start = Instant::now();
    let answers = Client::generate(&client, request).await?;
    // One sample is printed as it comes; several would mix, so each is printed at its end.
    let live = !global.json && args.n == 1;
    let report = collect(answers, live, start).await?;
    if global.json {
        for sample in &report.samples {
            print_json(&report.line(sample))?;
        }
    } else if live {
        print("\n")?;
    } else {
        for sample in &report.samples {
            print(format!("--- sample {}{}\n{}\n", sample.index, sample.end_words(), sample.text))?;
        }
    }
    eprintln!("{}", report.describe());
    Ok(Outcome::Done)
}

fn request(args: &GenerateArgs) -> anyhow::Result<v1::GenerateRequest> {
    let reading = Reading { split_turns: args.split_turns, raw: args.raw };
    let mut prompt = prompt_input(prompt_text(args)?, reading).map_err(Usage)?;
    if let (Some(system), Some(v1::input::Input::Conversation(conversation))) = (&args.system, &mut prompt.input) {
        conversation.messages.insert(0, v1::Message { role: "system".into(), content: system.clone() });
    }
    let ranker = args.ranker.clone().map(|name| v1::ModelSpec { name, choice: None });
    let sampling = &args.sampling;
    Ok(v1::GenerateRequest {
        model: Some(args.model.spec()),
        prompt: Some(prompt),
        text: Some(args.text.options(args.hhh_prompt)),
        sampling: Some(v1::Sampling {
            repetition_penalty: sampling.repetition_penalty,
            banned_strings: sampling.ban.clone(),
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
        }),
        stopping: Some(v1::Stopping {
            max_new_tokens: args.max_new_tokens,
            stop_strings: args.stop.clone(),
            ignore_eos: args.ignore_eos,
        }),
        n: Some(args.n),
        best_of: args.best_of.map(|samples| v1::BestOf { samples, ranker }),
        request_id: String::new(),
        priority: args.priority.wire() as i32,
    })
}

fn prompt_text(args: &GenerateArgs) -> anyhow::Result<String> {
    let text = match (&args.prompt, &args.file) {
        (Some(prompt), _) if prompt != "-" => return Ok(prompt.clone()),
        (_, Some(file)) => std::fs::read_to_string(file).map_err(|e| Usage(format!("{}: {e}", file.display())))?,
        _ => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
    };
    // The newline that ends a text file is the file's, not the prompt's.
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// A sample so far.
#[derive(Default)]
struct Sample {
    index: u32,
    text: String,
    end: Option<v1::SampleEnd>,
}

/// Everything a stream said.
struct Report {
    samples: Vec<Sample>,
    model: Option<v1::ModelIdentity>,
    ranker: Option<v1::ModelIdentity>,
    summary: v1::GenerateSummary,
    first_token_seconds: f64,
    seconds: f64,
}

async fn collect(mut answers: Answers<v1::GenerateResponse>, live: bool, start: Instant) -> anyhow::Result<Report> {
    let mut report = Report {
        samples: Vec::new(),
        model: None,
        ranker: None,
        summary: v1::GenerateSummary::default(),
        first_token_seconds: 0.0,
        seconds: 0.0,
    };
    while let Some(piece) = answers.next().await {
        let piece = piece?;
        if report.first_token_seconds == 0.0 && !piece.token_ids.is_empty() {
            report.first_token_seconds = start.elapsed().as_secs_f64();
        }
        if live {
            print(&piece.text)?;
        }
        report.model = piece.model.or(report.model);
        report.ranker = piece.ranker.or(report.ranker);
        report.summary = piece.summary.unwrap_or(report.summary);
        let place = piece.index as usize;
        while report.samples.len() <= place && (piece.end.is_some() || !piece.text.is_empty()) {
            report.samples.push(Sample { index: report.samples.len() as u32, ..Sample::default() });
        }
        if let Some(sample) = report.samples.get_mut(place) {
            sample.text += &piece.text;
            sample.end = piece.end.or(sample.end.take());
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

#[derive(Serialize)]
struct SampleLine<'a> {
    index: u32,
    text: &'a str,
    finish_reason: &'static str,
    new_tokens: u32,
    sum_log_prob: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    reward: Option<f32>,
    prompt_tokens: u32,
    cached_tokens: u32,
    truncated: bool,
    seed: u64,
    #[serde(flatten)]
    model: Option<Model>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranker: Option<Model>,
}

impl Report {
    fn line<'a>(&'a self, sample: &'a Sample) -> SampleLine<'a> {
        let end = sample.end.unwrap_or_default();
        SampleLine {
            index: sample.index,
            text: &sample.text,
            finish_reason: reason(&end),
            new_tokens: end.new_tokens,
            sum_log_prob: end.sum_log_prob,
            reward: end.reward,
            prompt_tokens: self.summary.prompt_tokens,
            cached_tokens: self.summary.cached_tokens,
            truncated: self.summary.truncated,
            seed: self.summary.seed,
            model: self.model.as_ref().map(Model::from),
            ranker: self.ranker.as_ref().map(Model::from),
        }
    }

    fn describe(&self) -> String {
        let new: u32 = self.samples.iter().filter_map(|s| s.end.as_ref()).map(|end| end.new_tokens).sum();
        let one = match self.samples.as_slice() {
            [sample] => sample.end_words(),
            _ => String::new(),
        };
        format!(
            "{} tokens in ({} cached), {new} out, first after {:.2} s, {:.1} tok/s, seed {}, {}{one}",
            self.summary.prompt_tokens,
            self.summary.cached_tokens,
            self.first_token_seconds,
            f64::from(new) / self.seconds.max(1e-9),
            self.summary.seed,
            describe(self.model.as_ref()),
        )
    }
}

impl Sample {
    fn end_words(&self) -> String {
        let Some(end) = &self.end else { return ", cut off".into() };
        let reward = end.reward.map(|r| format!(", reward {r:.4}")).unwrap_or_default();
        format!(", ended by {}{reward}", reason(end))
    }
}

fn reason(end: &v1::SampleEnd) -> &'static str {
    match end.finish_reason() {
        v1::FinishReason::Unspecified => "unspecified",
        v1::FinishReason::Eos => "eos",
        v1::FinishReason::StopString => "stop_string",
        v1::FinishReason::Length => "length",
    }
}
