//! The numbers of each task, from the scores of its items.

use std::collections::HashMap;

use super::items::Item;
use super::measure::{self, ALL, Calibration, Intervals, Measurement, Observation, Range};
use super::options::{Objective, Options, Task};
use super::scorer::Outcome;
use super::{ranking, rewardbench};

/// An item with the numbers that its texts are compared by.
pub(super) struct View<'a> {
    item: &'a Item,
    /// None if a text has no score.
    scores: Option<Vec<f64>>,
}

/// An item all of whose texts have a score.
type Scored<'a> = (&'a Item, &'a [f64]);

impl<'a> View<'a> {
    pub(super) fn new(item: &'a Item, outcomes: &[Outcome], objective: Objective) -> Self {
        let scores = outcomes.iter().map(|outcome| outcome.as_ref().ok()?.by(objective)).collect();
        Self { item, scores }
    }
}

/// The numbers of a task, and the calibration curve if it compares pairs by rewards.
pub(super) fn measure(options: &Options, rewards: bool, views: &[View<'_>]) -> (Vec<Measurement>, Option<Calibration>) {
    let intervals = Intervals { resamples: options.resamples, seed: options.seed };
    let scored = views.iter().filter_map(|view| Some((view.item, view.scores.as_deref()?)));
    let scored: Vec<Scored<'_>> = scored.collect();
    match options.task {
        Task::Rerank => (reranked(intervals, &scored), None),
        Task::BestOfN => (best_rewards(intervals, &scored), None),
        Task::RmBench => (by_style(intervals, &scored), None),
        Task::Rewardbench => {
            // Several right answers have a measure of their own.
            let (ties, rest): (Vec<_>, Vec<_>) =
                scored.iter().copied().partition(|(item, _)| item.category == rewardbench::TIES);
            let rows = rest.iter().chain(&ties).map(|&(item, scores)| rewardbench::Scored {
                subset: &item.category,
                id: item.id.as_deref(),
                scores,
                right: &item.right,
            });
            let mut results = accuracy(intervals, &rest, rewardbench::credit_of_row);
            results.extend(rewardbench::sums(&rows.collect::<Vec<_>>()));
            (results, None)
        }
        _ => {
            let mut results = accuracy(intervals, &scored, measure::credit);
            results.extend(grouped(intervals, &scored));
            let calibration = pairs(intervals, &scored, rewards, &mut results);
            (results, calibration)
        }
    }
}

fn observe<'a>(item: &'a Item, value: f64) -> Observation<'a> {
    Observation { category: &item.category, cluster: &item.cluster, value }
}

fn accuracy(intervals: Intervals, scored: &[Scored<'_>], credit: impl Fn(&[f64], &[bool]) -> f64) -> Vec<Measurement> {
    let credits = scored.iter().map(|&(item, scores)| observe(item, credit(scores, &item.right)));
    intervals.means("accuracy", Range::Share, &credits.collect::<Vec<_>>())
}

/// The share of groups that are right as a whole, of those all of whose items are there.
fn grouped(intervals: Intervals, scored: &[Scored<'_>]) -> Vec<Measurement> {
    let mut sizes: HashMap<&str, usize> = HashMap::new();
    for (group, _) in scored.iter().filter_map(|(item, _)| item.group.as_ref()) {
        *sizes.entry(group).or_default() += 1;
    }
    let whole = scored.iter().filter_map(|&(item, scores)| {
        let (group, size) = item.group.as_ref()?;
        // A tie is not right.
        let right = measure::credit(scores, &item.right) == 1.0;
        (sizes.get(group.as_str()) == Some(size)).then_some((group.as_str(), item.category.as_str(), right))
    });
    let groups = measure::grouped(whole).into_iter();
    let shares = groups.map(|(cluster, category, right)| {
        let value = f64::from(u8::from(right));
        Observation { category, cluster, value }
    });
    intervals.means("group accuracy", Range::Share, &shares.collect::<Vec<_>>())
}

/// By how much the better side is found better, and for rewards whether that is calibrated: log-probabilities are not meant
/// to be. Nothing where items are no pairs.
fn pairs(
    intervals: Intervals,
    scored: &[Scored<'_>],
    rewards: bool,
    results: &mut Vec<Measurement>,
) -> Option<Calibration> {
    if !scored.iter().all(|(item, _)| item.is_pair()) {
        return None;
    }
    let margins: Vec<_> = scored.iter().map(|&(item, scores)| observe(item, scores[0] - scores[1])).collect();
    results.extend(intervals.means("margin", Range::Any, &margins));
    let margins: Vec<f64> = margins.iter().map(|margin| margin.value).collect();
    let calibration = measure::calibration(&margins, intervals.seed).filter(|_| rewards)?;
    results.push(Measurement {
        name: ALL.to_owned(),
        metric: "calibration error".to_owned(),
        score: None,
        value: calibration.error,
        low: None,
        high: None,
        n: calibration.n,
        kl_bound: None,
    });
    Some(calibration)
}

/// Accuracy of the best of k samples, and of a choice that knows what is right.
fn reranked(intervals: Intervals, problems: &[Scored<'_>]) -> Vec<Measurement> {
    let most = problems.iter().map(|(_, scores)| scores.len()).max().unwrap_or(0);
    let mut results = Vec::new();
    for k in ranking::ks(most) {
        let best = problems.iter().filter_map(|&(item, scores)| {
            let worth = item.right.iter().map(|right| f64::from(u8::from(*right)));
            let samples: Vec<_> = scores.iter().copied().zip(worth).collect();
            Some(observe(item, ranking::best_of_k(&samples, k)?))
        });
        let oracle = problems.iter().filter_map(|&(item, scores)| {
            let right = item.right.iter().filter(|right| **right).count();
            Some(observe(item, ranking::pass_at_k(scores.len(), right, k)?))
        });
        // Shares, but no counts of yes and no: only a bootstrap fits them.
        results.extend(intervals.means(&format!("acc@{k}"), Range::Any, &best.collect::<Vec<_>>()));
        results.extend(intervals.means(&format!("pass@{k}"), Range::Any, &oracle.collect::<Vec<_>>()));
    }
    results
}

/// What the best of k samples is expected to score.
fn best_rewards(intervals: Intervals, prompts: &[Scored<'_>]) -> Vec<Measurement> {
    let most = prompts.iter().map(|(_, scores)| scores.len()).max().unwrap_or(0);
    let of = |k: usize| {
        let best = prompts.iter().filter_map(|&(item, scores)| {
            let samples: Vec<_> = scores.iter().map(|score| (*score, *score)).collect();
            Some(observe(item, ranking::best_of_k(&samples, k)?))
        });
        let kl_bound = Some(ranking::kl_bound(k));
        let means = intervals.means(&format!("best@{k}"), Range::Any, &best.collect::<Vec<_>>());
        means.into_iter().map(move |mean| Measurement { kl_bound, ..mean })
    };
    (1..=most).flat_map(of).collect()
}

fn by_style(intervals: Intervals, prompts: &[Scored<'_>]) -> Vec<Measurement> {
    let shares: Vec<_> = prompts.iter().map(|&(item, scores)| (item, rewardbench::of_styles(scores))).collect();
    let of = |place: usize| {
        let observations: Vec<_> = shares.iter().map(|(item, shares)| observe(item, shares[place])).collect();
        intervals.means(rewardbench::STYLES[place], Range::Any, &observations)
    };
    (0..rewardbench::STYLES.len()).flat_map(of).collect()
}
