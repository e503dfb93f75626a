//! Matrices of eight-bit floating point numbers, e4m3: a sign, four bits of exponent and three of mantissa, with NaN and
//! without infinities (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433, table 1).

use crate::Element;

/// The largest of them.
pub const MAX: f32 = 448.0;

const NAN: u8 = 0x7f;
/// The smallest that is normal, and the distance of those below it.
const MIN_NORMAL: f32 = 1.0 / 64.0;
const STEP: f32 = MIN_NORMAL / 8.0;

/// The nearest, of two the one with an even mantissa; [`MAX`] for what is larger, NaN for NaN.
pub fn from_f32(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    let size = x.abs();
    let code = if size.is_nan() {
        NAN
    } else if size < MIN_NORMAL {
        (size / STEP).round_ties_even() as u8
    } else {
        // Three of 23 bits of mantissa stay; the exponent is counted from 7 instead of 127.
        let bits = size.min(MAX).to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - ((127 - 7) << 3)) as u8
    };
    sign | code
}

/// The number.
pub fn to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match exponent {
        15 if code & 7 == 7 => f32::NAN,
        0 => mantissa * STEP,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// The scale of a row: what it is divided by so that its largest absolute value, NaN aside, becomes [`MAX`].
pub fn scale(row: impl IntoIterator<Item = f32>) -> f32 {
    let largest = row.into_iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
    (largest / MAX).max(f32::MIN_POSITIVE)
}

/// Rows of e4m3, each with a scale: input `i` of a row weighs `codes[i] * scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Rows {
    /// Inputs of a row.
    pub inputs: usize,
    /// `[rows, inputs]`.
    pub codes: Vec<u8>,
    /// `[rows]`.
    pub scales: Vec<f32>,
}

impl Fp8Rows {
    /// The nearest to rows of so many inputs.
    ///
    /// # Panics
    /// If rows are not whole.
    pub fn quantise<E: Element>(values: &[E], inputs: usize) -> Self {
        assert!(values.len().is_multiple_of(inputs), "rows of e4m3");
        let scales: Vec<f32> = values.chunks_exact(inputs).map(|row| scale(row.iter().map(|x| x.to_f32()))).collect();
        let mut codes = Vec::with_capacity(values.len());
        for (row, scale) in values.chunks_exact(inputs).zip(&scales) {
            codes.extend(row.iter().map(|x| from_f32(x.to_f32() / scale)));
        }
        Self { inputs, codes, scales }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    /// All weights, `[rows, inputs]`.
    pub fn expand<E: Element>(&self) -> Vec<E> {
        let numbers: Vec<f32> = (0..=u8::MAX).map(to_f32).collect();
        let mut expanded = Vec::with_capacity(self.codes.len());
        for (row, scale) in self.codes.chunks_exact(self.inputs).zip(&self.scales) {
            expanded.extend(row.iter().map(|code| E::from_f32(numbers[usize::from(*code)] * scale)));
        }
        expanded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All numbers, as the paper's table lays them out.
    fn all() -> Vec<f32> {
        let mut numbers: Vec<f32> = (0..8).map(|i| i as f32 / 512.0).collect();
        numbers.extend((1..16).flat_map(|exponent| (0..8).map(move |i| (8 + i) as f32 * 2f32.powi(exponent - 10))));
        numbers
    }

    #[test]
    fn every_code_is_its_number_and_back() {
        for (code, number) in all().into_iter().enumerate() {
            let code = code as u8;
            if code == NAN {
                assert!(to_f32(code).is_nan() && to_f32(code | 0x80).is_nan());
                continue;
            }
            for (code, number) in [(code, number), (code | 0x80, -number)] {
                assert_eq!(to_f32(code).to_bits(), number.to_bits(), "{code:#x}");
                assert_eq!(from_f32(number), code, "{number}");
            }
        }
        assert_eq!((all()[0x7e], from_f32(f32::NAN) & NAN), (MAX, NAN));
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest_and_the_middle_to_the_even() {
        let numbers = &all()[..=0x7e];
        for (code, pair) in numbers.windows(2).enumerate() {
            let [low, high] = [pair[0], pair[1]];
            let (code, middle) = (code as u8, (low + high) / 2.0);
            assert_eq!(from_f32(middle), code + code % 2, "{middle}");
            assert_eq!(from_f32(-middle), (code + code % 2) | 0x80, "{middle}");
            assert_eq!((from_f32(middle.next_down()), from_f32(middle.next_up())), (code, code + 1), "{middle}");
        }
        for large in [449.0, 464.0, 480.0, 1e9, f32::INFINITY] {
            assert_eq!((from_f32(large), from_f32(-large)), (0x7e, 0xfe), "{large}");
        }
    }

    #[test]
    fn rows_keep_their_largest_and_are_near() {
        let values: Vec<f32> =
            (0..5 * 64).map(|i| ((i * 7919) % 2003) as f32 / 300.0 - 3.0 + (i / 64) as f32).collect();
        let rows = Fp8Rows::quantise(&values, 64);
        for (row, values) in rows.expand::<f32>().chunks_exact(64).zip(values.chunks_exact(64)) {
            let largest = values.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            for (found, value) in row.iter().zip(values) {
                // Half of the last of four bits, or half of a step.
                assert!((found - value).abs() <= (value.abs() / 16.0).max(largest / MAX * STEP), "{found} {value}");
            }
            assert!(row.iter().any(|x| (x.abs() - largest).abs() <= 1e-6 * largest));
        }
        assert_eq!(Fp8Rows::quantise(&[0f32; 8], 4).expand::<f32>(), [0.0; 8]);
    }
}
