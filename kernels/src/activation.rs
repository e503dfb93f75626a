//! Element-wise non-linearities of the feed-forward layer.

use crate::Element;
use crate::math::{erf, sigmoid, tanh};
use crate::parallel::{Shared, for_each_piece};

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// An element-wise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// `out[rows, width] = act(x[rows, ..width]) * x[rows, width..]`: x holds gate and up side by side, `[rows, 2 * width]`.
///
/// # Panics
/// If the lengths do not fit.
pub fn gated<E: Element>(activation: Activation, x: &[f32], width: usize, out: &mut [E]) {
    assert_eq!(x.len(), 2 * out.len(), "shapes of a gated activation");
    rows(activation, x, 2 * width, width, out);
}

/// `out = act(x)`, `[rows, width]`.
///
/// # Panics
/// If the lengths do not fit.
pub fn plain<E: Element>(activation: Activation, x: &[f32], width: usize, out: &mut [E]) {
    assert_eq!(x.len(), out.len(), "shapes of an activation");
    rows(activation, x, width, width, out);
}

fn rows<E: Element>(activation: Activation, x: &[f32], stride: usize, width: usize, out: &mut [E]) {
    let shared = Shared::new(out);
    for_each_piece(x.len() / stride, ROWS, |rows| {
        // SAFETY: pieces are disjoint.
        let out = unsafe { shared.range(rows.start * width..rows.end * width) };
        for (x, out) in x[rows.start * stride..].chunks_exact(stride).zip(out.chunks_exact_mut(width)) {
            match activation {
                Activation::Silu => dispatch(x, out, |x| x * sigmoid(x)),
                Activation::Gelu => dispatch(x, out, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
                Activation::GeluTanh => {
                    // sqrt(2 / pi)
                    const C: f32 = 0.797_884_6;
                    dispatch(x, out, |x| 0.5 * x * (1.0 + tanh(C * (x + 0.044_715 * x * x * x))));
                }
            }
        }
    });
}

/// One row, in the widest vectors that the machine has.
#[inline]
fn dispatch<E: Element>(x: &[f32], out: &mut [E], act: impl Fn(f32) -> f32) {
    #[cfg(target_arch = "x86_64")]
    match crate::isa() {
        // SAFETY: the features were detected.
        crate::Isa::Avx512Bf16 | crate::Isa::Avx512 => return unsafe { row_avx512(x, out, act) },
        // SAFETY: the features were detected.
        crate::Isa::Avx2 => return unsafe { row_avx2(x, out, act) },
        crate::Isa::Portable => {}
    }
    row(x, out, act);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn row_avx512<E: Element>(x: &[f32], out: &mut [E], act: impl Fn(f32) -> f32) {
    row(x, out, act);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn row_avx2<E: Element>(x: &[f32], out: &mut [E], act: impl Fn(f32) -> f32) {
    row(x, out, act);
}

#[inline(always)]
fn row<E: Element>(x: &[f32], out: &mut [E], act: impl Fn(f32) -> f32) {
    if x.len() == out.len() {
        for (x, out) in x.iter().zip(out) {
            *out = E::from_f32(act(*x));
        }
    } else {
        let (gate, up) = x.split_at(out.len());
        for ((gate, up), out) in gate.iter().zip(up).zip(out) {
            *out = E::from_f32(act(*gate) * up);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_at_known_points() {
        // From PyTorch in f64: torch.nn.functional.{silu, gelu} at -3, -0.5, 0, 0.1, 2.
        let x = [-3.0f32, -0.5, 0.0, 0.1, 2.0];
        let cases = [
            (Activation::Silu, [-0.142_277_62, -0.188_770_33, 0.0, 0.052_497_92, 1.761_594_2]),
            (Activation::Gelu, [-0.004_049_694, -0.154_268_77, 0.0, 0.053_982_784, 1.954_499_7]),
            (Activation::GeluTanh, [-0.003_637_392, -0.154_286, 0.0, 0.053_982_75, 1.954_597_7]),
        ];
        for (activation, expected) in cases {
            let mut out = [0.0f32; 5];
            plain(activation, &x, 5, &mut out);
            let doubled: Vec<f32> = x.iter().copied().chain([2.0; 5]).collect();
            let mut with_gate = [0.0f32; 5];
            gated(activation, &doubled, 5, &mut with_gate);
            for i in 0..5 {
                assert!((out[i] - expected[i]).abs() < 1e-6, "{activation:?} {} {}", out[i], expected[i]);
                assert_eq!(with_gate[i], 2.0 * out[i]);
            }
        }
    }
}
