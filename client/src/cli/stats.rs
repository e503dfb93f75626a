//! Distributions of what was scored, for people.

use plumb_client::stats::{quantile, wilson};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
pub(crate) fn histogram(sorted: &[f64]) -> String {
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
