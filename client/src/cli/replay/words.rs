//! The report for people.

use plumb_client::stats::Summary;
use plumb_client::v1;

use super::report::{Difference, Pairs, Report, Side, Skipped};
use super::tally::{Failures, Flip, Tally};
use crate::cli::output::{describe, table};
use crate::cli::stats::histogram;

impl Report {
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
        let Skipped { not_chosen, replays, broken, unfinished, too_long, other_format, damaged_files, example } =
            &self.skipped;
        for (n, what) in [
            (self.truncated_by_reference_only, "items were cut by the reference only"),
            (self.truncated_by_candidate_only, "items were cut by the candidate only"),
            (self.truncated_by_both, "items were cut by both"),
            (self.other_tokens, "items have another number of tokens: a chat template or tokenizer differs"),
            (*not_chosen, "records passed over, of another model or version"),
            (*replays, "records passed over, of earlier replays"),
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
