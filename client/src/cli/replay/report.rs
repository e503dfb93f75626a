//! What came out: numbers for programs, words for people, and bars for a pipeline.

use std::collections::BTreeMap;

use clap::Args;
use plumb_client::stats::{Estimate, Summary, kendall, kolmogorov_smirnov, spearman, summary};
use plumb_client::v1;
use serde::Serialize;

use super::Passed;
use super::read::Skip;
use super::tally::{Failures, Flip, Shift, Tally};
use crate::cli::output::{describe, table};
use crate::cli::stats::histogram;

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
    not_chosen: u64,
    broken: u64,
    unfinished: u64,
    too_long: u64,
    other_format: u64,
    damaged_files: u64,
    /// The first thing that was wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    example: Option<String>,
}

impl Skipped {
    pub(super) fn count(&mut self, passed: &Passed) {
        let Passed::Skipped(place, skip) = passed else {
            self.not_chosen += 1;
            return;
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
struct Side {
    /// Whether its scores are those of the records.
    recorded: bool,
    models: Vec<Answered>,
    rewards: Option<Summary>,
    /// Items without a score, and of these those that have one on the other side.
    failed: u64,
    failed_here_only: u64,
    failures: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Answered {
    model: String,
    version: u64,
    weights_digest: String,
    scores: u64,
}

/// Candidate minus reference.
#[derive(Clone, Debug, Serialize)]
struct Difference {
    /// With its 95 % interval.
    mean: Estimate,
    std: f64,
    largest: f64,
    ks: f64,
    ks_p: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    largest_item: Option<Shift>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    callers: BTreeMap<String, Estimate>,
}

#[derive(Clone, Debug, Serialize)]
struct Pairs {
    groups: u64,
    pairs: u64,
    /// Share of the groups with the same best item.
    same_best: f64,
    flipped: u64,
    /// Share of the pairs that flip, with its 95 % interval.
    flips: Estimate,
    /// The same with every pair weighted by its margin.
    flips_by_margin: f64,
    ties_changed: u64,
    largest_flips: Vec<Flip>,
}

/// A bar and whether it was met.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Gate {
    name: &'static str,
    bar: f64,
    value: Option<f64>,
    met: bool,
    words: String,
}

/// Everything that came out.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    calls: u64,
    items: u64,
    pub(super) compared: u64,
    /// Pairs of rewards with the same bits.
    identical: u64,
    failed_on_both: u64,
    reference: Side,
    candidate: Side,
    truncated_by_reference_only: u64,
    truncated_by_candidate_only: u64,
    truncated_by_both: u64,
    /// Items that have another number of tokens than before.
    other_tokens: u64,
    /// Absent where the two sides do not have the same unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Difference>,
    spearman: Option<f64>,
    kendall: Option<f64>,
    pairs: Option<Pairs>,
    skipped: Skipped,
    notes: Vec<String>,
    gates: Vec<Gate>,
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

    /// For people.
    pub(super) fn text(&self, tally: &Tally) -> String {
        let mut text = format!(
            "reference: {}\ncandidate: {}\n\n{} calls, {} items, {} compared, {} with the same bits\n",
            self.reference.words(&tally.models[0]),
            self.candidate.words(&tally.models[1]),
            self.calls,
            self.items,
            self.compared,
            self.identical,
        );
        text += &self.troubles(tally);
        for note in &self.notes {
            text += &format!("note: {note}\n");
        }
        if self.compared > 0 {
            text += &format!("\n{}", self.distributions());
            text += &self.differences(tally);
            let coefficient = |value: Option<f64>| value.map_or("undefined".into(), |value| format!("{value:.4}"));
            text += &format!(
                "\norder of all items: Spearman {}, Kendall {}\n",
                coefficient(self.spearman),
                coefficient(self.kendall)
            );
            text += &self.pairs.as_ref().map_or("pairs with one prompt: none\n".into(), Pairs::words);
        }
        for gate in &self.gates {
            text += &format!("{} {}\n", if gate.met { "met:   " } else { "missed:" }, gate.words);
        }
        text
    }

    fn troubles(&self, tally: &Tally) -> String {
        let mut text = String::new();
        for (side, failures) in [("reference", &tally.failures[0]), ("candidate", &tally.failures[1])] {
            let Failures { only, codes, example } = failures;
            let failed: u64 = codes.values().sum();
            if failed > 0 {
                let codes: Vec<_> = codes.iter().map(|(code, n)| format!("{code} {n}")).collect();
                let example = example.as_ref().map_or(String::new(), |example| format!("; {example}"));
                text += &format!("{side}: {failed} items failed, {only} only here ({}{example})\n", codes.join(", "));
            }
        }
        let Skipped { not_chosen, broken, unfinished, too_long, other_format, damaged_files, example } = &self.skipped;
        for (n, what) in [
            (self.truncated_by_reference_only, "items were cut by the reference only"),
            (self.truncated_by_candidate_only, "items were cut by the candidate only"),
            (self.truncated_by_both, "items were cut by both"),
            (self.other_tokens, "items have another number of tokens: a chat template or tokenizer differs"),
            (*not_chosen, "records passed over, of another model or version"),
            (*broken, "broken lines passed over"),
            (*unfinished, "unfinished last lines passed over"),
            (*too_long, "lines passed over that are too long"),
            (*other_format, "records passed over, of another version of the format"),
            (*damaged_files, "files that cannot be read to their end"),
        ] {
            if n > 0 {
                text += &format!("{n} {what}\n");
            }
        }
        text + &example.as_ref().map_or(String::new(), |example| format!("first passed over: {example}\n"))
    }

    fn distributions(&self) -> String {
        let row = |name: &str, s: &Summary| {
            let numbers = [s.mean, s.std, s.min, s.p5, s.p25, s.median, s.p75, s.p95, s.max].map(|x| format!("{x:.4}"));
            let [mean, std, min, p5, p25, median, p75, p95, max] = numbers;
            [name.to_owned(), mean, std, min, p5, p25, median, p75, p95, max]
        };
        let sides = [("reference", &self.reference), ("candidate", &self.candidate)];
        let rows = sides.into_iter().filter_map(|(name, side)| Some(row(name, side.rewards.as_ref()?)));
        table(["", "mean", "deviation", "min", "p5", "p25", "median", "p75", "p95", "max"], rows)
    }

    fn differences(&self, tally: &Tally) -> String {
        let Some(difference) = &self.difference else { return String::new() };
        let Difference { mean, std, largest, ks, ks_p, largest_item, callers } = difference;
        let mut text = format!(
            "\ncandidate - reference: mean {:.6} (95% interval {:.6} to {:.6}), deviation {std:.6}, largest {largest:.6}\n",
            mean.mean, mean.low, mean.high
        );
        if let Some(item) = largest_item {
            text += &format!(
                "largest at {} item {}: {:.6} to {:.6}  {}\n",
                item.place, item.item, item.reference, item.candidate, item.text
            );
        }
        text += &format!("Kolmogorov-Smirnov distance {ks:.4}, p {ks_p:.3}\n");
        for (caller, shift) in callers {
            let name = if caller.is_empty() { "(no name)" } else { caller };
            text += &format!("  {name}: mean {:.6} ({:.6} to {:.6})\n", shift.mean, shift.low, shift.high);
        }
        let [a, b] = &tally.rewards;
        let mut shifts: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(*b) - f64::from(*a)).collect();
        shifts.sort_by(f64::total_cmp);
        text + &histogram(&shifts)
    }
}

impl Side {
    fn words(&self, models: &[(v1::ModelIdentity, u64)]) -> String {
        let how = if self.recorded { "recorded, " } else { "" };
        let models: Vec<_> =
            models.iter().map(|(model, scores)| format!("{} ({scores} scores)", describe(Some(model)))).collect();
        how.to_owned() + &if models.is_empty() { "no scores".into() } else { models.join(", ") }
    }
}

impl Pairs {
    fn words(&self) -> String {
        let percent = |share: f64| 100.0 * share;
        let mut text = format!(
            "pairs with one prompt: {} in {} groups, {:.2} % with the same best\nflips: {} ({:.2} %, 95% interval {:.2} to {:.2} \
             %; {:.2} % by margin), {} ties made or broken\n",
            self.pairs,
            self.groups,
            percent(self.same_best),
            self.flipped,
            percent(self.flips.mean),
            percent(self.flips.low.max(0.0)),
            percent(self.flips.high.min(1.0)),
            percent(self.flips_by_margin),
            self.ties_changed,
        );
        let row = |flip: &Flip| {
            let [i, j] = flip.items;
            let [preferred, other] = &flip.texts;
            [
                flip.place.clone(),
                flip.request_id.clone(),
                format!("{i} > {j}"),
                format!("{:.4}", flip.reference_margin),
                format!("{:.4}", flip.candidate_margin),
                preferred.clone(),
                other.clone(),
            ]
        };
        if !self.largest_flips.is_empty() {
            let header = ["line", "id", "items", "reference", "candidate", "reference prefers", "candidate prefers"];
            text += &format!("\n{}", table(header, self.largest_flips.iter().map(row)));
        }
        text
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
