//! Scalar functions that compile to vector code: no branches, no calls, the same bits in a loop of 1 as of 1,000.

use crate::gemm::LANES;

/// `e^x` within 2 ulp; 0 below -86.9, infinity above 88.7, NaN for NaN; exactly 1 at 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that the reduction is exact for the exponents that occur.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-86.9, 88.8);
    let rounded = clamped.mul_add(LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^128 is not a float, 2^127 is.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let y = y * f32::from_bits(n.wrapping_add(126) << 23) * 2.0;
    let y = if x < -86.9 { 0.0 } else { y };
    if x > 88.722_84 { f32::INFINITY } else { y }
}

/// `2^x` within 2 ulp for `x` up to 127; 0 below -126, NaN for NaN; exactly 1 at 0.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    // As in `exp`.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x + ROUND;
    let r = x - (rounded - ROUND);
    let mut p = 1.535_336_2e-4f32;
    p = p.mul_add(r, 1.339_887_4e-3);
    p = p.mul_add(r, 9.618_437e-3);
    p = p.mul_add(r, 5.550_332_5e-2);
    p = p.mul_add(r, 2.402_264_8e-1);
    p = p.mul_add(r, 6.931_472e-1);
    p = p.mul_add(r, 1.0);
    // The integer goes on top of the exponent; what is above its nine bits falls off.
    let y = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x < -126.0 { 0.0 } else { y }
}

/// Sum of the lanes, in halves.
#[inline(always)]
pub fn lane_sum(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Largest of the lanes, none of which is a NaN.
#[inline(always)]
pub fn lane_max(lanes: [f32; LANES]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let eight: [f32; 8] = std::array::from_fn(|i| larger(lanes[i], lanes[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| larger(eight[i], eight[i + 4]));
    larger(larger(four[0], four[2]), larger(four[1], four[3]))
}

/// `tanh(x)` within 4e-7 absolute.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Near 0 the quotient below loses digits; the odd series does not.
    let x2 = x * x;
    let small = x * (1.0 + x2 * (-0.333_333_34 + x2 * (0.133_333_33 + x2 * (-0.053_968_254 + x2 * 0.021_869_488))));
    let e = exp(-2.0 * x.abs());
    let large = ((1.0 - e) / (1.0 + e)).copysign(x);
    if x2 < 0.04 { small } else { large }
}

/// `x / (1 + e^-x)` within 3e-6 relative.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    // Beyond 2^126 the quotient is 0 to all digits that matter.
    x / (1.0 + exp2((x * -std::f32::consts::LOG2_E).min(126.0)))
}

/// The error function within 1.5e-7 absolute (Abramowitz and Stegun 7.1.26).
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let poly = t * (0.254_829_6 + t * (-0.284_496_72 + t * (1.421_413_8 + t * (-1.453_152_1 + t * 1.061_405_4))));
    (1.0 - poly * exp(-a * a)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -869_000..887_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 2.5e-7, "{x}: {} {expected}", exp(x));
        }
    }

    #[test]
    fn exp_at_its_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(-100.0), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_is_within_two_ulp() {
        for i in -1_260_000..1_270_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) - expected).abs() / expected < 2.5e-7, "{x}: {} {expected}", exp2(x));
        }
        assert_eq!((exp2(0.0), exp2(f32::NEG_INFINITY), exp2(-127.0), exp2(-3e9)), (1.0, 0.0, 0.0, 0.0));
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn lanes_are_summed_and_compared() {
        assert_eq!(lane_sum(std::array::from_fn(|i| i as f32)), 120.0);
        assert_eq!(lane_max(std::array::from_fn(|i| (i * 7 % 16) as f32 - 20.0)), -5.0);
    }

    #[test]
    fn tanh_and_erf_match_tables() {
        for i in -4_000..4_000 {
            let x = i as f32 * 2e-3;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 4e-7, "tanh {x}");
        }
        for (x, expected) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (-2.0, -0.995_322_3), (4.0, 1.0)] {
            assert!((erf(x) - expected).abs() < 3e-7, "erf {x} {}", erf(x));
        }
    }
}
