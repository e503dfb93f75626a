//! Element-wise non-linearities of the feed-forward layer.

use crate::Element;
use crate::math::{self, erf, tanh};
use crate::simd::{narrow, vectorised};

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

impl Activation {
    /// Name of its kernels for GPUs.
    #[cfg(feature = "gpu")]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
        }
    }

    /// `out = act(x)`.
    pub(crate) fn plain<E: Element>(self, x: &[f32], out: &mut [E]) {
        match self {
            Self::Silu => silu(x, out),
            Self::Gelu => gelu(x, out),
            Self::GeluTanh => gelu_tanh(x, out),
        }
    }

    /// `out = act(gate) * up`.
    pub(crate) fn gated<E: Element>(self, gate: &[f32], up: &[f32], out: &mut [E]) {
        match self {
            Self::Silu => gated_silu(gate, up, out),
            Self::Gelu => gated_gelu(gate, up, out),
            Self::GeluTanh => gated_gelu_tanh(gate, up, out),
        }
    }
}

/// The two forms of a non-linearity.
macro_rules! activation {
    ($plain:ident, $gated:ident, $x:ident => $act:expr) => {
        vectorised! {
            fn $plain<E: Element>(x: &[f32], out: &mut [E]) {
                narrow::<S, E, 1>(out, [x], |[$x]| $act);
            }
        }

        vectorised! {
            fn $gated<E: Element>(gate: &[f32], up: &[f32], out: &mut [E]) {
                narrow::<S, E, 2>(out, [gate, up], |[$x, up]| $act * up);
            }
        }
    };
}

/// sqrt(2 / pi)
pub(crate) const TANH_SCALE: f32 = 0.797_884_6;

activation!(silu, gated_silu, x => math::silu(x));
activation!(gelu, gated_gelu, x => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)));
activation!(gelu_tanh, gated_gelu_tanh, x => 0.5 * x * (1.0 + tanh(TANH_SCALE * (x + 0.044_715 * x * x * x))));

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
            activation.plain(&x, &mut out);
            let mut with_gate = [0.0f32; 5];
            activation.gated(&x, &[2.0; 5], &mut with_gate);
            for i in 0..5 {
                assert!((out[i] - expected[i]).abs() < 1e-6, "{activation:?} {} {}", out[i], expected[i]);
                assert_eq!(with_gate[i], 2.0 * out[i]);
            }
        }
    }
}
