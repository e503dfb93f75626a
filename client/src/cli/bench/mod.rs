//! `plumb bench`: a load generator. A request is one rpc; nothing is retried, so that what fails shows.

mod drive;
mod report;
mod workload;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use plumb_client::RetryPolicy;

use self::drive::{Limit, Pace};
use self::report::{Recorder, Report};
use self::workload::Common;
use super::args::{Global, ModelArgs, seconds};
use super::output::{print, print_json};
use super::{Outcome, Usage};

/// Arguments of `plumb bench`.
#[derive(Args)]
#[command(after_help = "\
Closed loop (default): so many requests are always in flight. Open loop (--rate): requests start at their times, whether
or not the server keeps up, and latency counts from the intended start (no coordinated omission).

Random tokens are drawn anew for every request. With the --seed of an earlier run they are the same again, and a server
that still has them in its cache answers at once.

Examples:
  plumb bench unique --items 32 --tokens 256 --concurrency 1
  plumb bench unique --items 1 --tokens 256 --rate 20 --duration-secs 30
  plumb bench rank --prompts 4 --candidates 8 --prompt-tokens 512 --tokens 64
  plumb bench generate --streams 16 --shared-prompt-tokens 6000 --new-tokens 128
  plumb bench file --items 8 dialogues.jsonl.gz")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    workload: WorkloadCommand,
}

#[derive(Subcommand)]
enum WorkloadCommand {
    /// Score calls; no two sequences share anything
    Unique {
        /// Sequences in a call
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_1())]
        items: u32,
        /// Tokens in a sequence
        #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_1())]
        tokens: u32,
        #[command(flatten)]
        load: LoadArgs,
    },
    /// Rank calls; the candidates of a call share its prompt
    Rank {
        /// Calls in flight, each with a prompt of its own; --concurrency under another name
        #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_1(), conflicts_with = "concurrency")]
        prompts: u32,
        /// Candidates in a call
        #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_1())]
        candidates: u32,
        /// Tokens of a prompt
        #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_1())]
        prompt_tokens: u32,
        /// Tokens of a candidate
        #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_1())]
        tokens: u32,
        /// Use the same prompts again and again, so that a prefix cache can help from call to call
        #[arg(long)]
        repeat_prompts: bool,
        #[command(flatten)]
        load: LoadArgs,
    },
    /// Generate calls: time to the first token, tokens/s of a stream and of all
    Generate {
        /// Calls in flight; --concurrency under another name
        #[arg(
            long,
            value_name = "N",
            default_value_t = 16,
            value_parser = at_least_1(),
            conflicts_with = "concurrency",
        )]
        streams: u32,
        /// Tokens of a prompt that are its own
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_1())]
        prompt_tokens: u32,
        /// Tokens before them that all prompts share
        #[arg(long, value_name = "N", default_value_t = 0)]
        shared_prompt_tokens: u32,
        /// Tokens to draw, end-of-text tokens ignored
        #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_1())]
        new_tokens: u32,
        /// 0 takes the likeliest token
        #[arg(long, value_name = "X", default_value_t = 0.0)]
        temperature: f32,
        #[command(flatten)]
        load: LoadArgs,
    },
    /// Score calls over the texts of a JSONL file, again and again
    File {
        /// JSONL files as for score; their first --max-items are held in memory
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// Sequences in a call
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_1())]
        items: u32,
        /// Sequences to read
        #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = at_least_1())]
        max_items: u32,
        #[command(flatten)]
        load: LoadArgs,
    },
}

fn at_least_1() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

/// How much, how long.
#[derive(Args, Clone)]
struct LoadArgs {
    /// Closed loop: requests in flight [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    concurrency: Option<u32>,
    /// Open loop: requests started in a second
    #[arg(long, value_name = "PER_SECOND", value_parser = rate, conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Open loop: gaps between requests
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson, requires = "rate")]
    arrivals: Arrivals,
    /// Open loop: most requests in flight; beyond it they wait, and their latency grows
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_in_flight: u32,
    /// Measure for so long
    #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "10")]
    duration_secs: Duration,
    /// Measure so many requests instead
    #[arg(long, value_name = "N", conflicts_with = "duration_secs", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Load before the measurement; 0 for none
    #[arg(long, value_name = "SECS", default_value_t = 2.0)]
    warmup_secs: f64,
    /// Seed of the random tokens and gaps [default: drawn and shown]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Smallest token id to draw; special tokens are often the first ones
    #[arg(long, value_name = "ID", default_value_t = 5)]
    min_token_id: u32,
    /// Token ids to draw end before this one [default: the model's vocabulary]
    #[arg(long, value_name = "ID")]
    end_token_id: Option<u32>,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Arrivals {
    /// Independent of one another
    Poisson,
    /// All gaps equal
    Uniform,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(rate),
        _ => Err("must be a number above 0".into()),
    }
}

pub(crate) async fn run(global: &Global, args: BenchArgs) -> anyhow::Result<Outcome> {
    let (load, in_flight) = match &args.workload {
        WorkloadCommand::Unique { load, .. } | WorkloadCommand::File { load, .. } => (load, 2),
        WorkloadCommand::Rank { load, prompts, .. } => (load, *prompts),
        WorkloadCommand::Generate { load, streams, .. } => (load, *streams),
    };
    let load = load.clone();
    let seed = load.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let concurrency = load.concurrency.unwrap_or(in_flight) as usize;
    let pace = match load.rate {
        None => Pace::Closed { concurrency },
        Some(per_second) => Pace::Open {
            per_second,
            poisson: load.arrivals == Arrivals::Poisson,
            max_in_flight: load.max_in_flight as usize,
            seed,
        },
    };
    let limit = load.requests.map_or(Limit::For(load.duration_secs), Limit::Requests);
    let warmup =
        Duration::try_from_secs_f64(load.warmup_secs).map_err(|_| Usage("--warmup-secs is not a time".into()))?;

    let client = global.connect_with(RetryPolicy::none()).await?;
    let workload = workload(&args.workload);
    let ids = if workload.needs_ids() { token_ids(&client, &load).await? } else { 0..0 };
    let common = Common { client, model: load.model.spec(), ids, seed };
    let workload = Arc::new(workload.prepare(common)?);

    if !warmup.is_zero() {
        eprintln!("warming up for {:.1} s", warmup.as_secs_f64());
        // Other numbers than the measurement's, so that a cache holds nothing of it.
        let recorder = Recorder::new()?;
        drive::drive(&workload, pace, Limit::For(warmup), workload::WARMUP, &recorder).await;
        if let Some(failure) = recorder.hopeless() {
            return Err(anyhow::anyhow!("no request succeeded while warming up: {failure}"));
        }
    }
    eprintln!("measuring {limit}, {pace}, seed {seed}");
    let recorder = Recorder::new()?;
    let seconds = drive::drive(&workload, pace, limit, workload::MEASURED, &recorder).await;
    let report: Report = recorder.report(workload.describe(), pace, seconds);
    if global.json {
        print_json(&report)?;
    } else {
        print(report.table())?;
    }
    Ok(if report.failed() { Outcome::SomeFailed } else { Outcome::Done })
}

fn workload(command: &WorkloadCommand) -> workload::Kind {
    use workload::Kind;
    match command {
        WorkloadCommand::Unique { items, tokens, .. } => Kind::Unique { items: *items, tokens: *tokens },
        WorkloadCommand::Rank { candidates, prompt_tokens, tokens, repeat_prompts, prompts, .. } => Kind::Rank {
            candidates: *candidates,
            prompt_tokens: *prompt_tokens,
            tokens: *tokens,
            repeated: repeat_prompts.then_some(*prompts),
        },
        WorkloadCommand::Generate { prompt_tokens, shared_prompt_tokens, new_tokens, temperature, .. } => {
            Kind::Generate {
                prompt_tokens: *prompt_tokens,
                shared_tokens: *shared_prompt_tokens,
                new_tokens: *new_tokens,
                temperature: *temperature,
            }
        }
        WorkloadCommand::File { files, items, max_items, .. } => {
            Kind::File { files: files.clone(), items: *items, max_items: *max_items }
        }
    }
}

/// The token ids that may be drawn.
async fn token_ids(client: &plumb_client::Client, load: &LoadArgs) -> anyhow::Result<std::ops::Range<u32>> {
    let end = match load.end_token_id {
        Some(end) => end,
        None => client.get_model(load.model.spec()).await?.details.map_or(0, |details| details.vocab_size),
    };
    if end <= load.min_token_id {
        return Err(Usage(format!("no token ids between {} and {end}; give --end-token-id", load.min_token_id)).into());
    }
    Ok(load.min_token_id..end)
}
