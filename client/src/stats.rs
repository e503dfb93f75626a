//! Intervals of what is measured.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
}
