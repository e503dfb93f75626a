//! Losses on rewards and on vocabulary logits, and their gradients.

use crate::element::{Element, scale};
use crate::head::{log_sum_exp, soft_cap};
use crate::math::exp;
use crate::parallel::{Shared, for_each_piece};
use crate::simd::vectorised;

/// A teacher's likeliest tokens at one position; what is left of its probability belongs to all others together.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    /// Their ids, no two the same.
    pub ids: &'a [u32],
    /// Their log-probabilities in nats.
    pub log_probs: &'a [f32],
}

/// How `weight * softplus(rejected - chosen)` (Askell et al. 2021, equation 3.1) of each pair of `rewards[pairs, 2]`, chosen
/// before rejected, changes with them, into `slopes[pairs, 2]`.
///
/// # Panics
/// If the lengths differ or are odd.
pub fn pair_slopes(rewards: &[f32], weight: f32, slopes: &mut [f32]) {
    let ((pairs, rest), (slopes, _)) = (rewards.as_chunks::<2>(), slopes.as_chunks_mut::<2>());
    assert!(rest.is_empty() && pairs.len() == slopes.len(), "rewards of pairs");
    for ([chosen, rejected], slopes) in pairs.iter().zip(slopes) {
        // An exponential that is infinite makes a slope of 0, as it should.
        let d = weight / (1.0 + (chosen - rejected).exp());
        *slopes = [-d, d];
    }
}

/// For every row of `logits[rows, vocabulary]` the loss `-log softmax(logits)[target]` in nats, into `losses`, and the
/// gradient of `weights[row] * loss` with respect to what the logits were before the soft cap, into
/// `d[rows, vocabulary]`. The logits are changed.
///
/// # Panics
/// If the lengths do not fit or a target is not in the vocabulary.
pub fn cross_entropy<E: Element>(
    logits: &mut [f32],
    softcap: Option<f32>,
    targets: &[u32],
    weights: &[f32],
    losses: &mut [f32],
    d: &mut [E],
) {
    for_each_row(logits, softcap, weights, losses, d, |row, logits, slopes| {
        let target = targets[row] as usize;
        let log_sum = log_sum_exp(logits);
        let loss = log_sum - logits[target];
        soft_max(logits, log_sum, slopes);
        slopes[target] -= 1.0;
        loss
    });
}

/// For every row the Kullback-Leibler divergence of the model from the teacher over the teacher's likeliest tokens and
/// one category of all others (Askell et al. 2021, appendix B.5); otherwise as [`cross_entropy`].
///
/// # Panics
/// If the lengths do not fit or an id is not in the vocabulary.
pub fn distillation<E: Element>(
    logits: &mut [f32],
    softcap: Option<f32>,
    teacher: &[TopK<'_>],
    weights: &[f32],
    losses: &mut [f32],
    d: &mut [E],
) {
    /// The least probability of all other tokens together: its logarithm stays finite.
    const LEAST: f32 = 1e-8;
    for_each_row(logits, softcap, weights, losses, d, |row, logits, slopes| {
        let TopK { ids, log_probs } = teacher[row];
        let log_sum = log_sum_exp(logits);
        soft_max(logits, log_sum, slopes);
        let (mut seen, mut known, mut loss) = (0.0f32, 0.0f32, 0.0f32);
        for (id, log_prob) in ids.iter().zip(log_probs) {
            let q = exp(*log_prob);
            known += q;
            seen += slopes[*id as usize];
            loss += q * (log_prob - (logits[*id as usize] - log_sum));
        }
        let (q_rest, s_rest) = ((1.0 - known).max(LEAST), (1.0 - seen).max(LEAST));
        loss += q_rest * (q_rest.ln() - s_rest.ln());
        // All others: s - q_rest * s / s_rest; the teacher's: s - q.
        let keep: Vec<f32> = ids.iter().map(|id| slopes[*id as usize]).collect();
        let factor = 1.0 - q_rest / s_rest;
        slopes.iter_mut().for_each(|slope| *slope *= factor);
        for ((id, log_prob), s) in ids.iter().zip(log_probs).zip(keep) {
            slopes[*id as usize] = s - exp(*log_prob);
        }
        loss
    });
}

/// Calls `f(row, logits, slopes)`, which answers the loss and fills in its gradient, for all rows.
fn for_each_row<E: Element>(
    logits: &mut [f32],
    softcap: Option<f32>,
    weights: &[f32],
    losses: &mut [f32],
    d: &mut [E],
    f: impl Fn(usize, &[f32], &mut [f32]) -> f32 + Sync + Send,
) {
    let rows = weights.len();
    let vocabulary = logits.len() / rows.max(1);
    assert_eq!((logits.len(), d.len(), losses.len()), (rows * vocabulary, rows * vocabulary, rows), "shapes of a loss");
    let (logits, losses, d) = (Shared::new(logits), Shared::new(losses), Shared::new(d));
    for_each_piece(rows, 1, |piece| {
        let row = piece.start;
        let range = row * vocabulary..(row + 1) * vocabulary;
        // SAFETY: every row is one piece.
        let (logits, d, loss) = unsafe { (logits.range(range.clone()), d.range(range), losses.range(piece)) };
        if let Some(cap) = softcap {
            soft_cap(logits, cap);
        }
        let mut slopes = vec![0.0; vocabulary];
        loss[0] = f(row, logits, &mut slopes);
        if let Some(cap) = softcap {
            uncap(logits, cap, &mut slopes);
        }
        scale(&slopes, weights[row], d);
    });
}

vectorised! {
    fn soft_max(logits: &[f32], log_sum: f32, out: &mut [f32]) {
        for (out, logit) in out.iter_mut().zip(logits) {
            *out = exp(logit - log_sum);
        }
    }
}

vectorised! {
    /// The slope of `cap * tanh(x / cap)` is `1 - tanh(x / cap)^2`.
    fn uncap(capped: &[f32], cap: f32, slopes: &mut [f32]) {
        for (slope, y) in slopes.iter_mut().zip(capped) {
            *slope *= 1.0 - (y / cap) * (y / cap);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares gradients with differences of a loss that is computed in f64.
    fn check(
        rows: usize,
        vocabulary: usize,
        softcap: Option<f32>,
        found: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]),
        loss: impl Fn(usize, &[f64]) -> f64,
    ) {
        let logits: Vec<f32> = (0..rows * vocabulary).map(|i| (i * 37 % 101) as f32 / 20.0 - 2.5).collect();
        let weights: Vec<f32> = (0..rows).map(|i| 0.25 + i as f32).collect();
        let (mut losses, mut d) = (vec![0.0; rows], vec![0.0; rows * vocabulary]);
        found(&mut logits.clone(), &weights, &mut losses, &mut d);
        let cap = |x: f64| softcap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh());
        for (row, logits) in logits.chunks_exact(vocabulary).enumerate() {
            let logits: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
            let at = |logits: &[f64]| loss(row, &logits.iter().map(|x| cap(*x)).collect::<Vec<_>>());
            assert!((f64::from(losses[row]) - at(&logits)).abs() < 1e-5, "{} {}", losses[row], at(&logits));
            for i in 0..vocabulary {
                let (mut above, mut below) = (logits.clone(), logits.clone());
                above[i] += 1e-4;
                below[i] -= 1e-4;
                let expected = f64::from(weights[row]) * (at(&above) - at(&below)) / 2e-4;
                let found = f64::from(d[row * vocabulary + i]);
                assert!((found - expected).abs() < 1e-5 * (1.0 + row as f64), "{row} {i}: {found} {expected}");
            }
        }
    }

    #[test]
    fn slopes_of_pairs() {
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        for (chosen, rejected) in [(0.5f32, -1.0f32), (0.0, 0.0), (-3.0, 2.0), (200.0, -200.0), (-200.0, 200.0)] {
            let mut slopes = [f32::NAN; 4];
            pair_slopes(&[1.0, 1.0, chosen, rejected], 0.25, &mut slopes);
            let at = |step: f64| 0.25 * softplus(f64::from(rejected) - f64::from(chosen) - step);
            let expected = (at(1e-4) - at(-1e-4)) / 2e-4;
            let [equal @ .., found, opposite] = slopes;
            assert_eq!((equal, opposite), ([-0.125, 0.125], -found));
            assert!((f64::from(found) - expected).abs() < 1e-6, "{chosen} {rejected}: {found} {expected}");
        }
    }

    fn log_softmax(logits: &[f64]) -> Vec<f64> {
        let sum = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
        logits.iter().map(|x| x - sum).collect()
    }

    #[test]
    fn cross_entropy_and_its_slopes() {
        let targets = [3u32, 0, 16];
        for softcap in [None, Some(2.0)] {
            check(
                3,
                17,
                softcap,
                |logits, weights, losses, d| cross_entropy(logits, softcap, &targets, weights, losses, d),
                |row, logits| -log_softmax(logits)[targets[row] as usize],
            );
        }
    }

    #[test]
    fn distillation_and_its_slopes() {
        let (ids, log_probs) = ([5u32, 2, 11], [-0.7f32, -1.5, -3.0]);
        let teacher = [TopK { ids: &ids, log_probs: &log_probs }; 2];
        for softcap in [None, Some(3.0)] {
            check(
                2,
                18,
                softcap,
                |logits, weights, losses, d| distillation(logits, softcap, &teacher, weights, losses, d),
                |_, logits| {
                    let s = log_softmax(logits);
                    let q: Vec<f64> = log_probs.iter().map(|q| f64::from(*q)).collect();
                    let top = ids.iter().zip(&q).map(|(id, q)| q.exp() * (q - s[*id as usize])).sum::<f64>();
                    let q_rest = 1.0 - q.iter().map(|q| q.exp()).sum::<f64>();
                    let s_rest = 1.0 - ids.iter().map(|id| s[*id as usize].exp()).sum::<f64>();
                    top + q_rest * (q_rest / s_rest).ln()
                },
            );
        }
    }
}
