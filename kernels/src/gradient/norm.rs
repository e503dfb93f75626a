//! Gradients of norms.

use crate::gemm::LANES;
use crate::math::lane_sum;
use crate::norm::{Norm, sum};
use crate::parallel::{Shared, for_each_piece};
use crate::simd::vectorised;

/// Rows whose part of the weights' gradient is summed by one thread: a fixed cut.
const ROWS: usize = 64;

impl Norm {
    /// Numbers in the gradient of its weights: those of the weight, then those of the bias where there is one.
    pub fn weights(&self) -> usize {
        match self {
            Norm::Rms { weight, .. } => weight.len(),
            Norm::Layer { weight, bias, .. } => weight.len() + bias.len(),
        }
    }

    /// Given rows `x[rows, width]` and the gradients `dy` of their norms, adds the gradients of the rows to `dx` and
    /// those of the weights to `d_weights`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn backward(&self, x: &[f32], dy: &[f32], dx: &mut [f32], d_weights: &mut [f32]) {
        let (width, weights) = (self.width(), self.weights());
        assert!(x.len() == dy.len() && x.len() == dx.len() && d_weights.len() == weights, "shapes of a norm");
        let rows = x.len() / width;
        let mut partial = vec![0.0; rows.div_ceil(ROWS) * weights];
        let (dx, partial_sums) = (Shared::new(dx), Shared::new(&mut partial));
        for_each_piece(rows, ROWS, |piece| {
            let block = piece.start / ROWS;
            let range = piece.start * width..piece.end * width;
            // SAFETY: pieces are disjoint, and each is one block.
            let (dx, sums) =
                unsafe { (dx.range(range.clone()), partial_sums.range(block * weights..(block + 1) * weights)) };
            let rows = x[range.clone()].chunks_exact(width).zip(dy[range].chunks_exact(width));
            for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                self.backward_row(x, dy, dx, sums);
            }
        });
        for block in partial.chunks_exact(weights) {
            d_weights.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
        }
    }

    /// [`Norm::backward`] for one row: a head of q or k.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn backward_row(&self, x: &[f32], dy: &[f32], dx: &mut [f32], d_weights: &mut [f32]) {
        assert!(x.len() == self.width() && dy.len() == x.len() && dx.len() == x.len(), "shapes of a norm");
        match self {
            Norm::Rms { weight, eps } => rms(x, dy, weight, *eps, dx, d_weights),
            Norm::Layer { weight, eps, .. } => {
                let (d_weight, d_bias) = d_weights.split_at_mut(weight.len());
                layer(x, dy, weight, *eps, dx, d_weight);
                d_bias.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
        }
    }
}

/// Sum of `f(i)` over `0..len` in the order of [`sum`].
#[inline(always)]
fn sum_of(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
    }
    for i in whole..len {
        lanes[i - whole] += f(i);
    }
    lane_sum(lanes)
}

vectorised! {
    fn rms(x: &[f32], dy: &[f32], weight: &[f32], eps: f32, dx: &mut [f32], d_weight: &mut [f32]) {
        let len = x.len();
        let (dy, weight, dx, d_weight) = (&dy[..len], &weight[..len], &mut dx[..len], &mut d_weight[..len]);
        let scale = 1.0 / (sum(x, |x| x * x) / len as f32 + eps).sqrt();
        let along = sum_of(len, |i| dy[i] * weight[i] * x[i]) * scale * scale * scale / len as f32;
        for i in 0..len {
            dx[i] += dy[i] * weight[i] * scale - x[i] * along;
            d_weight[i] += dy[i] * x[i] * scale;
        }
    }
}

vectorised! {
    fn layer(x: &[f32], dy: &[f32], weight: &[f32], eps: f32, dx: &mut [f32], d_weight: &mut [f32]) {
        let len = x.len();
        let (dy, weight, dx, d_weight) = (&dy[..len], &weight[..len], &mut dx[..len], &mut d_weight[..len]);
        let n = len as f32;
        let mean = sum(x, |x| x) / n;
        let scale = 1.0 / (sum(x, |x| (x - mean) * (x - mean)) / n + eps).sqrt();
        let level = sum_of(len, |i| dy[i] * weight[i]) / n;
        let along = sum_of(len, |i| dy[i] * weight[i] * (x[i] - mean)) * scale * scale / n;
        for i in 0..len {
            dx[i] += scale * (dy[i] * weight[i] - level - (x[i] - mean) * along);
            d_weight[i] += dy[i] * (x[i] - mean) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use proptest::prelude::*;

    fn check(norm: &Norm, width: usize, rows: usize, f: impl Fn(&[f32], &[f32]) -> Vec<f64>) {
        let x: Vec<f32> = (0..rows * width).map(|i| (i * 31 % 97) as f32 / 20.0 - 2.0).collect();
        let dy: Vec<f32> = (0..rows * width).map(|i| (i * 17 % 23) as f32 / 10.0 - 1.0).collect();
        let (mut dx, mut d_weights) = (vec![1.0; x.len()], vec![1.0; norm.weights()]);
        norm.backward(&x, &dy, &mut dx, &mut d_weights);
        let weights: Vec<f32> = match norm {
            Norm::Rms { weight, .. } => weight.clone(),
            Norm::Layer { weight, bias, .. } => [&weight[..], bias].concat(),
        };
        let loss = |x: &[f32], w: &[f32]| f(x, w).iter().zip(&dy).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>();
        let slope = |values: &[f32], i: usize, loss: &dyn Fn(&[f32]) -> f64| {
            let (mut above, mut below) = (values.to_vec(), values.to_vec());
            above[i] += 1e-3;
            below[i] -= 1e-3;
            (loss(&above) - loss(&below)) / f64::from(above[i] - below[i])
        };
        for (i, found) in dx.iter().enumerate() {
            let expected = 1.0 + slope(&x, i, &|x| loss(x, &weights));
            assert!((f64::from(*found) - expected).abs() < 2e-3 * expected.abs().max(1.0), "{found} {expected}");
        }
        for (i, found) in d_weights.iter().enumerate() {
            let expected = 1.0 + slope(&weights, i, &|w| loss(&x, w));
            assert!((f64::from(*found) - expected).abs() < 2e-3 * expected.abs().max(1.0), "{found} {expected}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn slopes_are_those_of_the_reference(width in 2usize..40, rows in 1usize..5) {
            let weight: Vec<f32> = (0..width).map(|i| 0.5 + (i % 7) as f32 / 5.0).collect();
            let bias: Vec<f32> = (0..width).map(|i| (i % 5) as f32 / 5.0).collect();
            let rms = Norm::Rms { weight: weight.clone(), eps: 1e-2 };
            check(&rms, width, rows, |x, w| reference::rms_norm_f64(x, w, 1e-2));
            let layer = Norm::Layer { weight, bias, eps: 1e-2 };
            check(&layer, width, rows, |x, w| reference::layer_norm_f64(x, &w[..width], &w[width..], 1e-2));
        }
    }

    #[test]
    fn many_rows_are_summed_in_blocks() {
        let norm = Norm::Rms { weight: vec![1.0; 3], eps: 0.1 };
        let x: Vec<f32> = (0..3 * 200).map(|i| (i * 31 % 97) as f32 / 20.0 - 2.0).collect();
        let (mut all, mut d_all) = (vec![0.0; x.len()], vec![0.0; 3]);
        norm.backward(&x, &x, &mut all, &mut d_all);
        let (mut each, mut d_each) = (vec![0.0; x.len()], vec![0.0; 3]);
        for (x, dx) in x.chunks(3).zip(each.chunks_mut(3)) {
            norm.backward_row(x, x, dx, &mut d_each);
        }
        assert_eq!(all, each);
        assert!(d_all.iter().zip(&d_each).all(|(a, b)| (a - b).abs() < 1e-3), "{d_all:?} {d_each:?}");
    }
}
