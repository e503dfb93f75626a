//! What is done with a gradient.

use crate::gemm::LANES;
use crate::math::lane_sum;
use crate::parallel::{Shared, for_each_piece};
use crate::simd::vectorised;

/// Numbers that a thread takes at a time; the sums of these pieces are added in their order.
const PIECE: usize = 1 << 16;

/// A step of Adam with decoupled weight decay (Loshchilov and Hutter 2019), as PyTorch takes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the running mean of gradients.
    pub beta1: f32,
    /// Decay of the running mean of their squares.
    pub beta2: f32,
    /// Added to the root of the latter.
    pub eps: f32,
    /// Share of `lr * weight` that is taken away.
    pub weight_decay: f32,
    /// Number of the step, from 1 on.
    pub step: u32,
    /// Multiplies the gradient, for clipping.
    pub scale: f32,
}

impl AdamW {
    /// Changes weights by their gradient and its running means, all of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn update(&self, weights: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32]) {
        let len = weights.len();
        assert!(gradient.len() == len && mean.len() == len && square.len() == len, "shapes of a step");
        let corrections = self.corrections();
        let (weights, mean, square) = (Shared::new(weights), Shared::new(mean), Shared::new(square));
        for_each_piece(len, PIECE, |piece| {
            // SAFETY: pieces are disjoint.
            let (weights, mean, square) =
                unsafe { (weights.range(piece.clone()), mean.range(piece.clone()), square.range(piece.clone())) };
            adamw(*self, corrections, weights, &gradient[piece], mean, square);
        });
    }

    /// What the running means are divided by, for they begin at zero: that of gradients, and the root of that of squares.
    pub(crate) fn corrections(&self) -> [f32; 2] {
        let correction = |beta: f32| (1.0 - f64::from(beta).powi(self.step as i32)) as f32;
        [correction(self.beta1), correction(self.beta2).sqrt()]
    }
}

vectorised! {
    fn adamw(
        how: AdamW,
        corrections: [f32; 2],
        weights: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
    ) {
        let [first, second] = corrections;
        let (rate, keep) = (how.lr / first, 1.0 - how.lr * how.weight_decay);
        for (((w, g), m), s) in weights.iter_mut().zip(gradient).zip(mean).zip(square) {
            let g = g * how.scale;
            *m += (g - *m) * (1.0 - how.beta1);
            *s = *s * how.beta2 + g * g * (1.0 - how.beta2);
            *w = *w * keep - rate * *m / (s.sqrt() / second + how.eps);
        }
    }
}

/// Sum of squares, in f64 over pieces of a fixed length.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = vec![0.0; values.len().div_ceil(PIECE)];
    let shared = Shared::new(&mut sums);
    for_each_piece(values.len(), PIECE, |piece| {
        let i = piece.start / PIECE;
        // SAFETY: pieces are disjoint.
        let sum = unsafe { &mut shared.range(i..i + 1)[0] };
        // Short enough for f32 to keep what counts.
        *sum = values[piece].chunks(1024).map(|part| f64::from(squares(part))).sum::<f64>();
    });
    sums.iter().sum()
}

vectorised! {
    fn squares(values: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        for chunk in values.chunks(LANES) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += x * x;
            }
        }
        lane_sum(lanes)
    }
}

/// `sum += values`.
///
/// # Panics
/// If the lengths differ.
pub fn add(values: &[f32], sum: &mut [f32]) {
    assert_eq!(values.len(), sum.len(), "lengths of a sum");
    let shared = Shared::new(sum);
    for_each_piece(values.len(), PIECE, |piece| {
        // SAFETY: pieces are disjoint.
        let sum = unsafe { shared.range(piece.clone()) };
        sum.iter_mut().zip(&values[piece]).for_each(|(sum, x)| *sum += x);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_those_of_pytorch() {
        // torch.optim.AdamW in f64: lr 0.1, betas (0.9, 0.99), eps 1e-8, weight decay 0.1, gradients w^2 - 0.5.
        let (mut weights, mut mean, mut square) = ([1.0f32, -0.5, 0.25], [0.0; 3], [0.0; 3]);
        for step in 1..=3 {
            let gradient = weights.map(|w| w * w - 0.5);
            let how = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step, scale: 1.0 };
            how.update(&mut weights, &gradient, &mut mean, &mut square);
        }
        for (found, expected) in weights.iter().zip(PYTORCH) {
            assert!((found - expected).abs() < 1e-6, "{weights:?}");
        }
        let how = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, step: 1, scale: 0.5 };
        let (mut halved, mut mean, mut square) = ([1.0f32], [0.0], [0.0]);
        how.update(&mut halved, &[4.0], &mut mean, &mut square);
        assert!((mean[0] - 0.2).abs() < 1e-6 && (square[0] - 0.04).abs() < 1e-6, "the scaled gradient counts");
    }

    const PYTORCH: [f32; 3] = [0.692_521_4, -0.189_050_9, 0.536_799_4];

    #[test]
    fn sums_over_many_pieces() {
        let values: Vec<f32> = (0..200_001).map(|i| (i % 1009) as f32 / 1009.0 - 0.3).collect();
        let expected: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((sum_of_squares(&values) - expected).abs() < 1e-6 * expected);
        let mut sum = values.clone();
        add(&values, &mut sum);
        assert!(sum.iter().zip(&values).all(|(sum, x)| *sum == 2.0 * x));
    }
}
