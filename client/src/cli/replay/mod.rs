//! `plumb replay`: recorded calls, asked again; what another version makes of them, before it takes over.
//!
//! `read` finds and reads records, `call` is one and asks it again, `tally` counts, `report` is what came out and `words` says it.

mod call;
mod read;
mod report;
mod tally;
mod words;

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use futures::StreamExt;
use plumb_client::{Client, Error, v1};

use self::call::{Call, Side};
use self::read::{Line, Skip};
use self::report::{Gates, Report, Skipped};
use self::tally::Tally;
use super::args::{Global, ModelArgs, Priority};
use super::input::Place;
use super::output::{print, print_json};
use super::progress::Progress;
use super::{Outcome, Usage};

const HELP: &str = "\
Records are what plumb-server writes with --record-dir. Each call is asked again as it was, of the version that is named
(without --model, of the model that answered it); its scores are compared with the recorded ones, or with those of --against.

The report has both distributions, the shift of the mean (its interval knows that items of one call move together), the
Kolmogorov-Smirnov distance (its p-value takes the two sides for independent, which the same texts are not), the agreement of
orders, and flips: pairs of answers to one prompt that change their order. Pairs are the candidates of a Rank or best-of call,
and the items of a Score call that differ in their last turn only.

A server that records takes replays down too, with ids that begin with `replay:`; a replay passes such records over. Nothing
else tells them apart: callers whose own ids begin like that are never replayed.

Examples:
  plumb replay /var/lib/plumb/calls --label canary
  plumb replay calls/ --version 7 --fail-if-flips-over 0.02 --fail-if-shift-over 0.1
  plumb replay calls/ --label canary --against stable     # both asked now
  plumb replay 'calls/plumb-20260102*' --version 6 --recorded-version 6 --fail-if-difference-over 0
  plumb replay calls/ --label canary --limit 10000 --json | jq .pairs

Exit codes: 1 if a --fail-if bar is missed, or the candidate has no score where the other side has one.";

/// Arguments of `plumb replay`.
#[derive(Args)]
#[command(after_help = HELP)]
pub(crate) struct ReplayArgs {
    /// Recorded files (.jsonl, .jsonl.zst, .jsonl.gz), folders of them, or quoted patterns
    #[arg(value_name = "LOG", required = true)]
    logs: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// What to compare with: recorded, a version or a label
    #[arg(long, value_name = "WHAT", default_value = "recorded")]
    against: Against,
    /// Only calls that this model answered; needed where the records are of several
    #[arg(long, value_name = "NAME")]
    recorded_model: Option<String>,
    /// Only calls that this version answered
    #[arg(long, value_name = "N")]
    recorded_version: Option<u64>,
    /// Stop after this many calls
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Calls in flight
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// How urgent the calls are
    #[arg(long, value_enum, default_value_t = Priority::Low)]
    priority: Priority,
    /// Largest flips to show
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    show_flips: u32,
    #[command(flatten)]
    gates: Gates,
}

/// The side that the candidate is compared with.
#[derive(Clone, Debug, PartialEq)]
enum Against {
    Recorded,
    Choice(v1::model_spec::Choice),
}

impl FromStr for Against {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use v1::model_spec::Choice;
        match text {
            "" => Err("must be recorded, a version or a label".into()),
            "recorded" => Ok(Self::Recorded),
            text => Ok(Self::Choice(text.parse().map_or_else(|_| Choice::Label(text.into()), Choice::Version))),
        }
    }
}

/// A call and what both sides say.
struct Compared {
    call: Call,
    reference: Option<Side>,
    candidate: Side,
}

pub(crate) async fn run(global: &Global, args: ReplayArgs) -> anyhow::Result<Outcome> {
    let files = read::files(&args.logs)?;
    let client = global.connect().await?;
    let mut progress = Progress::files(&files, args.limit);
    let mut chosen = Chosen::new(&args);
    let mut skipped = Skipped::default();
    let mut tally = Tally::new(args.show_flips as usize);

    let calls = tokio_stream::StreamExt::map_while(read::read(files), |line| chosen.call(line));
    let steps = calls.map(|call| step(&client, &args, call)).buffered(args.concurrency as usize);
    let mut steps = std::pin::pin!(steps);
    while let Some(step) = steps.next().await {
        match step? {
            Step::Compared(compared) => {
                let Compared { call, reference, candidate } = *compared;
                let tokens = candidate.items.iter().flatten().map(|score| u64::from(score.input_tokens)).sum();
                progress.advance(1, candidate.items.len() as u64, tokens);
                tally.add(&call, [reference.as_ref().unwrap_or(&call.recorded), &candidate]);
            }
            Step::Passed(passed) => {
                progress.advance(1, 0, 0);
                skipped.count(&passed);
                if let Passed::Skipped(place, Skip::Damaged(reason)) = passed {
                    progress.note(&format!("plumb: {place}: {reason}; the rest of the file is passed over"));
                }
            }
        }
    }
    progress.finish();

    let report = Report::new(&tally, skipped, &args.gates, args.against == Against::Recorded);
    if global.json {
        print_json(&report)?;
    } else {
        print(report.text(&tally))?;
    }
    if report.compared == 0 {
        anyhow::bail!("nothing was compared: {}", report.why_nothing());
    }
    for failure in report.failures() {
        eprintln!("plumb: {failure}");
    }
    Ok(if report.failures().next().is_some() { Outcome::SomeFailed } else { Outcome::Done })
}

/// What came of a line.
enum Step {
    Compared(Box<Compared>),
    Passed(Passed),
}

/// A line that is not replayed.
enum Passed {
    /// It was not asked for.
    NotChosen,
    /// It is from an earlier replay.
    Replay,
    Skipped(Place, Skip),
}

/// Asks a call again; an error would meet the next one too.
async fn step(client: &Client, args: &ReplayArgs, call: Result<Result<Call, Passed>, Usage>) -> anyhow::Result<Step> {
    Ok(match call? {
        Ok(call) => Step::Compared(Box::new(compare(client, args, call).await?)),
        Err(passed) => Step::Passed(passed),
    })
}

async fn compare(client: &Client, args: &ReplayArgs, call: Call) -> Result<Compared, Error> {
    let mut spec = args.model.spec();
    if spec.name.is_empty() {
        spec.name = call.recorded.model.as_ref().map(|model| model.name.clone()).unwrap_or_default();
    }
    let priority = args.priority.wire() as i32;
    let reference = async {
        let Against::Choice(choice) = &args.against else { return Ok(None) };
        let spec = v1::ModelSpec { name: spec.name.clone(), choice: Some(choice.clone()) };
        call.ask(client, spec, priority).await.map(Some)
    };
    let (reference, candidate) = futures::try_join!(reference, call.ask(client, spec.clone(), priority))?;
    Ok(Compared { call, reference, candidate })
}

/// Which records are replayed.
struct Chosen {
    model: Option<String>,
    version: Option<u64>,
    /// The one model of all records, where none was named.
    seen: Option<String>,
    /// Calls that may still be replayed.
    left: u64,
}

impl Chosen {
    fn new(args: &ReplayArgs) -> Self {
        let left = args.limit.unwrap_or(u64::MAX);
        Self { model: args.recorded_model.clone(), version: args.recorded_version, seen: None, left }
    }

    /// The call of a line; `None` if there are enough.
    fn call(&mut self, line: Line) -> Option<Result<Result<Call, Passed>, Usage>> {
        if self.left == 0 {
            return None;
        }
        let (place, record) = match line {
            Line::Record(place, record) => (place, record),
            Line::Skipped(place, skip) => return Some(Ok(Err(Passed::Skipped(place, skip)))),
        };
        let model = record.model.as_ref();
        let is_other_model = self.model.as_deref().is_some_and(|name| model.is_none_or(|model| model.name != name));
        let is_other_version = self.version.is_some_and(|version| model.is_none_or(|model| model.version != version));
        if is_other_model || is_other_version {
            return Some(Ok(Err(Passed::NotChosen)));
        }
        if let Some(model) = model.filter(|_| self.model.is_none()) {
            let seen = self.seen.get_or_insert_with(|| model.name.clone());
            if *seen != model.name {
                let names = format!("{seen} and {}", model.name);
                return Some(Err(Usage(format!(
                    "{place}: the records are of {names}; choose one with --recorded-model"
                ))));
            }
        }
        let call = Call::of(place.clone(), *record);
        if call.as_ref().is_ok_and(Call::is_replay) {
            return Some(Ok(Err(Passed::Replay)));
        }
        self.left -= u64::from(call.is_ok());
        Some(Ok(call.map_err(|reason| Passed::Skipped(place, Skip::Broken(reason)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_side_is_the_recording_a_version_or_a_label() {
        use v1::model_spec::Choice;
        assert_eq!("recorded".parse(), Ok(Against::Recorded));
        assert_eq!("12".parse(), Ok(Against::Choice(Choice::Version(12))));
        assert_eq!("stable".parse(), Ok(Against::Choice(Choice::Label("stable".into()))));
        assert!("".parse::<Against>().is_err());
    }
}
