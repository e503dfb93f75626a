//! Normalisation of rows.

use crate::Element;
use crate::gemm::LANES;
use crate::math::lane_sum;
use crate::memory::{carve, carved, with_scratch};
use crate::parallel::{Shared, for_each_piece};
use crate::simd::{narrow, vectorised};

/// Rows that a thread takes at a time.
const ROWS: usize = 64;

/// A normalisation with its weights.
#[derive(Clone, Debug)]
pub enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms {
        /// `[width]`.
        weight: Vec<f32>,
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`.
    Layer {
        /// `[width]`.
        weight: Vec<f32>,
        /// `[width]`.
        bias: Vec<f32>,
        /// Added to the variance.
        eps: f32,
    },
}

impl Norm {
    /// Width of a row.
    pub fn width(&self) -> usize {
        match self {
            Norm::Rms { weight, .. } | Norm::Layer { weight, .. } => weight.len(),
        }
    }

    /// Normalises rows `x[rows, width]` into `out[rows, width]`.
    ///
    /// # Panics
    /// If the lengths differ or are not whole rows.
    pub fn forward<E: Element>(&self, x: &[f32], out: &mut [E]) {
        let width = self.width();
        assert!(x.len() == out.len() && x.len().is_multiple_of(width), "shapes of a norm");
        let shared = Shared::new(out);
        for_each_piece(x.len() / width, ROWS, |rows| {
            // SAFETY: pieces are disjoint.
            let out = unsafe { shared.range(rows.start * width..rows.end * width) };
            for (x, out) in x[rows.start * width..].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                self.row(x, out);
            }
        });
    }

    /// Normalises rows and adds them to `sum`: the sandwich norm of a residual branch.
    ///
    /// # Panics
    /// If the lengths differ or are not whole rows.
    pub fn add_to(&self, x: &[f32], sum: &mut [f32]) {
        let width = self.width();
        assert!(x.len() == sum.len() && x.len().is_multiple_of(width), "shapes of a norm");
        let shared = Shared::new(sum);
        for_each_piece(x.len() / width, ROWS, |rows| {
            // SAFETY: pieces are disjoint.
            let sum = unsafe { shared.range(rows.start * width..rows.end * width) };
            with_scratch(carved::<f32>(width), |scratch| {
                let (normed, _) = carve::<f32>(scratch, width);
                for (x, sum) in x[rows.start * width..].chunks_exact(width).zip(sum.chunks_exact_mut(width)) {
                    self.row(x, normed);
                    sum.iter_mut().zip(&*normed).for_each(|(sum, y)| *sum += y);
                }
            });
        });
    }

    /// Normalises one row: a head of q or k.
    ///
    /// # Panics
    /// If the lengths are not the norm's width.
    pub fn row<E: Element>(&self, x: &[f32], out: &mut [E]) {
        assert!(x.len() == self.width() && out.len() == x.len(), "shapes of a norm");
        match self {
            Norm::Rms { weight, eps } => rms(x, weight, *eps, out),
            Norm::Layer { weight, bias, eps } => layer(x, weight, bias, *eps, out),
        }
    }
}

vectorised! {
    fn rms<E: Element>(x: &[f32], weight: &[f32], eps: f32, out: &mut [E]) {
        let scale = 1.0 / (sum(x, |x| x * x) / x.len() as f32 + eps).sqrt();
        narrow::<S, E, 2>(out, [x, weight], |[x, w]| x * scale * w);
    }
}

vectorised! {
    fn layer<E: Element>(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [E]) {
        let n = x.len() as f32;
        let mean = sum(x, |x| x) / n;
        let variance = sum(x, |x| (x - mean) * (x - mean)) / n;
        let scale = 1.0 / (variance + eps).sqrt();
        narrow::<S, E, 3>(out, [x, weight, bias], |[x, w, b]| (x - mean) * scale * w + b);
    }
}

/// Sum of `f(x)` in a fixed order that vector code can follow.
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    lane_sum(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn matches_the_reference(width in 1usize..200, rows in 1usize..5, seed in 0usize..100) {
            let x: Vec<f32> = (0..rows * width).map(|i| ((i * 31 + seed) % 97) as f32 / 9.0 - 4.0).collect();
            let weight: Vec<f32> = (0..width).map(|i| 0.5 + (i % 7) as f32 / 5.0).collect();
            let bias: Vec<f32> = (0..width).map(|i| (i % 5) as f32 / 5.0).collect();
            let cases = [
                (Norm::Rms { weight: weight.clone(), eps: 1e-5 }, reference::rms_norm(&x, &weight, 1e-5)),
                (
                    Norm::Layer { weight: weight.clone(), bias: bias.clone(), eps: 1e-5 },
                    reference::layer_norm(&x, &weight, &bias, 1e-5),
                ),
            ];
            for (norm, expected) in cases {
                let mut out = vec![0.0f32; x.len()];
                norm.forward(&x, &mut out);
                let mut added = vec![0.0; x.len()];
                norm.add_to(&x, &mut added);
                for i in 0..x.len() {
                    prop_assert!((out[i] - expected[i]).abs() < 2e-4, "{} {}", out[i], expected[i]);
                    prop_assert_eq!(out[i], added[i]);
                }
            }
        }
    }
}
