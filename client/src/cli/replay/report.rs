//! What came out, as numbers, and the bars that a pipeline sets.

use std::collections::BTreeMap;

use clap::Args;
use plumb_client::stats::{Estimate, Summary, kendall, kolmogorov_smirnov, spearman, summary};
use plumb_client::v1;
use serde::Serialize;

use super::Passed;
use super::read::Skip;
use super::tally::{Flip, Shift, Tally};

/// Bars that a pipeline sets.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Bars")]
pub(crate) struct Gates {
    /// Exit with 1 if a larger share of the pairs changes its order, such as 0.02; also if there are no pairs
    #[arg(long, value_name = "SHARE", value_parser = bar)]
    fail_if_flips_over: Option<f64>,
    /// Exit with 1 if the mean reward moves by more, up or down
    #[arg(long, value_name = "REWARD", value_parser = bar)]
    fail_if_shift_over: Option<f64>,
    /// Exit with 1 if the reward of any item moves by more; 0 for the same numbers
    #[arg(long, value_name = "REWARD", value_parser = bar)]
    fail_if_difference_over: Option<f64>,
}

fn bar(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(bar) if bar >= 0.0 && f64::is_finite(bar) => Ok(bar),
        _ => Err("must be a number, 0 or above".into()),
    }
}

/// Lines that were passed over.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Skipped {
    /// Of another model or version than was asked for.
    pub(super) not_chosen: u64,
    /// Of earlier replays.
    pub(super) replays: u64,
    pub(super) broken: u64,
    pub(super) unfinished: u64,
    pub(super) too_long: u64,
    pub(super) other_format: u64,
    pub(super) damaged_files: u64,
    /// The first thing that was wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) example: Option<String>,
}

impl Skipped {
    pub(super) fn count(&mut self, passed: &Passed) {
        let (place, skip) = match passed {
            Passed::NotChosen => return self.not_chosen += 1,
            Passed::Replay => return self.replays += 1,
            Passed::Skipped(place, skip) => (place, skip),
        };
        let (count, what) = match skip {
            Skip::Broken(reason) => (&mut self.broken, reason.clone()),
            Skip::Unfinished => (&mut self.unfinished, "the file ends in the middle of the line".into()),
            Skip::TooLong => (&mut self.too_long, "the line is too long".into()),
            Skip::Format(version) => {
                let message = format!("the record's format is version {version}, which this plumb does not know");
                (&mut self.other_format, message)
            }
            Skip::Damaged(reason) => (&mut self.damaged_files, reason.clone()),
        };
        *count += 1;
        self.example.get_or_insert_with(|| format!("{place}: {what}"));
    }
}

/// A side of the comparison.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Side {
    /// Whether its scores are those of the records.
    pub(super) recorded: bool,
    pub(super) models: Vec<Answered>,
    pub(super) rewards: Option<Summary>,
    /// Items without a score, and of these those that have one on the other side.
    pub(super) failed: u64,
    pub(super) failed_here_only: u64,
    pub(super) failures: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) failure: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Answered {
    pub(super) model: String,
    pub(super) version: u64,
    pub(super) weights_digest: String,
    pub(super) scores: u64,
}

/// Candidate minus reference.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Difference {
    /// With its 95 % interval.
    pub(super) mean: Estimate,
    pub(super) std: f64,
    pub(super) largest: f64,
    pub(super) ks: f64,
    pub(super) ks_p: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) largest_item: Option<Shift>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) callers: BTreeMap<String, Estimate>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Pairs {
    pub(super) groups: u64,
    pub(super) pairs: u64,
    /// Share of the groups with the same best item.
    pub(super) same_best: f64,
    pub(super) flipped: u64,
    /// Share of the pairs that flip, with its 95 % interval.
    pub(super) flips: Estimate,
    /// The same with every pair weighted by its margin.
    pub(super) flips_by_margin: f64,
    pub(super) ties_changed: u64,
    pub(super) largest_flips: Vec<Flip>,
}

/// A bar and whether it was met.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Gate {
    pub(super) name: &'static str,
    pub(super) bar: f64,
    pub(super) value: Option<f64>,
    pub(super) met: bool,
    pub(super) words: String,
}

/// Everything that came out.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) calls: u64,
    pub(super) items: u64,
    pub(super) compared: u64,
    /// Pairs of rewards with the same bits.
    pub(super) identical: u64,
    pub(super) failed_on_both: u64,
    pub(super) reference: Side,
    pub(super) candidate: Side,
    pub(super) truncated_by_reference_only: u64,
    pub(super) truncated_by_candidate_only: u64,
    pub(super) truncated_by_both: u64,
    /// Items that have another number of tokens than before.
    pub(super) other_tokens: u64,
    /// Absent where the two sides do not have the same unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<Difference>,
    pub(super) spearman: Option<f64>,
    pub(super) kendall: Option<f64>,
    pub(super) pairs: Option<Pairs>,
    pub(super) skipped: Skipped,
    pub(super) notes: Vec<String>,
    pub(super) gates: Vec<Gate>,
}

impl Report {
    pub(super) fn new(tally: &Tally, skipped: Skipped, gates: &Gates, recorded: bool) -> Self {
        let [a, b] = &tally.rewards;
        let sorted = [sorted(a), sorted(b)];
        let side = |i: usize| Side {
            recorded: recorded && i == 0,
            models: tally.models[i].iter().map(|(model, scores)| answered(model, *scores)).collect(),
            rewards: summary(&sorted[i]),
            failed: tally.failures[i].codes.values().sum(),
            failed_here_only: tally.failures[i].only,
            failures: tally.failures[i].codes.clone(),
            failure: tally.failures[i].example.clone(),
        };
        let mut report = Self {
            calls: tally.calls,
            items: tally.items,
            compared: a.len() as u64,
            identical: tally.identical,
            failed_on_both: tally.failed_both,
            reference: side(0),
            candidate: side(1),
            truncated_by_reference_only: tally.truncated[0],
            truncated_by_candidate_only: tally.truncated[1],
            truncated_by_both: tally.truncated_both,
            other_tokens: tally.other_tokens,
            difference: if is_same_kind(tally) { difference(tally, &sorted) } else { None },
            spearman: spearman(a, b),
            kendall: kendall(a, b),
            pairs: pairs(tally),
            skipped,
            notes: notes(tally),
            gates: Vec::new(),
        };
        report.gates = report.judge(gates);
        report
    }

    /// Why an exit code of 1 is due.
    pub(super) fn failures(&self) -> impl Iterator<Item = String> {
        let lost = self.candidate.failed_here_only;
        let lost =
            (lost > 0).then(|| format!("{lost} items have no score of the candidate where the reference has one"));
        self.gates.iter().filter(|gate| !gate.met).map(|gate| gate.words.clone()).chain(lost)
    }

    /// Where all the items have gone.
    pub(super) fn why_nothing(&self) -> String {
        let failure = self.candidate.failure.as_ref().or(self.reference.failure.as_ref());
        match (self.items, failure, &self.skipped) {
            (0, _, Skipped { example: Some(example), .. }) => example.clone(),
            (0, _, Skipped { not_chosen: 1.., .. }) => {
                "no record is of the model and version that were asked for".into()
            }
            (0, _, Skipped { replays: 1.., .. }) => "all records are of earlier replays".into(),
            (0, ..) => "there are no records".into(),
            (_, Some(failure), _) => failure.clone(),
            (_, None, _) => "no item has a score on both sides".into(),
        }
    }

    fn judge(&self, gates: &Gates) -> Vec<Gate> {
        let flips = self.pairs.as_ref().map(|pairs| pairs.flips.mean);
        let shift = self.difference.as_ref().map(|difference| difference.mean.mean.abs());
        let largest = self.difference.as_ref().map(|difference| difference.largest);
        let units = "the two sides do not have the same unit";
        [
            ("flips", gates.fail_if_flips_over, flips, "share of flipped pairs", "there are no pairs"),
            ("shift", gates.fail_if_shift_over, shift, "shift of the mean reward", units),
            ("difference", gates.fail_if_difference_over, largest, "largest difference", units),
        ]
        .into_iter()
        .filter_map(|(name, bar, value, what, without)| {
            let bar = bar?;
            let met = value.is_some_and(|value| value <= bar);
            let words = match value {
                Some(value) => format!("{what}: {value:.6}, {} {bar}", if met { "not over" } else { "over" }),
                None => format!("{what}: {without}, so --fail-if-{name}-over {bar} cannot be met"),
            };
            Some(Gate { name, bar, value, met, words })
        })
        .collect()
    }
}

fn answered(model: &v1::ModelIdentity, scores: u64) -> Answered {
    let v1::ModelIdentity { name, version, weights_digest } = model.clone();
    Answered { model: name, version, weights_digest, scores }
}

fn sorted(rewards: &[f32]) -> Vec<f64> {
    let mut sorted: Vec<f64> = rewards.iter().copied().map(f64::from).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// A preference model's logits and a language model's log-probabilities are no numbers of one kind.
fn is_same_kind(tally: &Tally) -> bool {
    tally.language[0] == tally.language[1]
}

fn difference(tally: &Tally, [a, b]: &[Vec<f64>; 2]) -> Option<Difference> {
    let mean = tally.shift.estimate()?;
    let (ks, ks_p) = kolmogorov_smirnov(a, b)?;
    let [a, b] = &tally.rewards;
    let shifts = || a.iter().zip(b).map(|(a, b)| f64::from(*b) - f64::from(*a));
    let squares: f64 = shifts().map(|shift| (shift - mean.mean).powi(2)).sum();
    let callers = tally.callers.iter().filter_map(|(name, shift)| Some((name.clone(), shift.estimate()?)));
    let callers: BTreeMap<_, _> = callers.collect();
    Some(Difference {
        mean,
        std: if a.len() < 2 { 0.0 } else { (squares / (a.len() - 1) as f64).sqrt() },
        largest: tally.largest_shift.as_ref().map_or(0.0, Shift::size),
        ks,
        ks_p,
        largest_item: tally.largest_shift.clone(),
        // One caller's shift is that of all.
        callers: if callers.len() > 1 { callers } else { BTreeMap::new() },
    })
}

fn pairs(tally: &Tally) -> Option<Pairs> {
    let pairs = &tally.pairs;
    Some(Pairs {
        flips: pairs.flips.estimate()?,
        groups: pairs.groups,
        pairs: pairs.flips.n(),
        same_best: pairs.same_best as f64 / pairs.groups as f64,
        flipped: pairs.flipped,
        flips_by_margin: if pairs.margin > 0.0 { pairs.flipped_margin / pairs.margin } else { 0.0 },
        ties_changed: pairs.ties_changed,
        largest_flips: tally.largest_flips(),
    })
}

fn notes(tally: &Tally) -> Vec<String> {
    let mut notes = Vec::new();
    let kind = |language: u64| if language > 0 { "log-probabilities" } else { "rewards of a preference model" };
    if !is_same_kind(tally) {
        notes.push(format!(
            "the reference has {}, the candidate {}: only their orders are compared",
            kind(tally.language[0]),
            kind(tally.language[1])
        ));
    }
    if tally.language.iter().any(|&n| n > 0) && tally.objectives.len() > 1 {
        let names: Vec<_> = tally.objectives.keys().filter_map(|&o| v1::Objective::try_from(o).ok()).collect();
        let names: Vec<_> = names.iter().map(v1::Objective::as_str_name).collect();
        notes.push(format!("scores of several objectives are mixed: {}", names.join(", ")));
    }
    for (side, name) in [(0, "reference"), (1, "candidate")] {
        if tally.models[side].len() > 1 {
            notes.push(format!(
                "several versions have answered as the {name}; --recorded-version and --version choose one"
            ));
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use plumb_client::record::{Outcome, Record};
    use plumb_client::text;

    use super::super::call::{Call, Score, Side as Answers};
    use super::*;
    use crate::cli::input::Place;

    /// A report about one call of two texts.
    fn report(gates: &Gates, candidate_is_language: bool) -> Report {
        let reward = |reward| Outcome { reward: Some(reward), ..Default::default() };
        let record = Record {
            score: Some(v1::ScoreRequest { items: vec![text("a"), text("b")], ..Default::default() }),
            results: vec![reward(1.0), reward(2.0)],
            ..Default::default()
        };
        let call = Call::of(Place { file: None, line: 1 }, record).unwrap();
        let score =
            |reward| Ok(Score { reward, input_tokens: 1, truncated: false, is_language: candidate_is_language });
        let candidate = Answers { model: None, items: vec![score(1.5), score(2.25)], failure: None };
        let mut tally = Tally::new(0);
        tally.add(&call, [&call.recorded, &candidate]);
        Report::new(&tally, Skipped::default(), gates, true)
    }

    #[test]
    fn bars_are_met_missed_or_cannot_be_met() {
        let check = |flips, shift, difference, is_language, expect: &[(&str, bool)]| {
            let gates =
                Gates { fail_if_flips_over: flips, fail_if_shift_over: shift, fail_if_difference_over: difference };
            let report = report(&gates, is_language);
            let found: Vec<_> = report.gates.iter().map(|gate| (gate.name, gate.met)).collect();
            assert_eq!(found, expect, "{report:?}");
            assert_eq!(report.failures().count(), expect.iter().filter(|(_, met)| !met).count());
        };
        check(None, None, None, false, &[]);
        check(None, Some(0.375), Some(0.5), false, &[("shift", true), ("difference", true)]);
        check(None, Some(0.374), Some(0.499), false, &[("shift", false), ("difference", false)]);
        // Two texts without a common prompt are no pair: a bar on flips would pass whatever happened.
        check(Some(1.0), None, None, false, &[("flips", false)]);
        check(None, Some(9.0), None, true, &[("shift", false)]);
    }

    #[test]
    fn models_of_two_kinds_are_compared_by_order_only() {
        let report = report(&Gates::default(), true);
        assert!(report.difference.is_none() && report.notes[0].contains("only their orders"), "{:?}", report.notes);
        assert_eq!((report.spearman, report.kendall), (Some(1.0), Some(1.0)));
    }
}
