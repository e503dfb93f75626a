//! Counting: accuracy by file and over all, with an interval that fits the data.

use std::collections::BTreeMap;

use plumb_client::stats::{cluster_bootstrap, wilson};

use super::comparisons::Comparison;

/// How an interval is made.
#[derive(Clone, Copy, Debug)]
pub(super) enum Interval {
    /// Comparisons that share a prompt are right or wrong together, so prompts are resampled.
    ByPrompt { resamples: u32, seed: u64 },
    /// Comparisons are independent.
    Wilson,
}

impl Interval {
    pub(super) fn words(self) -> String {
        let how = match self {
            Self::ByPrompt { resamples, seed } => {
                format!("cluster bootstrap over prompts ({resamples} resamples, seed {seed})")
            }
            Self::Wilson => "Wilson".into(),
        };
        format!("Accuracy in percent with its 95% interval ({how}); ties count half.")
    }
}

/// The outcomes of one setting.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// By file and prompt: successes, ties, comparisons with scores, comparisons.
    prompts: BTreeMap<(usize, String), Counts>,
    /// Comparisons without scores.
    pub(super) failed: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    successes: f64,
    ties: u64,
    scored: u64,
    all: u64,
}

/// An accuracy.
#[derive(Debug, PartialEq)]
pub(super) struct Accuracy {
    pub(super) rate: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    /// Comparisons that were scored.
    pub(super) n: u64,
    pub(super) ties: u64,
}

impl Tally {
    /// Counts a comparison with the rewards of its better and worse answer, if both have one.
    pub(super) fn add(&mut self, comparison: &Comparison, rewards: Option<(f32, f32)>) {
        let counts = self.prompts.entry((comparison.file, comparison.prompt.clone())).or_default();
        counts.all += 1;
        match rewards {
            Some((better, worse)) => {
                counts.scored += 1;
                counts.ties += u64::from(better == worse);
                counts.successes += if better == worse { 0.5 } else { f64::from(u8::from(better > worse)) };
            }
            None => self.failed += 1,
        }
    }

    /// Comparisons and prompts of a file, or of all.
    pub(super) fn size(&self, file: Option<usize>) -> (u64, usize) {
        let clusters = self.clusters(file);
        (clusters.iter().map(|c| c.all).sum(), clusters.len())
    }

    /// The accuracy in a file, or over all; `None` if nothing was scored.
    pub(super) fn accuracy(&self, file: Option<usize>, interval: Interval) -> Option<Accuracy> {
        let clusters = self.clusters(file);
        let n = clusters.iter().map(|c| c.scored).sum();
        let successes: f64 = clusters.iter().map(|c| c.successes).sum();
        let (low, high) = match interval {
            Interval::Wilson => wilson(successes, n)?,
            Interval::ByPrompt { resamples, seed } => {
                let clusters: Vec<_> = clusters.iter().map(|c| (c.successes, c.scored)).collect();
                cluster_bootstrap(&clusters, resamples, seed)?
            }
        };
        let ties = clusters.iter().map(|c| c.ties).sum();
        Some(Accuracy { rate: successes / n as f64, low, high, n, ties })
    }

    /// The accuracy as a cell of a table.
    pub(super) fn cell(&self, file: Option<usize>, interval: Interval) -> String {
        let Some(a) = self.accuracy(file, interval) else { return "no scores".into() };
        let (all, _) = self.size(file);
        let missing = if a.n < all { format!(", {} of {all} scored", a.n) } else { String::new() };
        let ties = if a.ties > 0 { format!(", {} ties", a.ties) } else { String::new() };
        format!("{:.1} ({:.1} to {:.1}{missing}{ties})", 100.0 * a.rate, 100.0 * a.low, 100.0 * a.high)
    }

    /// Prompts of a file; over all files, a prompt that stands in two of them is one cluster.
    fn clusters(&self, file: Option<usize>) -> Vec<Counts> {
        let mut merged: BTreeMap<&str, Counts> = BTreeMap::new();
        for ((_, prompt), counts) in self.prompts.iter().filter(|((f, _), _)| file.is_none_or(|file| *f == file)) {
            let into = merged.entry(prompt).or_default();
            into.successes += counts.successes;
            into.ties += counts.ties;
            into.scored += counts.scored;
            into.all += counts.all;
        }
        merged.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use plumb_client::text;

    use super::*;

    type Rewards = Option<(f32, f32)>;

    fn tally(outcomes: &[(usize, &str, Rewards)]) -> Tally {
        let mut tally = Tally::default();
        for (file, prompt, rewards) in outcomes {
            let (better, worse) = (text("a"), text("b"));
            tally.add(&Comparison { file: *file, number: 1, prompt: (*prompt).into(), better, worse }, *rewards);
        }
        tally
    }

    #[test]
    fn accuracy_by_file_and_over_all() {
        let (right, wrong, tie) = (Some((1.0, 0.0)), Some((0.0, 1.0)), Some((0.5, 0.5)));
        let t = tally(&[(0, "p", right), (0, "p", wrong), (0, "q", tie), (1, "p", right), (1, "r", None)]);
        let by_prompt = Interval::ByPrompt { resamples: 500, seed: 3 };
        let rate = |file| t.accuracy(file, by_prompt).map(|a| (a.rate, a.n, a.ties));
        assert_eq!(rate(Some(0)), Some((0.5, 3, 1)));
        assert_eq!(rate(Some(1)), Some((1.0, 1, 0)));
        assert_eq!(rate(None), Some((0.625, 4, 1)));
        // The prompt p stands in both files.
        assert_eq!((t.size(Some(0)), t.size(Some(1)), t.size(None)), ((3, 2), (2, 2), (5, 3)));
        assert_eq!(t.failed, 1);
        assert_eq!(t.cell(Some(1), Interval::Wilson), "100.0 (20.7 to 100.0, 1 of 2 scored)");
        assert_eq!(tally(&[(0, "p", None)]).cell(None, by_prompt), "no scores");
    }
}
