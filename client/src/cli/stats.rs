//! The few statistics that reports need.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// 97.5 % quantile of the normal distribution: 95 % of it lie within so many deviations.
const Z95: f64 = 1.959_963_985;

/// Wilson's 95 % interval of a proportion; successes may be halves (ties). `None` for n of 0.
pub(crate) fn wilson(successes: f64, n: u64) -> Option<(f64, f64)> {
    if n == 0 {
        return None;
    }
    let n = n as f64;
    let p = successes / n;
    let z2 = Z95 * Z95;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    Some(((centre - half).max(0.0), (centre + half).min(1.0)))
}

/// Percentile bootstrap of a proportion whose observations come in clusters (several comparisons over one prompt):
/// clusters are drawn anew, not observations. A cluster is (successes, observations). `None` without observations.
pub(crate) fn cluster_bootstrap(clusters: &[(f64, u64)], resamples: u32, seed: u64) -> Option<(f64, f64)> {
    if clusters.iter().all(|(_, n)| *n == 0) || resamples == 0 {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut rates: Vec<f64> = (0..resamples)
        .filter_map(|_| {
            let draw = |_| clusters[rng.random_range(0..clusters.len())];
            let (successes, n) = (0..clusters.len()).map(draw).fold((0.0, 0), |(s, n), (cs, cn)| (s + cs, n + cn));
            (n > 0).then(|| successes / n as f64)
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    Some((quantile(&rates, 0.025)?, quantile(&rates, 0.975)?))
}

/// A quantile of sorted values, interpolated.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q.clamp(0.0, 1.0) * (sorted.len().checked_sub(1)? as f64);
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// Mean and deviation of a stream of values (Welford), and a fair sample of them in bounded memory.
pub(crate) struct Distribution {
    n: u64,
    mean: f64,
    squares: f64,
    min: f64,
    max: f64,
    sample: Vec<f64>,
    rng: ChaCha8Rng,
}

/// Enough for quantiles to three digits; 1 MB.
const SAMPLE: usize = 1 << 17;

impl Default for Distribution {
    fn default() -> Self {
        let rng = ChaCha8Rng::seed_from_u64(0);
        Self { n: 0, mean: 0.0, squares: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY, sample: Vec::new(), rng }
    }
}

impl Distribution {
    pub(crate) fn add(&mut self, value: f64) {
        self.n += 1;
        let before = value - self.mean;
        self.mean += before / self.n as f64;
        self.squares += before * (value - self.mean);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        // Reservoir sampling: every value has the same chance to be in the sample.
        if self.sample.len() < SAMPLE {
            self.sample.push(value);
        } else if let Some(place) = self.sample.get_mut(self.rng.random_range(0..self.n) as usize) {
            *place = value;
        }
    }

    pub(crate) fn n(&self) -> u64 {
        self.n
    }

    pub(crate) fn mean(&self) -> f64 {
        self.mean
    }

    /// Of the sample, with n - 1.
    pub(crate) fn deviation(&self) -> f64 {
        if self.n < 2 { 0.0 } else { (self.squares / (self.n - 1) as f64).sqrt() }
    }

    /// Numbers and a histogram, for people.
    pub(crate) fn describe(&self, name: &str) -> String {
        if self.n == 0 {
            return String::new();
        }
        let mut sorted = self.sample.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |q| quantile(&sorted, q).unwrap_or(f64::NAN);
        let mut text = format!(
            "{name}: mean {:.4}, deviation {:.4}, min {:.4}, p5 {:.4}, median {:.4}, p95 {:.4}, max {:.4}\n",
            self.mean,
            self.deviation(),
            self.min,
            at(0.05),
            at(0.5),
            at(0.95),
            self.max
        );
        if self.n > SAMPLE as u64 {
            text += &format!("(quantiles and histogram from a random sample of {SAMPLE})\n");
        }
        text + &histogram(&sorted)
    }
}

/// Bars over equal bins.
fn histogram(sorted: &[f64]) -> String {
    const BINS: usize = 12;
    const WIDTH: usize = 40;
    let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return String::new() };
    if min >= max {
        return String::new();
    }
    let mut bins = [0_usize; BINS];
    for value in sorted {
        bins[(((value - min) / (max - min) * BINS as f64) as usize).min(BINS - 1)] += 1;
    }
    let tallest = bins.iter().copied().max().unwrap_or(1).max(1);
    let edge = |i: usize| min + (max - min) * i as f64 / BINS as f64;
    let bar = |count: usize| "█".repeat((count * WIDTH).div_ceil(tallest));
    bins.iter().enumerate().map(|(i, &n)| format!("{:>10.3}  {:<WIDTH$}  {n}\n", edge(i), bar(n))).collect()
}

/// How often the chosen text has the higher reward.
#[derive(Default)]
pub(crate) struct Preferences {
    wins: u64,
    ties: u64,
    margins: Distribution,
}

impl Preferences {
    pub(crate) fn add(&mut self, chosen: f32, rejected: f32) {
        self.wins += u64::from(chosen > rejected);
        self.ties += u64::from(chosen == rejected);
        self.margins.add(f64::from(chosen) - f64::from(rejected));
    }

    pub(crate) fn n(&self) -> u64 {
        self.margins.n()
    }

    /// Ties count half.
    pub(crate) fn successes(&self) -> f64 {
        self.wins as f64 + self.ties as f64 / 2.0
    }

    pub(crate) fn describe(&self) -> String {
        let Some((low, high)) = wilson(self.successes(), self.n()) else { return String::new() };
        format!(
            "pairs: {}, chosen over rejected in {:.2} % (95% Wilson interval {:.2} to {:.2} %; {} ties count half), \
             mean margin {:.4} (deviation {:.4})\n",
            self.n(),
            100.0 * self.successes() / self.n() as f64,
            100.0 * low,
            100.0 * high,
            self.ties,
            self.margins.mean(),
            self.margins.deviation(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(value: Option<(f64, f64)>, low: f64, high: f64) {
        let (a, b) = value.unwrap();
        assert!((a - low).abs() < 5e-4 && (b - high).abs() < 5e-4, "{a} {b}, expected {low} {high}");
    }

    // Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    #[test]
    fn wilson_intervals() {
        near(wilson(81.0, 263), 0.2553, 0.3662);
        near(wilson(15.0, 148), 0.0624, 0.1605);
        near(wilson(0.0, 20), 0.0, 0.1611);
        near(wilson(1.0, 29), 0.0061, 0.1718);
        // A tie: half a success.
        near(wilson(0.5, 1), 0.0546, 0.9454);
        assert_eq!(wilson(0.0, 0), None);
    }

    #[test]
    fn bootstrap_respects_clusters() {
        let seed = |clusters: &[(f64, u64)]| cluster_bootstrap(clusters, 4000, 1).unwrap();
        let apart: Vec<_> = (0..100).map(|i| (f64::from(i % 2), 1)).collect();
        let together: Vec<_> = (0..10).map(|i| (10.0 * f64::from(i % 2), 10)).collect();
        let ((a, b), (c, d)) = (seed(&apart), seed(&together));
        // The same 100 answers, half of them right: ten at a time they say as little as ten.
        assert!((b - a - 0.196).abs() < 0.03, "{a} {b}");
        assert!((d - c - 0.6).abs() < 0.11, "{c} {d}");
        assert_eq!(seed(&apart), (a, b), "the same seed gives the same interval");
        assert_eq!(cluster_bootstrap(&[], 100, 0), None);
        assert_eq!(cluster_bootstrap(&[(0.0, 0)], 100, 0), None);
        assert_eq!(cluster_bootstrap(&[(1.0, 1)], 100, 0), Some((1.0, 1.0)));
    }

    #[test]
    fn quantiles() {
        let sorted = [1.0, 2.0, 3.0, 4.0];
        for (q, expect) in [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.25, 1.75)] {
            assert_eq!(quantile(&sorted, q), Some(expect));
        }
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn distributions() {
        let mut d = Distribution::default();
        for value in [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0] {
            d.add(value);
        }
        assert_eq!((d.n(), d.mean()), (8, 5.0));
        assert!((d.deviation() - (32.0_f64 / 7.0).sqrt()).abs() < 1e-12);
        let text = d.describe("reward");
        assert!(text.contains("median 4.5000") && text.lines().count() == 13, "{text}");
    }

    #[test]
    fn a_long_stream_is_sampled_fairly() {
        let mut d = Distribution::default();
        for i in 0..(3 * SAMPLE) {
            d.add(i as f64);
        }
        assert_eq!(d.sample.len(), SAMPLE);
        let mean = d.sample.iter().sum::<f64>() / SAMPLE as f64;
        assert!((mean / d.mean() - 1.0).abs() < 0.01, "{mean}");
    }

    #[test]
    fn ties_count_half() {
        let mut p = Preferences::default();
        for (chosen, rejected) in [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (3.0, 1.0)] {
            p.add(chosen, rejected);
        }
        assert_eq!((p.n(), p.successes()), (4, 2.5));
        assert!(p.describe().contains("62.50 %") && p.describe().contains("mean margin 0.5000"), "{}", p.describe());
    }
}
