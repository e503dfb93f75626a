//! Matrices of small integers with a scale, and perhaps an offset, for every few inputs: the quantised weights of GGUF.
//!
//! They are held nearly as small as in the file and expanded a block at a time, on the way into the matrix kernel. What
//! is computed has the same bits as if the expanded weights, rounded to the element's type, had been there all along.

use std::ops::Range;

use half::f16;

use crate::Element;
use crate::gemm::LANES;
use crate::linear::PANEL;
use crate::memory::{Buffer, OutOfMemory};
use crate::simd::vectorised;

/// Inputs whose codes lie in one 32-bit word: eight of four bits, or four of eight.
const NIBBLES: usize = 8;
const BYTES: usize = 4;

/// Rows of quantised weights, unpacked to one integer a weight: input `i` of a row weighs
/// `codes[i] * scale(i / group) + offset(i / group)`, in f32. The products are exact: codes and scales together have no
/// more than 24 bits in any format.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantRows {
    /// Inputs of a row.
    pub inputs: usize,
    /// What they are like.
    pub described: Described,
    /// `[rows, inputs]`.
    pub codes: Vec<i8>,
    /// Of every group.
    pub scales: Scales,
    /// Of every group, or nothing.
    pub offsets: Scales,
}

/// A number for each group: that of its block, times the group's own integer where there are integers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scales {
    /// `[rows, inputs / (group * block)]`.
    pub factors: Vec<f16>,
    /// `[rows, inputs / group]`, or nothing.
    pub integers: Vec<i8>,
}

impl Scales {
    /// That of a group, counted over all rows.
    fn of(&self, group: usize, block: usize) -> f32 {
        let factor = self.factors.get(group / block).map_or(0.0, |factor| factor.to_f32());
        self.integers.get(group).map_or(factor, |integer| factor * f32::from(*integer))
    }

    fn select(&self, rows: impl Iterator<Item = usize> + Clone, of: usize) -> Self {
        let (factors, integers) = (self.factors.len() / of, self.integers.len() / of);
        Self {
            factors: rows.clone().flat_map(|row| self.factors[row * factors..][..factors].to_vec()).collect(),
            integers: rows.flat_map(|row| self.integers[row * integers..][..integers].to_vec()).collect(),
        }
    }
}

impl QuantRows {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.codes.len() / self.inputs
    }

    /// The scale of a group, counted over all rows.
    pub fn scale(&self, group: usize) -> f32 {
        self.scales.of(group, self.described.block)
    }

    /// The offset of a group, counted over all rows.
    pub fn offset(&self, group: usize) -> f32 {
        self.offsets.of(group, self.described.block)
    }

    /// The given rows, in their order.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn select(&self, rows: impl Iterator<Item = usize> + Clone) -> Self {
        Self {
            codes: rows.clone().flat_map(|row| self.codes[row * self.inputs..][..self.inputs].to_vec()).collect(),
            scales: self.scales.select(rows.clone(), self.rows()),
            offsets: self.offsets.select(rows, self.rows()),
            ..*self
        }
    }

    /// All weights, `[rows, inputs]`.
    pub fn expand<E: Element>(&self) -> Vec<E> {
        let mut expanded = Vec::with_capacity(self.codes.len());
        for (group, codes) in self.codes.chunks_exact(self.described.group).enumerate() {
            let (scale, offset) = (self.scale(group), self.offset(group));
            expanded.extend(codes.iter().map(|code| E::from_f32(f32::from(*code) * scale + offset)));
        }
        expanded
    }

    /// # Panics
    /// If they are not what they are described to be.
    pub(crate) fn check(&self) {
        let Described { group, block, offsets, .. } = self.described;
        let (groups, blocks) = (self.codes.len() / group, self.codes.len() / (group * block));
        assert!(matches!(group, 16 | 32) && self.inputs.is_multiple_of(group * block), "groups of quantised weights");
        assert!(self.codes.len().is_multiple_of(self.inputs), "quantised weights");
        let (least, most) = self.codes.iter().fold((i8::MAX, i8::MIN), |(a, b), code| (a.min(*code), b.max(*code)));
        let codes = self.described.codes();
        assert!(codes.start <= i32::from(least) && i32::from(most) < codes.end, "codes of quantised weights");
        let fits = |scales: &Scales| {
            scales.factors.len() == blocks && scales.integers.len() == if block > 1 { groups } else { 0 }
        };
        assert!(fits(&self.scales), "scales of quantised weights");
        assert!(
            if offsets { fits(&self.offsets) } else { self.offsets == Scales::default() },
            "offsets of quantised weights"
        );
    }
}

/// What is known of rows of quantised weights before they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described {
    /// Inputs that share a scale: 16 or 32.
    pub group: usize,
    /// Groups that share a factor: one, which has no integer then, or more.
    pub block: usize,
    /// The least that a code can be.
    pub least: i8,
    /// Bits of a code, counted from there.
    pub bits: u32,
    /// There are offsets.
    pub offsets: bool,
}

impl Described {
    /// What codes can be.
    pub fn codes(&self) -> Range<i32> {
        let least = i32::from(self.least);
        least..least + (1 << self.bits)
    }
}

/// Bytes that rows `[_, inputs]` of these descriptions take as one matrix, `outputs` with what fills up its parts. What
/// the weights turn out to be can only make it less.
pub fn packed_bytes(parts: &[Described], outputs: usize, inputs: usize) -> usize {
    let all_in = |from: &i8| {
        let nibbles = i32::from(*from)..i32::from(*from) + 16;
        parts.iter().map(Described::codes).all(|codes| nibbles.start <= codes.start && codes.end <= nibbles.end)
    };
    let form = Form {
        group: parts.iter().map(|part| part.group).min().unwrap_or(32),
        nibbles_from: NIBBLES_FROM.into_iter().find(all_in),
        // A product of an f16 and a small integer is no f16.
        half_scales: parts.iter().all(|part| part.block == 1),
        offsets: parts.iter().any(|part| part.offsets),
    };
    form.panel_bytes(outputs, inputs)
}

/// From where codes of four bits may count.
const NIBBLES_FROM: [i8; 2] = [0, -8];

/// How codes, scales and offsets are held: the narrowest form that holds all parts of a matrix exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    group: usize,
    /// Codes of four bits count from here; without it they have eight.
    nibbles_from: Option<i8>,
    /// Scales and offsets are f16, f32 otherwise.
    half_scales: bool,
    offsets: bool,
}

impl Form {
    fn of(parts: &[&QuantRows]) -> Self {
        let codes = || parts.iter().flat_map(|part| &part.codes);
        let scales = || {
            let groups = |part: &&QuantRows| part.codes.len() / part.described.group;
            let both = |part: &QuantRows, group| [part.scale(group), part.offset(group)];
            parts.iter().flat_map(move |part| (0..groups(part)).flat_map(move |group| both(part, group)))
        };
        let all_in = |range: Range<i8>| codes().all(|code| range.contains(code));
        Self {
            group: parts.iter().map(|part| part.described.group).min().unwrap_or(32),
            nibbles_from: NIBBLES_FROM.into_iter().find(|from| all_in(*from..from + 16)),
            half_scales: scales().all(|x| f16::from_f32(x).to_f32() == x),
            offsets: parts.iter().any(|part| part.described.offsets),
        }
    }

    fn scale_bytes(self) -> usize {
        if self.half_scales { 2 } else { 4 }
    }

    /// Bytes of a panel's codes for one group.
    fn code_bytes(self) -> usize {
        PANEL * self.group / if self.nibbles_from.is_some() { 2 } else { 1 }
    }

    /// Bytes of a group of a panel.
    fn bytes(self) -> usize {
        (1 + usize::from(self.offsets)) * PANEL * self.scale_bytes() + self.code_bytes()
    }

    /// Bytes of all panels of so many rows.
    fn panel_bytes(self, rows: usize, inputs: usize) -> usize {
        rows.div_ceil(PANEL) * (inputs / self.group) * self.bytes()
    }

    /// Where a group's codes begin.
    fn codes_at(self) -> usize {
        self.bytes() - self.code_bytes()
    }
}

/// Panels of [`PANEL`] outputs.
#[derive(Debug)]
pub(crate) struct QuantPanels {
    form: Form,
    inputs: usize,
    /// `[panel][group]`, and in each the outputs' scales, their offsets, then their codes, in words of as many inputs of
    /// one output as fit: `[group / inputs in a word][PANEL]`.
    bytes: Buffer<u8>,
}

impl QuantPanels {
    /// The rows of all parts on top of one another; each part but the last is filled up to `align` outputs.
    pub(crate) fn new(parts: &[&QuantRows], inputs: usize, align: usize) -> Result<Self, OutOfMemory> {
        parts.iter().for_each(|part| part.check());
        assert!(parts.iter().all(|part| part.inputs == inputs), "parts of different widths");
        let form = Form::of(parts);
        let rows: usize = parts.iter().map(|part| part.rows().next_multiple_of(align)).sum();
        let bytes = Buffer::zeros(form.panel_bytes(rows, inputs))?;
        let mut panels = Self { form, inputs, bytes };
        let mut first = 0;
        for part in parts {
            (0..part.rows()).for_each(|row| panels.put(first + row, part, row));
            first += part.rows().next_multiple_of(align);
        }
        Ok(panels)
    }

    /// Stores a row of a part as an output.
    fn put(&mut self, output: usize, part: &QuantRows, row: usize) {
        let Form { group, nibbles_from, half_scales, offsets } = self.form;
        let (column, size, codes_at) = (output % PANEL, self.form.scale_bytes(), self.form.codes_at());
        for g in 0..self.inputs / group {
            let (first, theirs) =
                (row * self.inputs + g * group, (row * self.inputs + g * group) / part.described.group);
            let block = self.block_range(output / PANEL, g);
            let block = &mut self.bytes[block];
            let mut scale = |at: usize, x: f32| match half_scales {
                true => block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes()),
                false => block[at..at + 4].copy_from_slice(&x.to_le_bytes()),
            };
            scale(column * size, part.scale(theirs));
            if offsets {
                scale((PANEL + column) * size, part.offset(theirs));
            }
            for (i, code) in part.codes[first..first + group].iter().enumerate() {
                match nibbles_from {
                    Some(from) => {
                        let at = codes_at + (i / NIBBLES * PANEL + column) * 4 + i % NIBBLES / 2;
                        block[at] |= ((code - from) as u8) << (i % 2 * 4);
                    }
                    None => block[codes_at + (i / BYTES * PANEL + column) * 4 + i % BYTES] = *code as u8,
                }
            }
        }
    }

    fn block_range(&self, panel: usize, group: usize) -> Range<usize> {
        let start = (panel * (self.inputs / self.form.group) + group) * self.form.bytes();
        start..start + self.form.bytes()
    }

    /// Bytes that the panels take.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Expands inputs and columns of a panel, `[inputs / PAIR][columns][PAIR]`.
    ///
    /// # Panics
    /// If the inputs are not whole groups, the columns not whole vectors, or `out` is too short.
    pub(crate) fn expand<E: Element>(&self, panel: usize, inputs: Range<usize>, columns: Range<usize>, out: &mut [E]) {
        let group = self.form.group;
        assert!(inputs.start.is_multiple_of(group) && inputs.end.is_multiple_of(group), "half a group");
        assert!(columns.start.is_multiple_of(LANES) && columns.end.is_multiple_of(LANES) && columns.end <= PANEL);
        let size = group * columns.len();
        for (g, out) in (inputs.start / group..inputs.end / group).zip(out.chunks_exact_mut(size)) {
            let block = &self.bytes[self.block_range(panel, g)];
            #[cfg(target_arch = "x86_64")]
            if let Some(out) = E::as_bf16_mut(out)
                && crate::isa() == crate::Isa::Avx512Bf16
            {
                // SAFETY: the features were detected; the block has the form's size, `out` that of the columns.
                unsafe { avx512::expand(block, self.form, columns.clone(), out) };
                continue;
            }
            expand_block(block, self.form, columns.clone(), out);
        }
    }

    /// The weights of one output, rounded to the element's type.
    pub(crate) fn row<E: Element>(&self, output: usize, out: &mut [f32]) {
        let group = self.form.group;
        let column = output % PANEL;
        let vector = column / LANES * LANES;
        let mut expanded = [E::default(); 32 * LANES];
        for (g, out) in out.chunks_exact_mut(group).enumerate() {
            self.expand(output / PANEL, g * group..(g + 1) * group, vector..vector + LANES, &mut expanded);
            for (i, out) in out.iter_mut().enumerate() {
                *out = expanded[(i / E::PAIR * LANES + column - vector) * E::PAIR + i % E::PAIR].to_f32();
            }
        }
    }
}

vectorised! {
    /// Expands a group of a panel.
    fn expand_block<E: Element>(block: &[u8], form: Form, columns: Range<usize>, out: &mut [E]) {
        let (scales, codes) = block.split_at(form.codes_at());
        let (words, _) = codes.as_chunks::<4>();
        let width = columns.len();
        for (v, column) in columns.step_by(LANES).enumerate() {
            let scale = lanes(scales, column, form.half_scales);
            let offset = if form.offsets { lanes(scales, PANEL + column, form.half_scales) } else { [0.0; LANES] };
            let inputs = if form.nibbles_from.is_some() { NIBBLES } else { BYTES };
            for word in 0..form.group / inputs {
                let codes = &words[word * PANEL + column..][..LANES];
                for i in 0..inputs {
                    let mut weights = [0.0f32; LANES];
                    for lane in 0..LANES {
                        let word = u32::from_le_bytes(codes[lane]);
                        let code = match form.nibbles_from {
                            Some(from) => (word >> (4 * i) & 15) as i32 + i32::from(from),
                            None => (word << (24 - 8 * i)) as i32 >> 24,
                        };
                        // The product of so few bits is exact, so that a fused operation would change nothing.
                        weights[lane] = code as f32 * scale[lane] + offset[lane];
                    }
                    let input = word * inputs + i;
                    let at = (input / E::PAIR * width + v * LANES) * E::PAIR + input % E::PAIR;
                    for (lane, weight) in E::from_lanes::<S>(weights).into_iter().enumerate() {
                        out[at + lane * E::PAIR] = weight;
                    }
                }
            }
        }
    }
}

/// Sixteen scales from the `first` on.
#[inline(always)]
fn lanes(bytes: &[u8], first: usize, half: bool) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    if half {
        let (numbers, _) = bytes[2 * first..].as_chunks::<2>();
        lanes.iter_mut().zip(numbers).for_each(|(lane, x)| *lane = f16::from_le_bytes(*x).to_f32());
    } else {
        let (numbers, _) = bytes[4 * first..].as_chunks::<4>();
        lanes.iter_mut().zip(numbers).for_each(|(lane, x)| *lane = f32::from_le_bytes(*x));
    }
    lanes
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use half::bf16;

    use super::{BYTES, Form, LANES, NIBBLES, PANEL};

    /// How far ahead of the codes memory is fetched: a decoding step does little else than reading them.
    const AHEAD: usize = 4096;

    /// As [`super::expand_block`].
    ///
    /// # Safety
    /// `block` must have the form's size, `out` room for the group and the columns, which are whole vectors of a panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn expand(block: &[u8], form: Form, columns: Range<usize>, out: &mut [bf16]) {
        assert!(block.len() == form.bytes() && out.len() == form.group * columns.len() && columns.end <= PANEL);
        let width = columns.len();
        let (scales, codes) = (block.as_ptr(), block[form.codes_at()..].as_ptr());
        let words = form.group / if form.nibbles_from.is_some() { NIBBLES } else { BYTES };
        // What a nibble stands for.
        let base = _mm512_set1_ps(f32::from(form.nibbles_from.unwrap_or(0)));
        let table =
            _mm512_add_ps(_mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.), base);
        for (v, column) in columns.step_by(LANES).enumerate() {
            // SAFETY: scales, offsets and codes of the column lie in the block, pairs of all its inputs in `out`.
            unsafe {
                let scale = load(scales, column, form.half_scales);
                let offset = match form.offsets {
                    true => load(scales, PANEL + column, form.half_scales),
                    false => _mm512_setzero_ps(),
                };
                let scaled = |code: __m512| _mm512_fmadd_ps(code, scale, offset);
                let mut to = out.as_mut_ptr().add(v * LANES * 2);
                for word in 0..words {
                    let at = codes.add((word * PANEL + column) * 4);
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                    let codes = _mm512_loadu_si512(at.cast());
                    macro_rules! pair {
                        ($first:expr, $second:expr) => {{
                            store(to, scaled($first), scaled($second));
                            to = to.add(2 * width);
                        }};
                    }
                    if form.nibbles_from.is_some() {
                        // The permutation looks at four bits of its index.
                        macro_rules! nibble {
                            ($i:literal) => {
                                _mm512_permutexvar_ps(_mm512_srli_epi32::<{ 4 * $i }>(codes), table)
                            };
                        }
                        pair!(nibble!(0), nibble!(1));
                        pair!(nibble!(2), nibble!(3));
                        pair!(nibble!(4), nibble!(5));
                        pair!(nibble!(6), nibble!(7));
                    } else {
                        macro_rules! byte {
                            ($i:literal) => {
                                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<{ 24 - 8 * $i }>(codes)))
                            };
                        }
                        pair!(byte!(0), byte!(1));
                        pair!(byte!(2), byte!(3));
                    }
                }
            }
        }
    }

    /// # Safety
    /// Sixteen numbers from the `first` on must be readable.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(scales: *const u8, first: usize, half: bool) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            match half {
                true => _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(2 * first).cast())),
                false => _mm512_loadu_ps(scales.add(4 * first).cast()),
            }
        }
    }

    /// Stores two inputs of sixteen columns side by side.
    ///
    /// # Safety
    /// 32 bf16 must be writable.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store(to: *mut bf16, first: __m512, second: __m512) {
        let interleave = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
            1, 16, 0,
        );
        // SAFETY: the caller's promise; a __m512bh is 64 bytes.
        unsafe {
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(interleave, both));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    pub(crate) fn quantised(
        rows: usize,
        inputs: usize,
        group: usize,
        codes: Range<i32>,
        offsets: bool,
        half: bool,
    ) -> QuantRows {
        let groups = rows * inputs / group;
        let block = if half { 1 } else { inputs / group };
        // As in GGUF's blocks: an f16, or the product of an f16 and a small integer.
        let numbers = |seed: usize| Scales {
            factors: (0..groups / block)
                .map(|i| f16::from_f32(((i * 7919 + seed * 104_729) % 2003) as f32 / 9970.0 - 0.11))
                .collect(),
            integers: (0..groups).filter(|_| block > 1).map(|i| (1 + i % 61) as i8).collect(),
        };
        let span = (codes.end - codes.start) as usize;
        let (least, bits) = (codes.start as i8, span.ilog2());
        QuantRows {
            inputs,
            described: Described { group, block, least, bits, offsets },
            codes: (0..rows * inputs).map(|i| (codes.start + (i * 31 % span) as i32) as i8).collect(),
            scales: numbers(1),
            offsets: if offsets { numbers(2) } else { Scales::default() },
        }
    }

    fn check<E: Element>(parts: &[&QuantRows], inputs: usize, align: usize) {
        let panels = QuantPanels::new(parts, inputs, align).unwrap();
        let outputs = parts.iter().map(|part| part.rows().next_multiple_of(align)).sum();
        let described: Vec<Described> = parts.iter().map(|part| part.described).collect();
        assert!(panels.len() <= packed_bytes(&described, outputs, inputs), "{:?}: {described:?}", panels.form);
        let mut output = 0;
        for part in parts {
            let expected = part.expand::<E>();
            for row in 0..part.rows() {
                let mut found = vec![1.0; inputs];
                panels.row::<E>(output + row, &mut found);
                let expected: Vec<f32> =
                    expected[row * inputs..(row + 1) * inputs].iter().map(|w| w.to_f32()).collect();
                assert!(found == expected, "row {row} of {:?}", panels.form);
            }
            output += part.rows().next_multiple_of(align);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_form_gives_back_its_weights(
            rows in 1usize..150, groups in 1usize..5, small in any::<bool>(),
            codes in prop::sample::select(vec![0..16, -8..8, -32..32, -128..128]),
            offsets in any::<bool>(), half in any::<bool>(),
        ) {
            let inputs = groups * 32;
            let part = quantised(rows, inputs, if small { 16 } else { 32 }, codes, offsets, half);
            let other = quantised(rows / 2 + 1, inputs, 32, 0..16, true, true);
            check::<f32>(&[&part], inputs, 1);
            check::<bf16>(&[&part], inputs, 1);
            check::<bf16>(&[&part, &other], inputs, 1);
            check::<bf16>(&[&part, &other], inputs, PANEL);
        }
    }

    #[test]
    fn rows_are_selected_with_their_scales() {
        let part = quantised(5, 64, 32, 0..16, true, true);
        let selected = part.select([3usize, 1].into_iter()).expand::<f32>();
        let all = part.expand::<f32>();
        assert_eq!(selected, [&all[3 * 64..4 * 64], &all[64..128]].concat());
    }
}
