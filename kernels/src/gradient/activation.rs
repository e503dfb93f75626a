//! Gradients of the feed-forward layer's non-linearities.

use crate::Element;
use crate::activation::{Activation, TANH_SCALE};
use crate::math::{erf, exp, tanh};
use crate::parallel::{Shared, for_each_piece};
use crate::simd::vectorised;

/// Values that a thread takes at a time.
const PIECE: usize = 1 << 14;

/// Value and slope.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    // 1 / sqrt(2 pi)
    const DENSITY: f32 = 0.398_942_3;
    let below = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    (x * below, below + x * DENSITY * exp(-0.5 * x * x))
}

#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    let t = tanh(TANH_SCALE * (x + 0.044_715 * x * x * x));
    let inner = TANH_SCALE * (1.0 + 3.0 * 0.044_715 * x * x);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
}

macro_rules! slopes {
    ($plain:ident, $gated:ident, $act:ident) => {
        vectorised! {
            fn $plain<E: Element>(up: &mut [E], d: &[f32], inner: &mut [E]) {
                for ((up, d), inner) in up.iter_mut().zip(d).zip(inner) {
                    let (value, slope) = $act(up.to_f32());
                    *inner = E::from_f32(value);
                    *up = E::from_f32(d * slope);
                }
            }
        }

        vectorised! {
            fn $gated<E: Element>(gate: &mut [E], up: &mut [E], d: &[f32], inner: &mut [E]) {
                for (((gate, up), d), inner) in gate.iter_mut().zip(up).zip(d).zip(inner) {
                    let ((value, slope), u) = ($act(gate.to_f32()), up.to_f32());
                    *inner = E::from_f32(value * u);
                    *gate = E::from_f32(d * u * slope);
                    *up = E::from_f32(d * value);
                }
            }
        }
    };
}

slopes!(plain_silu, gated_silu, silu);
slopes!(plain_gelu, gated_gelu, gelu);
slopes!(plain_gelu_tanh, gated_gelu_tanh, gelu_tanh);

impl Activation {
    /// Takes `act(gate) * up`, or `act(up)` without a gate, apart: `inner` becomes that value, `gate` and `up` the
    /// gradients of what they held, given the gradient `d` of the value. All have the same length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn backward<E: Element>(self, gate: Option<&mut [E]>, up: &mut [E], d: &[f32], inner: &mut [E]) {
        let len = d.len();
        assert!(up.len() == len && inner.len() == len, "shapes of an activation");
        assert!(gate.as_ref().is_none_or(|gate| gate.len() == len), "shape of a gate");
        let (gate, up, inner) = (gate.map(Shared::new), Shared::new(up), Shared::new(inner));
        for_each_piece(len, PIECE, |piece| {
            // SAFETY: pieces are disjoint.
            let (up, inner) = unsafe { (up.range(piece.clone()), inner.range(piece.clone())) };
            // SAFETY: as above.
            let gate = gate.as_ref().map(|gate| unsafe { gate.range(piece.clone()) });
            let d = &d[piece];
            match (self, gate) {
                (Self::Silu, None) => plain_silu(up, d, inner),
                (Self::Gelu, None) => plain_gelu(up, d, inner),
                (Self::GeluTanh, None) => plain_gelu_tanh(up, d, inner),
                (Self::Silu, Some(gate)) => gated_silu(gate, up, d, inner),
                (Self::Gelu, Some(gate)) => gated_gelu(gate, up, d, inner),
                (Self::GeluTanh, Some(gate)) => gated_gelu_tanh(gate, up, d, inner),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_values() {
        let x: Vec<f32> = (-40..40).map(|i| i as f32 / 8.0).collect();
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let value = |x: &[f32]| {
                let mut out = vec![0.0f32; x.len()];
                activation.plain(x, &mut out);
                out
            };
            let step = 1e-2;
            let above = value(&x.iter().map(|x| x + step).collect::<Vec<_>>());
            let below = value(&x.iter().map(|x| x - step).collect::<Vec<_>>());
            let d: Vec<f32> = (0..x.len()).map(|i| 1.0 + i as f32 / 100.0).collect();
            let (mut up, mut inner) = (x.clone(), vec![0.0; x.len()]);
            activation.backward(None, &mut up, &d, &mut inner);
            let (mut gate, mut factor, mut gated) = (x.clone(), vec![2.0; x.len()], vec![0.0; x.len()]);
            activation.backward(Some(&mut gate), &mut factor, &d, &mut gated);
            for (i, value) in value(&x).into_iter().enumerate() {
                let slope = (above[i] - below[i]) / (2.0 * step);
                assert!((inner[i] - value).abs() < 2e-6 && (gated[i] - 2.0 * value).abs() < 4e-6, "{activation:?}");
                assert!((up[i] - d[i] * slope).abs() < 2e-4, "{activation:?} at {}: {} {slope}", x[i], up[i]);
                assert!((gate[i] - 2.0 * up[i]).abs() < 1e-5 && (factor[i] - d[i] * value).abs() < 1e-5);
            }
        }
    }
}
