//! ggml's quantised blocks, taken apart into integers, scales and offsets.
//!
//! A row of weights is cut into blocks of 32, or of 256 for the K types, whose groups of 16 or 32 weights have small
//! integers of their own to multiply the block's scale and minimum with. The layouts are those of llama.cpp's
//! `ggml-common.h`.

use candle_core::quantized::GgmlDType;
use half::f16;
use plumb_kernels::quantised::{Described, QuantRows, Scales};

/// Weights of the largest block.
const LARGEST: usize = 256;

/// How a type lays out its blocks; positions are in bytes.
pub(super) struct Format {
    /// Bytes of a block.
    bytes: usize,
    low: Field,
    /// Bits above those of `low`.
    high: Option<Field>,
    /// The integer that stands for 0.
    zero: i8,
    /// Where the block's f16 scale is.
    scale: usize,
    /// Where its f16 minimum is.
    min: Option<usize>,
    groups: Groups,
}

/// Integers of few bits. The first `stride` of them are the lowest bits of as many bytes, the next the bits above, until
/// the bytes are used up; then come the next `stride` bytes.
#[derive(Clone, Copy)]
struct Field {
    at: usize,
    bits: usize,
    stride: usize,
}

/// The integers of a block's groups.
#[derive(Clone, Copy)]
enum Groups {
    /// None: the block is one group, and its minimum is added rather than subtracted.
    Whole,
    /// Four bits for the scale, four for the minimum.
    Nibbles(usize),
    /// Six bits for the scale, counted from -32: the low four of all, then the high two of all.
    Sixes(usize),
    /// Six bits for the scale and six for the minimum. Those of groups 4 to 7 have their high bits above those of 0 to 3.
    Pairs(usize),
    /// A signed byte for the scale.
    Bytes(usize),
}

impl Format {
    /// The layout of a type, if it is quantised and known.
    pub(super) fn of(dtype: GgmlDType) -> Option<Self> {
        let field = |at, bits, stride| Field { at, bits, stride };
        let high = |at, bits, stride| Some(Field { at, bits, stride });
        let (bytes, low, high, zero, scale, min, groups) = match dtype {
            GgmlDType::Q4_0 => (18, field(2, 4, 16), None, 8, 0, None, Groups::Whole),
            GgmlDType::Q4_1 => (20, field(4, 4, 16), None, 0, 0, Some(2), Groups::Whole),
            GgmlDType::Q5_0 => (22, field(6, 4, 16), high(2, 1, 1), 16, 0, None, Groups::Whole),
            GgmlDType::Q5_1 => (24, field(8, 4, 16), high(4, 1, 1), 0, 0, Some(2), Groups::Whole),
            GgmlDType::Q8_0 => (34, field(2, 8, 32), None, 0, 0, None, Groups::Whole),
            GgmlDType::Q2K => (84, field(16, 2, 32), None, 0, 80, Some(82), Groups::Nibbles(0)),
            GgmlDType::Q3K => (110, field(32, 2, 32), high(0, 1, 32), 4, 108, None, Groups::Sixes(96)),
            GgmlDType::Q4K => (144, field(16, 4, 32), None, 0, 0, Some(2), Groups::Pairs(4)),
            GgmlDType::Q5K => (176, field(48, 4, 32), high(16, 1, 32), 0, 0, Some(2), Groups::Pairs(4)),
            GgmlDType::Q6K => (210, field(0, 4, 64), high(128, 2, 32), 32, 208, None, Groups::Bytes(192)),
            _ => return None,
        };
        Some(Self { bytes, low, high, zero, scale, min, groups })
    }

    /// What its weights are like, whatever they are.
    pub(super) fn described(&self) -> Described {
        let (weights, group) = self.groups.sizes();
        let bits = self.low.bits + self.high.map_or(0, |high| high.bits);
        Described {
            group,
            block: weights / group,
            // Those of eight bits have a sign.
            least: if bits == 8 { i8::MIN } else { -self.zero },
            bits: bits as u32,
            offsets: self.min.is_some(),
        }
    }

    /// Takes `data` apart into `[rows, inputs]`. The weights are ggml's, to the bit, but for the sign of a 0.
    ///
    /// # Errors
    /// What is wrong, if the rows are not whole blocks or the data has another length.
    pub(super) fn unpack(&self, data: &[u8], rows: usize, inputs: usize) -> Result<QuantRows, String> {
        let (weights, group) = self.groups.sizes();
        if inputs == 0 || !inputs.is_multiple_of(weights) {
            return Err(format!("rows of {inputs} weights in blocks of {weights}"));
        }
        if rows.checked_mul(inputs / weights).and_then(|blocks| blocks.checked_mul(self.bytes)) != Some(data.len()) {
            return Err(format!("{} bytes for {rows} rows of {inputs} weights", data.len()));
        }
        let mut unpacked = QuantRows {
            inputs,
            described: self.described(),
            codes: vec![0; rows * inputs],
            scales: Scales::default(),
            offsets: Scales::default(),
        };
        for (block, codes) in data.chunks_exact(self.bytes).zip(unpacked.codes.chunks_exact_mut(weights)) {
            self.codes(block, codes);
            let number = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
            unpacked.scales.factors.push(number(self.scale));
            unpacked.offsets.factors.extend(self.min.map(number));
            for integers in (0..weights / group).map_while(|group| self.groups.integers(block, group)) {
                unpacked.scales.integers.push(integers.0);
                unpacked.offsets.integers.extend(self.min.map(|_| integers.1));
            }
        }
        Ok(unpacked)
    }

    fn codes(&self, block: &[u8], codes: &mut [i8]) {
        let mut bits = [0; LARGEST];
        let bits = &mut bits[..codes.len()];
        self.low.add_to(bits, block, 0);
        if let Some(high) = self.high {
            high.add_to(bits, block, self.low.bits);
        }
        codes.iter_mut().zip(bits).for_each(|(code, bits)| *code = (*bits as i8).wrapping_sub(self.zero));
    }
}

impl Field {
    /// Puts the integers above the lowest `shift` bits of `out`.
    fn add_to(self, out: &mut [u8], block: &[u8], shift: usize) {
        let mask = u8::MAX >> (8 - self.bits);
        let runs = out.chunks_mut(self.stride * 8 / self.bits);
        for (run, bytes) in runs.zip(block[self.at..].chunks_exact(self.stride)) {
            for (part, out) in run.chunks_mut(self.stride).enumerate() {
                let down = part * self.bits;
                out.iter_mut().zip(bytes).for_each(|(out, byte)| *out |= (byte >> down & mask) << shift);
            }
        }
    }
}

impl Groups {
    /// Weights of a block and of a group.
    fn sizes(self) -> (usize, usize) {
        match self {
            Self::Whole => (32, 32),
            Self::Pairs(_) => (LARGEST, 32),
            Self::Nibbles(_) | Self::Sixes(_) | Self::Bytes(_) => (LARGEST, 16),
        }
    }

    /// What a group multiplies the block's scale and its minimum with, to get its scale and its offset; nothing where the
    /// group is the block.
    fn integers(self, block: &[u8], group: usize) -> Option<(i8, i8)> {
        let byte = |at: usize| block[at];
        Some(match self {
            Self::Whole => return None,
            Self::Nibbles(at) => ((byte(at + group) & 15) as i8, -((byte(at + group) >> 4) as i8)),
            Self::Sixes(at) => {
                let low = byte(at + group % 8) >> (group / 8 * 4) & 15;
                let high = byte(at + 8 + group % 4) >> (group / 4 * 2) & 3;
                ((low | high << 4) as i8 - 32, 0)
            }
            Self::Pairs(at) if group < 4 => ((byte(at + group) & 63) as i8, -((byte(at + 4 + group) & 63) as i8)),
            Self::Pairs(at) => {
                let (low, scale, min) = (byte(at + 4 + group), byte(at + group - 4), byte(at + group));
                ((low & 15 | scale >> 6 << 4) as i8, -((low >> 4 | min >> 6 << 4) as i8))
            }
            Self::Bytes(at) => (byte(at + group) as i8, 0),
        })
    }
}

#[cfg(test)]
mod tests;
