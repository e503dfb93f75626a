//! How good the best of k samples is, by the samples' own rank or by chance.

/// What the best-scored of k random samples is worth, without bias, from the scores and worths of all N of a problem: the
/// sum over samples, best first, of worth(i) C(N-i, k-1) / C(N, k) (Askell et al. 2021, appendix B.6). Samples of equal
/// score come in every order equally often, so each counts as the mean of them. `None` if there are fewer than k.
pub(super) fn best_of_k(samples: &[(f64, f64)], k: usize) -> Option<f64> {
    let n = samples.len();
    if k == 0 || k > n {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
    // -0 and 0 are equal scores.
    let equals = sorted.chunk_by(|a, b| a.0 == b.0).flat_map(|equal| {
        let worth = equal.iter().map(|(_, worth)| worth).sum::<f64>() / equal.len() as f64;
        std::iter::repeat_n(worth, equal.len())
    });
    // C(n-i, k-1) / C(n, k) without binomials: k/n first, and from one to the next by a ratio.
    let mut weight = k as f64 / n as f64;
    let mut sum = 0.0;
    for (i, worth) in (1..).zip(equals) {
        sum += weight * worth;
        if i + k > n {
            break;
        }
        weight *= (n - i - k + 1) as f64 / (n - i) as f64;
    }
    Some(sum)
}

/// The chance that at least one of k random samples of n is right, `c` being right: 1 - C(n-c, k) / C(n, k) (Chen et al.
/// 2021, arXiv 2107.03374, equation 1). It is what a ranker that knows the answers would reach. `None` if there are
/// fewer than k samples.
pub(super) fn pass_at_k(n: usize, c: usize, k: usize) -> Option<f64> {
    if k == 0 || k > n || c > n {
        return None;
    }
    if n - c < k {
        return Some(1.0);
    }
    Some(1.0 - (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>())
}

/// Nats that the best of k samples is from one sample at most, as a divergence of their distributions (Stiennon et al.
/// 2020, arXiv 2009.01325, appendix G.3; a bound by Beirami et al. 2024, arXiv 2401.01879).
pub(super) fn kl_bound(k: usize) -> f64 {
    let k = k as f64;
    k.ln() - (k - 1.0) / k
}

/// The k that are worth a look: powers of two, and all samples.
pub(super) fn ks(most: usize) -> Vec<usize> {
    let mut ks: Vec<usize> = std::iter::successors(Some(1), |k| Some(k * 2)).take_while(|k| *k < most).collect();
    if most > 0 {
        ks.push(most);
    }
    ks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every subset of k samples, with ties broken either way by every order of the samples.
    fn by_hand(samples: &[(f64, f64)], k: usize) -> f64 {
        let (mut sum, mut count) = (0.0, 0.0);
        for subset in 0_u32..1 << samples.len() {
            if subset.count_ones() as usize != k {
                continue;
            }
            let chosen = samples.iter().enumerate().filter(|(i, _)| subset >> i & 1 == 1).map(|(_, s)| s);
            let best = chosen.clone().map(|(score, _)| *score).fold(f64::NEG_INFINITY, f64::max);
            let top: Vec<f64> = chosen.filter(|(score, _)| *score == best).map(|(_, worth)| *worth).collect();
            sum += top.iter().sum::<f64>() / top.len() as f64;
            count += 1.0;
        }
        sum / count
    }

    #[test]
    fn the_best_of_k_is_what_all_subsets_say() {
        let distinct = [(0.3, 1.0), (2.0, 0.0), (-1.0, 1.0), (1.5, 1.0), (0.0, 0.0), (9.0, 0.0), (0.7, 1.0)];
        let tied = [(1.0, 1.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-0.0, 0.0), (2.0, 1.0), (2.0, 0.0)];
        for samples in [distinct, tied, distinct.map(|(score, _)| (score, score))] {
            for k in 1..=samples.len() {
                let (found, expected) = (best_of_k(&samples, k).unwrap(), by_hand(&samples, k));
                assert!((found - expected).abs() < 1e-12, "k {k}: {found}, expected {expected}");
            }
        }
        assert!((best_of_k(&distinct, 1).unwrap() - 4.0 / 7.0).abs() < 1e-12, "one sample: the mean");
        assert_eq!(best_of_k(&distinct, 7), Some(0.0), "all of them: the best");
        assert_eq!((best_of_k(&distinct, 8), best_of_k(&distinct, 0), best_of_k(&[], 1)), (None, None, None));
    }

    #[test]
    fn many_samples_keep_their_digits() {
        // All right: the weights add up to 1.
        let samples: Vec<_> = (0..1000).map(|i| (f64::from(i), 1.0)).collect();
        for k in [1, 2, 100, 999, 1000] {
            assert!((best_of_k(&samples, k).unwrap() - 1.0).abs() < 1e-9, "{k}");
        }
        // Only the 11th best is right: C(989, 99) / C(1000, 100) by Python's math.comb.
        let samples: Vec<_> = (0..1000).map(|i| (-f64::from(i), f64::from(u8::from(i == 10)))).collect();
        assert!((best_of_k(&samples, 100).unwrap() / 0.035_043_203_514_344_04 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn pass_at_k_is_the_chance_of_one_that_is_right() {
        let binomial = |n: usize, k: usize| (0..k).map(|i| (n - i) as f64 / (i + 1) as f64).product::<f64>();
        for (n, c, k) in [(10, 3, 1), (10, 3, 4), (10, 0, 5), (10, 10, 1), (100, 7, 10), (5, 1, 5), (10, 8, 3)] {
            let misses = if n - c < k { 0.0 } else { binomial(n - c, k) / binomial(n, k) };
            assert!((pass_at_k(n, c, k).unwrap() - (1.0 - misses)).abs() < 1e-12, "{n} {c} {k}");
        }
        assert_eq!((pass_at_k(3, 1, 4), pass_at_k(3, 1, 0)), (None, None));
        // It is the best of k by a score that knows what is right.
        let samples: Vec<_> = (0..9).map(|i| f64::from(u8::from(i % 4 == 0))).map(|right| (right, right)).collect();
        for k in 1..=9 {
            assert!((best_of_k(&samples, k).unwrap() - pass_at_k(9, 3, k).unwrap()).abs() < 1e-12, "{k}");
        }
    }

    #[test]
    fn the_best_reward_of_k_grows_with_k() {
        // Of 1, 2, 4 and 8: 15/4; (3 * 8 + 2 * 4 + 2) / 6; (3 * 8 + 4) / 4; 8.
        let samples = [4.0, 1.0, 8.0, 2.0].map(|reward| (reward, reward));
        for (k, expected) in (1..).zip([3.75, 34.0 / 6.0, 7.0, 8.0]) {
            assert!((best_of_k(&samples, k).unwrap() - expected).abs() < 1e-12, "{k}");
        }
    }

    #[test]
    fn the_best_of_more_is_farther_away() {
        for (k, expected) in [(1, 0.0), (2, 0.193_147), (4, 0.636_294), (64, 3.174_508)] {
            assert!((kl_bound(k) - expected).abs() < 1e-6, "{k}");
        }
    }

    #[test]
    fn numbers_of_samples() {
        assert_eq!(ks(100), [1, 2, 4, 8, 16, 32, 64, 100]);
        assert_eq!((ks(1), ks(2), ks(0)), (vec![1], vec![1, 2], vec![]));
    }
}
