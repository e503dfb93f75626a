//! From scores to numbers: nothing here knows where a score comes from.

use std::collections::BTreeMap;

use plumb_client::stats::{cluster_bootstrap, wilson};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// A number that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// Of what: a file, a category, or `all`.
    pub name: String,
    /// What was measured, such as `accuracy`.
    pub metric: String,
    /// What sequences were compared by: `reward`, or a language model's objective, with the HHH prompt if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<String>,
    /// The number.
    pub value: f64,
    /// Where its 95 % interval begins.
    pub low: Option<f64>,
    /// Where it ends.
    pub high: Option<f64>,
    /// Observations.
    pub n: u64,
    /// Of the best of several samples: nats between it and one sample at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_bound: Option<f64>,
}

/// Name of what is measured over everything.
pub const ALL: &str = "all";

/// Predicted probabilities against what was observed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// As [`Measurement::score`].
    pub score: Option<String>,
    /// The bins that hold something, from 0 to 1.
    pub bins: Vec<Bin>,
    /// Expected calibration error: the mean distance between prediction and observation, a bin counting by its pairs.
    pub error: f64,
    /// Pairs.
    pub n: u64,
}

/// Pairs whose predictions are alike.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bin {
    /// Predictions from here ...
    pub low: f64,
    /// ... up to here.
    pub high: f64,
    /// Their mean.
    pub predicted: f64,
    /// Share of the pairs in which the side that was named first is the better one.
    pub observed: f64,
    /// Pairs.
    pub n: u64,
}

/// How intervals are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Intervals {
    pub(super) resamples: u32,
    pub(super) seed: u64,
}

/// A value of an item.
#[derive(Clone, Debug)]
pub(super) struct Observation<'a> {
    pub(super) category: &'a str,
    /// Observations of one cluster are alike, and are drawn together.
    pub(super) cluster: &'a str,
    pub(super) value: f64,
}

/// What a value can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    /// From 0 to 1.
    Share,
    Any,
}

impl Intervals {
    /// Means by category in the order of their appearance, and over all if there are several.
    pub(super) fn means(self, metric: &str, range: Range, observations: &[Observation<'_>]) -> Vec<Measurement> {
        let mut names: Vec<&str> = Vec::new();
        for observation in observations {
            if !names.contains(&observation.category) {
                names.push(observation.category);
            }
        }
        let several = names.len() > 1;
        let categories = names.into_iter().map(Some).chain(several.then_some(None));
        categories
            .filter_map(|category| {
                let own = observations.iter().filter(|o| category.is_none_or(|name| o.category == name));
                self.mean(category.unwrap_or(ALL), metric, range, own)
            })
            .collect()
    }

    /// A mean with its interval: Wilson's where every observation is a share of a cluster of its own, else a bootstrap
    /// over clusters. `None` without observations.
    fn mean<'a>(
        self,
        name: &str,
        metric: &str,
        range: Range,
        observations: impl Iterator<Item = &'a Observation<'a>>,
    ) -> Option<Measurement> {
        let mut clusters: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
        for observation in observations {
            let cluster = clusters.entry(observation.cluster).or_default();
            cluster.0 += observation.value;
            cluster.1 += 1;
        }
        let (sum, n) = clusters.values().fold((0.0, 0), |(sum, n), cluster| (sum + cluster.0, n + cluster.1));
        if n == 0 {
            return None;
        }
        let interval = match range == Range::Share && clusters.len() as u64 == n {
            true => wilson(sum, n),
            false => cluster_bootstrap(&clusters.into_values().collect::<Vec<_>>(), self.resamples, self.seed),
        };
        let (low, high) = interval.unzip();
        Some(Measurement {
            name: name.to_owned(),
            metric: metric.to_owned(),
            score: None,
            value: sum / n as f64,
            low,
            high,
            n,
            kl_bound: None,
        })
    }
}

/// Which side is found best: 1 if it is a right one; where k share the best score, the share of right ones among them.
pub(super) fn credit(scores: &[f64], right: &[bool]) -> f64 {
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let at_best = || scores.iter().zip(right).filter(|(score, _)| **score == best);
    let rights = at_best().filter(|(_, right)| **right).count();
    rights as f64 / at_best().count().max(1) as f64
}

/// Whether all of each group are right: group, category, whether right; in the order of the groups' appearance.
pub(super) fn grouped<'a>(items: impl Iterator<Item = (&'a str, &'a str, bool)>) -> Vec<(&'a str, &'a str, bool)> {
    let mut places: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut groups: Vec<(&str, &str, bool)> = Vec::new();
    for (group, category, right) in items {
        match places.get(&(category, group)) {
            Some(&place) => groups[place].2 &= right,
            None => {
                places.insert((category, group), groups.len());
                groups.push((group, category, right));
            }
        }
    }
    groups
}

/// Bins of the calibration curve, as in Askell et al. 2021, figure 30.
const BINS: usize = 18;

/// The calibration of `sigmoid(margin)` as the probability that the first side is better, each margin being chosen minus
/// rejected. Which side is first is drawn for every pair, the same for a seed. `None` without pairs.
pub(crate) fn calibration(margins: &[f64], seed: u64) -> Option<Calibration> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut bins = [(0.0, 0.0, 0_u64); BINS];
    for margin in margins {
        let chosen_first: bool = rng.random();
        let predicted = sigmoid(if chosen_first { *margin } else { -margin });
        let bin = &mut bins[((predicted * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += predicted;
        bin.1 += f64::from(u8::from(chosen_first));
        bin.2 += 1;
    }
    let n = margins.len() as u64;
    let edge = |i: usize| i as f64 / BINS as f64;
    let found = bins.iter().enumerate().filter(|(_, (.., count))| *count > 0);
    let bins: Vec<Bin> = found
        .map(|(i, &(predicted, observed, count))| Bin {
            low: edge(i),
            high: edge(i + 1),
            predicted: predicted / count as f64,
            observed: observed / count as f64,
            n: count,
        })
        .collect();
    let error = bins.iter().map(|bin| bin.n as f64 * (bin.predicted - bin.observed).abs()).sum::<f64>() / n as f64;
    (n > 0).then_some(Calibration { score: None, bins, error, n })
}

/// The probability of being preferred, from a difference of rewards (Askell et al. 2021, equation 3.1).
pub(super) fn sigmoid(margin: f64) -> f64 {
    1.0 / (1.0 + (-margin).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVALS: Intervals = Intervals { resamples: 2000, seed: 1 };

    fn observations<'a>(of: &[(&'a str, &'a str, f64)]) -> Vec<Observation<'a>> {
        of.iter().map(|&(category, cluster, value)| Observation { category, cluster, value }).collect()
    }

    #[test]
    fn means_by_category_and_over_all() {
        let found = INTERVALS.means(
            "accuracy",
            Range::Share,
            &observations(&[("b", "1", 1.0), ("a", "2", 0.0), ("b", "3", 0.0), ("b", "4", 0.5)]),
        );
        let short: Vec<_> = found.iter().map(|m| (&m.name[..], m.value, m.n)).collect();
        assert_eq!(short, [("b", 0.5, 3), ("a", 0.0, 1), ("all", 0.375, 4)]);
        assert_eq!(INTERVALS.means("accuracy", Range::Share, &[]), []);
    }

    #[test]
    fn what_lies_in_one_cluster_counts_less() {
        let clusters = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
        let many: Vec<String> = (0..100).map(|i| i.to_string()).collect();
        let apart: Vec<_> = (0..100).map(|i| ("c", &many[i][..], (i % 2) as f64)).collect();
        let together: Vec<_> = (0..100).map(|i| ("c", clusters[i / 10], (i / 10 % 2) as f64)).collect();
        let [apart, together] =
            [apart, together].map(|of| INTERVALS.means("accuracy", Range::Share, &observations(&of)).remove(0));
        assert_eq!((apart.value, together.value), (0.5, 0.5));
        // statsmodels.stats.proportion.proportion_confint(50, 100, method="wilson")
        assert!((apart.low.unwrap() - 0.403_832).abs() < 1e-6 && (apart.high.unwrap() - 0.596_168).abs() < 1e-6);
        let width = together.high.unwrap() - together.low.unwrap();
        assert!((width - 0.6).abs() < 0.11, "{width}");
    }

    #[test]
    fn the_best_score_decides() {
        let right = [false, true, false, false];
        for (scores, expected) in [
            ([0.0, 3.0, 1.0, 2.0], 1.0),
            ([4.0, 3.0, 1.0, 2.0], 0.0),
            ([3.0, 3.0, 1.0, 2.0], 0.5),
            ([1.0, 1.0, 1.0, 1.0], 0.25),
            ([2.0, 1.0, 2.0, 0.0], 0.0),
        ] {
            assert_eq!(credit(&scores, &right), expected, "{scores:?}");
        }
        assert_eq!(credit(&[-1.5, -1.5], &[true, false]), 0.5);
        assert_eq!(credit(&[1.0, 1.0, 0.0], &[true, true, false]), 1.0);
    }

    #[test]
    fn a_group_is_right_if_all_of_it_is() {
        let items = [("1", "a", true), ("1", "a", true), ("2", "a", true), ("2", "a", false), ("1", "b", false)];
        let expected = [("1", "a", true), ("2", "a", false), ("1", "b", false)];
        assert_eq!(grouped(items.into_iter()), expected);
    }

    #[test]
    fn calibration_of_what_is_right_as_often_as_it_says() {
        // A margin of ln 3 says 75 %; a quarter of these pairs has the rejected side ahead.
        let margins: Vec<f64> = (0..4000).map(|i| 3f64.ln() * if i % 4 == 0 { -1.0 } else { 1.0 }).collect();
        let found = calibration(&margins, 5).unwrap();
        assert_eq!((found.n, found.bins.len()), (4000, 2));
        assert_eq!(found.bins.iter().map(|bin| bin.n).sum::<u64>(), 4000);
        for (bin, expected) in found.bins.iter().zip([0.25, 0.75]) {
            assert!((bin.predicted - expected).abs() < 1e-12 && (bin.observed - expected).abs() < 0.03, "{bin:?}");
            assert!(bin.low <= expected && expected < bin.high, "{bin:?}");
        }
        assert!(found.error < 0.03, "{}", found.error);
        assert_eq!(calibration(&margins, 5), Some(found), "a seed gives the same curve");
        // One that is always right and says 75 % is a quarter off.
        let sure = calibration(&vec![3f64.ln(); 1000], 5).unwrap();
        assert!((sure.error - 0.25).abs() < 1e-12, "{}", sure.error);
        assert_eq!(calibration(&[], 0), None);
    }
}
