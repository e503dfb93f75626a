//! What stands on top of the decoder: log-probabilities of given tokens and a scalar head, all in f32.

use crate::Element;
use crate::gemm::LANES;
use crate::linear::{Linear, PANEL, Store};
use crate::math::{exp, lane_max, lane_sum, tanh};
use crate::parallel::{Rows, Shared, for_each_piece};
use crate::simd::vectorised;

/// Rows that share a pass over the vocabulary.
const ROWS: usize = 96;
/// Panels of the vocabulary whose sums are taken together. A fixed cut, so that the order of summation does not depend
/// on how the work is spread.
const PANELS: usize = 16;

/// What a language model says of a given token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogProb {
    /// Its log-probability in nats.
    pub value: f32,
    /// Whether no token is likelier, and none of a lower id as likely: greedy decoding takes it.
    pub greedy: bool,
}

/// A row's logits, summed up.
#[derive(Clone, Copy)]
struct Sums {
    max: f32,
    /// Of exponentials relative to the largest logit.
    exps: f32,
    /// The target's logit, and the largest of the tokens before it that were summed up with it; minus infinity where
    /// the target is not among them.
    target: f32,
    before: f32,
}

const NO_LOGITS: Sums =
    Sums { max: f32::NEG_INFINITY, exps: 0.0, target: f32::NEG_INFINITY, before: f32::NEG_INFINITY };

/// `log softmax(W x)[target]` for every row of `x[rows, inputs]`. Logits live only as one panel at a time.
///
/// # Panics
/// If the lengths do not fit or a target is not in the vocabulary.
pub fn token_log_probs<E: Element>(head: &Linear<E>, softcap: Option<f32>, x: &[f32], targets: &[u32]) -> Vec<LogProb> {
    let (inputs, vocabulary) = (head.inputs(), head.outputs());
    assert_eq!(x.len(), targets.len() * inputs, "shapes of a language head");
    assert!(targets.iter().all(|t| (*t as usize) < vocabulary), "a target outside the vocabulary");
    let groups = vocabulary.div_ceil(PANEL * PANELS);
    let blocks = targets.len().div_ceil(ROWS);
    // For each row and group.
    let mut partial = vec![NO_LOGITS; targets.len() * groups];
    let shared = Shared::new(&mut partial);
    for_each_piece(blocks * groups, 1, |piece| {
        let (block, group) = (piece.start / groups, piece.start % groups);
        let rows = block * ROWS..((block + 1) * ROWS).min(targets.len());
        let x = &x[rows.start * inputs..rows.end * inputs];
        let mut scratch = [0.0; ROWS * PANEL];
        let sums = &mut scratch[..rows.len() * PANEL];
        for panel in group * PANELS..((group + 1) * PANELS).min(vocabulary.div_ceil(PANEL)) {
            let all = panel * PANEL..(panel + 1) * PANEL;
            head.strip(all, x, rows.len(), &mut Rows::new(sums, PANEL), Store::Set, E::gemm_tile_f32);
            let columns = PANEL.min(vocabulary - panel * PANEL);
            for (row, logits) in rows.clone().zip(sums.chunks_exact_mut(PANEL)) {
                // SAFETY: pieces differ in their rows or their group.
                let partial = unsafe { &mut shared.range(row * groups + group..row * groups + group + 1)[0] };
                let logits = &mut logits[..columns];
                if let Some(cap) = softcap {
                    soft_cap(logits, cap);
                }
                if let Some(target) = (targets[row] as usize).checked_sub(panel * PANEL).filter(|t| *t < columns) {
                    partial.target = logits[target];
                    partial.before = logits[..target].iter().copied().fold(partial.max, f32::max);
                }
                add_logits(logits, partial);
            }
        }
    });
    let merge = |(target, sums): (&u32, &[Sums])| merge(sums, *target as usize / (PANEL * PANELS));
    targets.iter().zip(partial.chunks_exact(groups)).map(merge).collect()
}

vectorised! {
    /// Takes logits into a running sum of exponentials relative to the largest logit.
    fn add_logits(logits: &[f32], into: &mut Sums) {
        let Sums { max, exps: sum, .. } = into;
        let mut largest = [*max; LANES];
        for chunk in logits.chunks(LANES) {
            for (lane, logit) in largest.iter_mut().zip(chunk) {
                *lane = if *logit > *lane { *logit } else { *lane };
            }
        }
        let panel_max = lane_max(largest).max(*max);
        let mut lanes = [0.0f32; LANES];
        let chunks = logits.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, logit) in lanes.iter_mut().zip(chunk) {
                *lane += exp(logit - panel_max);
            }
        }
        for (lane, logit) in lanes.iter_mut().zip(rest) {
            *lane += exp(logit - panel_max);
        }
        *sum = *sum * exp(*max - panel_max) + lane_sum(lanes);
        *max = panel_max;
    }
}

/// Puts a row's groups together; the target is in the one at `own`.
fn merge(groups: &[Sums], own: usize) -> LogProb {
    let max = groups.iter().map(|g| g.max).fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = groups.iter().map(|g| g.exps * exp(g.max - max)).sum();
    let Sums { target, before, .. } = groups[own];
    let before = groups[..own].iter().map(|g| g.max).fold(before, f32::max);
    LogProb { value: target - max - sum.ln(), greedy: target >= max && target > before }
}

/// The `count` likeliest tokens of every row of `x[rows, inputs]`, the likeliest first: their ids, and their
/// log-probabilities in nats, both `[rows, count]`. Of equally likely ones the lower id comes first.
///
/// # Panics
/// If the lengths do not fit or the vocabulary has fewer tokens.
pub fn top_log_probs<E: Element>(
    head: &Linear<E>,
    softcap: Option<f32>,
    x: &[f32],
    count: usize,
) -> (Vec<u32>, Vec<f32>) {
    let (inputs, vocabulary) = (head.inputs(), head.outputs());
    assert!(x.len().is_multiple_of(inputs), "shapes of a language head");
    assert!((1..=vocabulary).contains(&count), "more tokens than the vocabulary has");
    let rows = x.len() / inputs;
    let (mut ids, mut log_probs) = (vec![0; rows * count], vec![0.0; rows * count]);
    let mut logits = vec![0.0; rows.min(ROWS) * vocabulary];
    let outputs = ids.chunks_mut(ROWS * count).zip(log_probs.chunks_mut(ROWS * count));
    for (x, (ids, log_probs)) in x.chunks(ROWS * inputs).zip(outputs) {
        let logits = &mut logits[..x.len() / inputs * vocabulary];
        head.forward_f32(x, logits, Store::Set);
        let (logits, ids, log_probs) = (Shared::new(logits), Shared::new(ids), Shared::new(log_probs));
        for_each_piece(x.len() / inputs, 1, |row| {
            let row = row.start;
            let range = |width: usize| row * width..(row + 1) * width;
            // SAFETY: every row is taken once.
            let (logits, ids, log_probs) =
                unsafe { (logits.range(range(vocabulary)), ids.range(range(count)), log_probs.range(range(count))) };
            if let Some(cap) = softcap {
                soft_cap(logits, cap);
            }
            let log_sum = log_sum_exp(logits);
            let mut order: Vec<u32> = (0..vocabulary as u32).collect();
            let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
            order.select_nth_unstable_by(count - 1, likelier);
            order.truncate(count);
            order.sort_unstable_by(likelier);
            for ((id, log_prob), best) in ids.iter_mut().zip(log_probs).zip(order) {
                (*id, *log_prob) = (best, logits[best as usize] - log_sum);
            }
        });
    }
    (ids, log_probs)
}

/// `ln(sum(e^logit))`; NaN if a logit is.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let mut sums = NO_LOGITS;
    add_logits(logits, &mut sums);
    sums.max + sums.exps.ln()
}

vectorised! {
    /// `cap * tanh(logit / cap)` in place.
    pub fn soft_cap(logits: &mut [f32], cap: f32) {
        logits.iter_mut().for_each(|logit| *logit = cap * tanh(*logit / cap));
    }
}

/// `weight . x`, summed in f32 in a fixed order.
///
/// # Panics
/// If the lengths differ.
pub fn dot(weight: &[f32], x: &[f32]) -> f32 {
    assert_eq!(weight.len(), x.len(), "shapes of a scalar head");
    let mut lanes = [0.0f32; LANES];
    for (w, x) in weight.chunks(LANES).zip(x.chunks(LANES)) {
        for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
            *lane += w * x;
        }
    }
    lane_sum(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{Matrix, Rows as Weights};
    use crate::reference;
    use half::bf16;

    fn check<E: Element>(vocabulary: usize, inputs: usize, rows: usize, softcap: Option<f32>) {
        let weights: Vec<E> =
            (0..vocabulary * inputs).map(|i| E::from_f32((i * 7919 % 1013) as f32 / 506.0 - 1.0)).collect();
        let x: Vec<f32> = (0..rows * inputs).map(|i| (i * 31 % 89) as f32 / 44.0 - 1.0).collect();
        let targets: Vec<u32> = (0..rows).map(|r| (r * 37 % vocabulary) as u32).collect();
        let plain: Vec<f32> = weights.iter().map(|w| w.to_f32()).collect();
        let head = Linear::new(&[Matrix { weights: Weights::Plain(&weights), bias: None }], inputs).unwrap();
        let found = token_log_probs(&head, softcap, &x, &targets);
        let mut logits = reference::linear(&x, &plain, None, inputs);
        if let Some(cap) = softcap {
            logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
        }
        for r in 0..rows {
            let row = &logits[r * vocabulary..(r + 1) * vocabulary];
            let expected = reference::log_prob(row, targets[r] as usize);
            assert!((found[r].value - expected).abs() < 1e-4, "{:?} {expected}", found[r]);
            let alone = token_log_probs(&head, softcap, &x[r * inputs..(r + 1) * inputs], &targets[r..=r]);
            assert_eq!(alone[0].value.to_bits(), found[r].value.to_bits());
        }
    }

    #[test]
    fn log_probs_match_the_reference_and_do_not_depend_on_neighbours() {
        check::<f32>(50, 6, 3, None);
        check::<f32>(2300, 34, 130, Some(5.0));
        check::<bf16>(1025, 64, 7, None);
    }

    #[test]
    fn of_the_likeliest_tokens_greedy_decoding_takes_the_first() {
        // Weights of one input are the logits. The largest one stands at every place of each list.
        for (vocabulary, largest) in
            [(1, vec![0]), (50, vec![7]), (50, vec![3, 4]), (2300, vec![63, 64]), (2300, vec![1023, 1024, 2299])]
        {
            let mut logits: Vec<f32> = (0..vocabulary).map(|i| (i * 37 % 101) as f32 / 10.0).collect();
            largest.iter().for_each(|at| logits[*at] = 20.0);
            let head = Linear::new(&[Matrix { weights: Weights::Plain(&logits), bias: None }], 1).unwrap();
            let targets: Vec<u32> = (0..vocabulary as u32).collect();
            let found = token_log_probs(&head, None, &vec![1.0; vocabulary], &targets);
            let greedy: Vec<usize> = (0..vocabulary).filter(|i| found[*i].greedy).collect();
            assert_eq!(greedy, largest[..1], "{largest:?} of {vocabulary}");
        }
    }

    #[test]
    fn the_likeliest_tokens_come_in_order() {
        let (vocabulary, inputs, rows, count) = (1000, 6, ROWS + 3, 7);
        let weights: Vec<f32> = (0..vocabulary * inputs).map(|i| (i * 7919 % 1013) as f32 / 506.0 - 1.0).collect();
        let x: Vec<f32> = (0..rows * inputs).map(|i| (i * 31 % 89) as f32 / 44.0 - 1.0).collect();
        let head = Linear::new(&[Matrix { weights: Weights::Plain(&weights), bias: None }], inputs).unwrap();
        for softcap in [None, Some(0.5)] {
            let (ids, log_probs) = top_log_probs(&head, softcap, &x, count);
            let mut logits = reference::linear(&x, &weights, None, inputs);
            if let Some(cap) = softcap {
                logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
            }
            for (row, logits) in logits.chunks_exact(vocabulary).enumerate() {
                let mut all: Vec<f32> = (0..vocabulary).map(|id| reference::log_prob(logits, id)).collect();
                for (id, found) in ids[row * count..][..count].iter().zip(&log_probs[row * count..][..count]) {
                    assert!((all[*id as usize] - found).abs() < 1e-4);
                }
                all.sort_by(|a, b| b.total_cmp(a));
                all.iter().zip(&log_probs[row * count..][..count]).for_each(|(a, b)| assert!((a - b).abs() < 1e-4));
            }
        }
    }

    #[test]
    fn log_sum_exp_is_that_of_the_reference() {
        for len in [1, 15, 16, 1000] {
            let logits: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 / 7.0 - 3.0).collect();
            assert!((logits[0] - log_sum_exp(&logits) - reference::log_prob(&logits, 0)).abs() < 1e-5, "{len}");
        }
        assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
        assert!(!log_sum_exp(&[f32::NEG_INFINITY; 3]).is_finite());
    }

    #[test]
    fn dot_is_a_dot_product() {
        let w: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&w, &w), (0..37).map(|i| (i * i) as f32).sum::<f32>());
    }
}
