//! Intervals of what is measured, and how far two measurements of the same things agree.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// 97.5 % quantile of the normal distribution: 95 % of it lie within so many deviations.
const Z95: f64 = 1.959_963_985;

/// Wilson's 95 % interval of a proportion; successes may be halves (ties). `None` for n of 0.
pub fn wilson(successes: f64, n: u64) -> Option<(f64, f64)> {
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
pub fn cluster_bootstrap(clusters: &[(f64, u64)], resamples: u32, seed: u64) -> Option<(f64, f64)> {
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
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q.clamp(0.0, 1.0) * (sorted.len().checked_sub(1)? as f64);
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// Numbers that describe values. Quantiles are interpolated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names are the field's")]
pub struct Summary {
    pub n: u64,
    pub mean: f64,
    /// With n - 1.
    pub std: f64,
    pub min: f64,
    pub p5: f64,
    pub p25: f64,
    pub median: f64,
    pub p75: f64,
    pub p95: f64,
    pub max: f64,
}

/// Describes sorted values; `None` if there are none.
pub fn summary(sorted: &[f64]) -> Option<Summary> {
    let n = sorted.len() as f64;
    let mean = sorted.iter().sum::<f64>() / n;
    let squares: f64 = sorted.iter().map(|value| (value - mean).powi(2)).sum();
    let at = |q| quantile(sorted, q);
    Some(Summary {
        n: sorted.len() as u64,
        mean,
        std: if sorted.len() < 2 { 0.0 } else { (squares / (n - 1.0)).sqrt() },
        min: at(0.0)?,
        p5: at(0.05)?,
        p25: at(0.25)?,
        median: at(0.5)?,
        p75: at(0.75)?,
        p95: at(0.95)?,
        max: at(1.0)?,
    })
}

/// A mean with its 95 % interval, where observations come in clusters that move together, in constant memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClusteredMean {
    clusters: u64,
    n: f64,
    sum: f64,
    sum_squares: f64,
    sum_times_n: f64,
    n_squares: f64,
}

/// A mean and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Estimate {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

impl ClusteredMean {
    /// Adds a cluster by the sum and the number of its observations.
    pub fn add(&mut self, sum: f64, n: u64) {
        if n == 0 {
            return;
        }
        let n = n as f64;
        self.clusters += 1;
        self.n += n;
        self.sum += sum;
        self.sum_squares += sum * sum;
        self.sum_times_n += sum * n;
        self.n_squares += n * n;
    }

    /// Observations.
    pub fn n(&self) -> u64 {
        self.n as u64
    }

    /// The mean over observations; the interval is that of a ratio of two sums over clusters (Cochran 1977, section 6.3).
    /// `None` without observations; a single cluster has an infinite interval.
    pub fn estimate(&self) -> Option<Estimate> {
        if self.clusters == 0 {
            return None;
        }
        let mean = self.sum / self.n;
        let residuals = self.sum_squares - 2.0 * mean * self.sum_times_n + mean * mean * self.n_squares;
        let clusters = self.clusters as f64;
        let half = Z95 * (residuals.max(0.0) * clusters / (clusters - 1.0)).sqrt() / self.n;
        let half = if self.clusters == 1 { f64::INFINITY } else { half };
        Some(Estimate { mean, low: mean - half, high: mean + half })
    }
}

/// The largest distance between two distribution functions (Kolmogorov and Smirnov), from sorted values, and the
/// probability of a larger one if both were drawn from the same distribution, asymptotically. `None` without values.
pub fn kolmogorov_smirnov(a: &[f64], b: &[f64]) -> Option<(f64, f64)> {
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let (n, m) = (a.len() as f64, b.len() as f64);
    let (mut i, mut j, mut distance) = (0, 0, 0.0_f64);
    while i < a.len() && j < b.len() {
        let value = a[i].min(b[j]);
        i += a[i..].iter().take_while(|&&x| x <= value).count();
        j += b[j..].iter().take_while(|&&x| x <= value).count();
        distance = distance.max((i as f64 / n - j as f64 / m).abs());
    }
    Some((distance, kolmogorov((n * m / (n + m)).sqrt() * distance)))
}

/// Survival function of Kolmogorov's distribution, by whichever of its two series converges at once.
fn kolmogorov(x: f64) -> f64 {
    use std::f64::consts::PI;
    if x <= 0.0 {
        return 1.0;
    }
    if x < 1.0 {
        let term = |k: i32| (-(f64::from(2 * k - 1) * PI / x).powi(2) / 8.0).exp();
        return 1.0 - (2.0 * PI).sqrt() / x * (1..=10).map(term).sum::<f64>();
    }
    let term = |k: i32| f64::from(1 - 2 * ((k - 1) % 2)) * (-2.0 * (f64::from(k) * x).powi(2)).exp();
    2.0 * (1..=10).map(term).sum::<f64>()
}

/// Spearman's rank correlation, ties with their mean rank; `None` if one side is constant.
pub fn spearman(a: &[f32], b: &[f32]) -> Option<f64> {
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 + 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let scale = (product(&a, &a) * product(&b, &b)).sqrt();
    (scale > 0.0).then(|| product(&a, &b) / scale)
}

/// Ranks from 1.
fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| compare(values[i], values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for tied in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = first as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|&i| ranks[i] = rank);
        first += tied.len();
    }
    ranks
}

/// Kendall's tau-b in n log n steps (Knight 1966); `None` if one side is constant.
pub fn kendall(a: &[f32], b: &[f32]) -> Option<f64> {
    let pairs = |n: usize| n as f64 * (n as f64 - 1.0) / 2.0;
    let mut both: Vec<(f32, f32)> = a.iter().copied().zip(b.iter().copied()).collect();
    both.sort_by(|x, y| compare(x.0, y.0).then(compare(x.1, y.1)));
    let tied_a: f64 = both.chunk_by(|x, y| x.0 == y.0).map(|tied| pairs(tied.len())).sum();
    let tied_both: f64 = both.chunk_by(|x, y| x == y).map(|tied| pairs(tied.len())).sum();
    let mut b: Vec<f32> = both.iter().map(|&(_, y)| y).collect();
    let discordant = sort_counting_swaps(&mut b) as f64;
    let tied_b: f64 = b.chunk_by(|x, y| x == y).map(|tied| pairs(tied.len())).sum();
    let all = pairs(b.len());
    let scale = ((all - tied_a) * (all - tied_b)).sqrt();
    (scale > 0.0).then(|| (all - tied_a - tied_b + tied_both - 2.0 * discordant) / scale)
}

/// Merge sort; answers how many pairs stood in the wrong order.
fn sort_counting_swaps(values: &mut [f32]) -> u64 {
    let mut merged = values.to_vec();
    let (mut swaps, mut width) = (0, 1);
    while width < values.len() {
        for (run, out) in values.chunks(2 * width).zip(merged.chunks_mut(2 * width)) {
            let (mut left, mut right) = run.split_at(width.min(run.len()));
            for place in out {
                let from_right = right.first().is_some_and(|y| left.first().is_none_or(|x| y < x));
                if from_right {
                    swaps += left.len() as u64;
                }
                let side = if from_right { &mut right } else { &mut left };
                if let Some((first, rest)) = side.split_first() {
                    (*place, *side) = (*first, rest);
                }
            }
        }
        values.copy_from_slice(&merged);
        width *= 2;
    }
    swaps
}

/// Of finite numbers; -0 and 0 are equal.
fn compare(x: f32, y: f32) -> std::cmp::Ordering {
    x.partial_cmp(&y).unwrap_or(std::cmp::Ordering::Equal)
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

    /// As `tests/python/golden_statistics.py` draws them, which prints what is expected below.
    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut draw = || {
            state = (state * 1_103_515_245 + 12_345) % (1 << 31);
            ((state >> 16) % 40) as f32 / 2.0 - 10.0
        };
        (0..n).map(|_| draw()).collect()
    }

    fn sorted(values: &[f32]) -> Vec<f64> {
        let mut values: Vec<f64> = values.iter().copied().map(f64::from).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    #[track_caller]
    fn close(value: f64, expect: f64) {
        assert!((value - expect).abs() <= 1e-12 * expect.abs().max(1e-4), "{value}, expected {expect}");
    }

    #[test]
    fn agreement_is_what_scipy_computes() {
        let (a, b) = (numbers(50, 1), numbers(50, 2));
        let c: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b / 4.0).collect();
        let check = |x: &[f32], y: &[f32], rho: f64, tau: f64, distance: f64, p: f64| {
            close(spearman(x, y).unwrap(), rho);
            close(kendall(x, y).unwrap(), tau);
            let (found_distance, found_p) = kolmogorov_smirnov(&sorted(x), &sorted(y)).unwrap();
            close(found_distance, distance);
            close(found_p, p);
        };
        check(&a, &b, 0.17792860797761578, 0.1282492403806675, 0.06, 0.9999906941986655);
        check(&a, &c, 0.966778957884039, 0.8598862491458421, 0.1, 0.9639452436648751);
        check(&b, &c, 0.3981626243575339, 0.2839466931861663, 0.12, 0.8642827790506042);
        close(kolmogorov_smirnov(&sorted(&a), &sorted(&numbers(17, 3))).unwrap().0, 0.14470588235294118);
        for (x, p) in [
            (0.2, 0.999999999999495),
            (0.99, 0.2808738392255489),
            (1.0, 0.26999967167735456),
            (1.5, 0.022217962616525127),
            (3.0, 3.045995948942526e-8),
        ] {
            close(kolmogorov(x), p);
        }
    }

    #[test]
    fn agreement_of_what_is_equal_opposite_and_constant() {
        let (up, down) = ([1.0, 2.0, 3.0], [0.5, 0.25, -0.0]);
        assert_eq!((spearman(&up, &up), kendall(&up, &up)), (Some(1.0), Some(1.0)));
        assert_eq!((spearman(&up, &down), kendall(&up, &down)), (Some(-1.0), Some(-1.0)));
        for short in [&[][..], &[1.0], &[2.0, 2.0], &[0.0, -0.0]] {
            assert_eq!((spearman(short, &up[..short.len()]), kendall(short, &up[..short.len()])), (None, None));
        }
        assert_eq!(kolmogorov_smirnov(&[1.0, 2.0], &[1.0, 2.0]), Some((0.0, 1.0)));
        assert_eq!(kolmogorov_smirnov(&[1.0, 2.0], &[3.0]).unwrap().0, 1.0);
        assert_eq!(kolmogorov_smirnov(&[], &[3.0]), None);
    }

    #[test]
    fn summaries_are_what_numpy_computes() {
        let (a, b) = (numbers(50, 1), numbers(50, 2));
        let c: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b / 4.0).collect();
        let Summary { n, mean, std, min, p5, p25, median, p75, p95, max } = summary(&sorted(&c)).unwrap();
        close(std, 6.061894299639347);
        assert_eq!((n, mean, min, p5, p25), (50, -1.4175, -10.875, -9.6375, -6.625));
        assert_eq!((median, p75, p95, max), (-2.3125, 3.375, 8.7625, 10.0));
        assert_eq!((summary(&[]), summary(&[2.0]).map(|one| one.std)), (None, Some(0.0)));
    }

    #[test]
    fn a_mean_over_clusters_is_as_sure_as_they_are_many() {
        let c: Vec<f64> = numbers(50, 1).iter().zip(&numbers(50, 2)).map(|(a, b)| f64::from(a + b / 4.0)).collect();
        let mut mean = ClusteredMean::default();
        let mut rest = &c[..];
        for size in (1..=5).cycle() {
            let (cluster, after) = rest.split_at(size.min(rest.len()));
            mean.add(cluster.iter().sum(), cluster.len() as u64);
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        let Estimate { mean, low, high } = mean.estimate().unwrap();
        close(mean, -1.4175);
        // The constant of the normal distribution has ten digits.
        assert!((low + 3.0242984226743834).abs() < 1e-9 && (high - 0.18929842267438324).abs() < 1e-9, "{low} {high}");

        assert_eq!(ClusteredMean::default().estimate(), None);
        let mut still = ClusteredMean::default();
        still.add(0.0, 4);
        assert_eq!(still.estimate().unwrap().high, f64::INFINITY);
        still.add(0.0, 3);
        assert_eq!(still.estimate().unwrap(), Estimate { mean: 0.0, low: 0.0, high: 0.0 });
    }
}
