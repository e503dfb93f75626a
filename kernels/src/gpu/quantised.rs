//! Matrices of quantised weights, as small as in the file.

use half::f16;
use rayon::prelude::*;

use super::driver::Argument::{self, Address, F32, U32, U64};
use super::driver::{Number, Product};
use super::{Buffer, Gpu, GpuError, Result, View, ViewMut};
use crate::Element;
use crate::quantised::{Described, QuantRows, Scales};

/// `THREADS`, `OUTPUTS` and `INPUTS` in `cuda/quantised.cu`: what a block has, and what a unit.
const THREADS: usize = 256;
const OUTPUTS: usize = 16;
const INPUTS: usize = 32;
/// Inputs that share factors.
const BLOCK: usize = 256;

/// Most rows that are multiplied with weights as they are. A weight is read once for 8 of them in f32, for 32 in bf16, and
/// expanding it means to write and to read two or four bytes more; but the products of many are faster where they are
/// expanded. It depends on nothing else than the number of rows; on a GPU that is invariant, all are multiplied so, which
/// gives a row the same bits whatever that number is.
const FEW: usize = 32;

/// Bytes that are expanded at a time at most, so that they are few beside a model, and large enough to keep a GPU busy.
const EXPANDED: usize = 64 << 20;

/// The types for which there are kernels; `FORMAT` in `cuda/quantised.cu`.
const FORMATS: [(&str, Described); 10] = [
    ("q4_0", Described { group: 32, block: 1, least: -8, bits: 4, offsets: false }),
    ("q4_1", Described { group: 32, block: 1, least: 0, bits: 4, offsets: true }),
    ("q5_0", Described { group: 32, block: 1, least: -16, bits: 5, offsets: false }),
    ("q5_1", Described { group: 32, block: 1, least: 0, bits: 5, offsets: true }),
    ("q8_0", Described { group: 32, block: 1, least: -128, bits: 8, offsets: false }),
    ("q2_k", Described { group: 16, block: 16, least: 0, bits: 2, offsets: true }),
    ("q3_k", Described { group: 16, block: 16, least: -4, bits: 3, offsets: false }),
    ("q4_k", Described { group: 32, block: 8, least: 0, bits: 4, offsets: true }),
    ("q5_k", Described { group: 32, block: 8, least: 0, bits: 5, offsets: true }),
    ("q6_k", Described { group: 16, block: 16, least: -32, bits: 6, offsets: false }),
];

/// Bytes of the room that a quantised matrix `[outputs, inputs]` takes, which it shares with others.
pub(super) fn room_bytes<E: Element>(outputs: usize, inputs: usize) -> usize {
    outputs.min(expanded_at_once::<E>(inputs)) * inputs * size_of::<E>()
}

/// Outputs that are expanded at a time.
fn expanded_at_once<E: Element>(inputs: usize) -> usize {
    (EXPANDED / size_of::<E>() / inputs / OUTPUTS * OUTPUTS).max(OUTPUTS)
}

/// Bytes that rows `[outputs, inputs]` take.
pub(super) fn bytes(described: Described, outputs: usize, inputs: usize) -> usize {
    let Form { unit, factors, .. } = Form::of(described);
    outputs.div_ceil(OUTPUTS) * (inputs / INPUTS * unit + if factors > 0 { inputs / BLOCK * factors } else { 0 })
}

/// How many bytes what takes.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Of a unit's codes, and of all of it.
    codes: usize,
    unit: usize,
    /// Of an output's scales and offsets in a unit.
    record: usize,
    /// Of the factors of 256 inputs of 16 outputs; none where scales and offsets are there themselves.
    factors: usize,
}

impl Form {
    fn of(described: Described) -> Self {
        let Described { group, block, bits, offsets, .. } = described;
        let numbers = if offsets { 2 } else { 1 };
        let (integers, factors) =
            if block > 1 { (1, OUTPUTS * numbers * size_of::<f16>()) } else { (size_of::<f16>(), 0) };
        let (codes, record) = (OUTPUTS * INPUTS * bits as usize / 8, INPUTS / group * numbers * integers);
        Self { codes, unit: codes + OUTPUTS * record, record, factors }
    }
}

/// Quantised rows of a linear layer, as `cuda/quantised.cu` wants them.
#[derive(Debug)]
pub(super) struct Quantised {
    name: &'static str,
    units: Buffer<u8>,
    factors: Buffer<u8>,
    outputs: usize,
    inputs: usize,
}

impl Quantised {
    /// The rows of all parts, which are described alike, on top of one another.
    ///
    /// # Errors
    /// If there is no memory for it, or no kernel for the type.
    ///
    /// # Panics
    /// If parts are not what they are described to be.
    pub(super) fn new(gpu: &Gpu, parts: &[&QuantRows]) -> Result<Self> {
        let (described, inputs) = (parts[0].described, parts[0].inputs);
        parts.iter().for_each(|part| part.check());
        assert!(parts.iter().all(|part| (part.described, part.inputs) == (described, inputs)), "parts of one kind");
        let Some((name, _)) = FORMATS.into_iter().find(|(_, format)| *format == described) else {
            return Err(GpuError::Unsupported(format!("there are no kernels for weights as {described:?}")));
        };
        if !inputs.is_multiple_of(INPUTS) {
            return Err(GpuError::Unsupported(format!(
                "{inputs} inputs of quantised weights: the kernels take {INPUTS} at a time"
            )));
        }
        let outputs = parts.iter().map(|part| part.rows()).sum();
        let rows: Vec<(&QuantRows, usize)> =
            parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (*part, row))).collect();
        let form = Form::of(described);
        let tiles = rows.len().div_ceil(OUTPUTS);
        let (of_units, of_factors) = (inputs / INPUTS * form.unit, inputs / BLOCK * form.factors);
        let mut units = vec![0; tiles * of_units];
        let mut factors = vec![0; tiles * of_factors];
        let tiles = rows.par_chunks(OUTPUTS).zip(units.par_chunks_mut(of_units));
        tiles.for_each(|(rows, units)| {
            for (output, (part, row)) in rows.iter().enumerate() {
                for (i, unit) in units.chunks_exact_mut(form.unit).enumerate() {
                    put_unit(unit, form, output, part, row * inputs / INPUTS + i);
                }
            }
        });
        if of_factors > 0 {
            for (rows, factors) in rows.chunks(OUTPUTS).zip(factors.chunks_exact_mut(of_factors)) {
                for (output, (part, row)) in rows.iter().enumerate() {
                    for (i, factors) in factors.chunks_exact_mut(form.factors).enumerate() {
                        put_factors(factors, output, part, row * inputs / BLOCK + i);
                    }
                }
            }
        }
        let factors = if factors.is_empty() { gpu.empty() } else { gpu.upload(&factors)? };
        Ok(Self { name, units: gpu.upload(&units)?, factors, outputs, inputs })
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(super) fn bytes(&self) -> usize {
        self.units.bytes() + self.factors.bytes()
    }

    /// The product of the outputs from `first` on; its `w` is nobody's.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If there are not so many outputs, or `first` is no multiple of 16.
    ///
    /// # Safety
    /// As [`Driver::multiply`](super::driver::Driver::multiply), but for `w`; numbers of the inputs are `E`, and `room` is
    /// the address of as much memory as [`room_bytes`] says.
    pub(super) unsafe fn multiply<E: Element>(
        &self,
        gpu: &Gpu,
        room: u64,
        first: usize,
        product: &Product,
    ) -> Result<()> {
        assert!(
            first.is_multiple_of(OUTPUTS) && first + product.outputs <= self.outputs,
            "outputs of quantised weights"
        );
        if product.rows <= FEW || product.invariant {
            // SAFETY: as above.
            return unsafe { self.multiply_few(gpu, first, product) };
        }
        let at_once = expanded_at_once::<E>(self.inputs);
        for start in (0..product.outputs).step_by(at_once) {
            let part = product.part(start, at_once.min(product.outputs - start));
            // SAFETY: as above, and what is expanded is `w`.
            unsafe {
                self.expand::<E>(gpu, first + start, part.outputs, room)?;
                gpu.driver.multiply(&Product { w: room, ..part })?;
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`Quantised::multiply`].
    unsafe fn multiply_few(&self, gpu: &Gpu, first: usize, product: &Product) -> Result<()> {
        let Product { inputs_are, outputs_are, x, y, bias, rows, outputs, stride, add, .. } = *product;
        let (suffix, of_block) = match inputs_are {
            Number::F32 => ("f32_8", 8),
            _ if rows <= 8 => ("bf16_8", 8),
            _ => ("bf16_32", 32),
        };
        // `How` in `cuda/quantised.cu`.
        let how = match outputs_are {
            Number::F32 => u32::from(add),
            _ => 2,
        };
        let [units, factors, row_units] = self.matrix();
        let arguments = [
            units,
            factors,
            row_units,
            U32((first / OUTPUTS) as u32),
            Address(x),
            Address(bias),
            Address(y),
            U64(stride as u64),
            U32(outputs as u32),
            U32(rows as u32),
            U32(how),
        ];
        let grid = [outputs.div_ceil(OUTPUTS), rows.div_ceil(of_block), 1];
        // SAFETY: as in `cuda/quantised.cu`; the memory is there, as the caller says.
        unsafe { gpu.launch(&format!("multiply_{}_{suffix}", self.name), grid, THREADS, 0, &arguments) }
    }

    /// The weights of so many outputs from the `first` on, `[outputs, inputs]`.
    ///
    /// # Safety
    /// So many `E` are allocated at `out`.
    unsafe fn expand<E: Element>(&self, gpu: &Gpu, first: usize, outputs: usize, out: u64) -> Result<()> {
        let [units, factors, row_units] = self.matrix();
        let first = U32((first / OUTPUTS) as u32);
        let arguments = [units, factors, row_units, first, U32(outputs as u32), Address(out)];
        let name = format!("expand_{}_{}", self.name, E::NAME);
        // SAFETY: as in `cuda/quantised.cu`, and above.
        unsafe { gpu.launch(&name, [outputs.div_ceil(OUTPUTS), 1, 1], THREADS, 0, &arguments) }
    }

    /// `x[i] = row ids[i]`, rounded to `E`, `* scale`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit. That there are such rows is for the caller to see to.
    pub(super) fn embed<E: Element>(
        &self,
        gpu: &Gpu,
        ids: View<'_, u32>,
        scale: f32,
        x: ViewMut<'_, f32>,
    ) -> Result<()> {
        assert_eq!(x.len, ids.len * self.inputs, "shapes of an embedding");
        let [units, factors, row_units] = self.matrix();
        let arguments = [units, factors, row_units, Address(ids.address), F32(scale), Address(x.address)];
        let name = format!("embed_{}_{}", self.name, E::NAME);
        // SAFETY: as in `cuda/quantised.cu`.
        unsafe { gpu.launch(&name, [ids.len, 1, 1], THREADS, 0, &arguments) }
    }

    /// How every kernel's arguments begin.
    fn matrix(&self) -> [Argument<'static>; 3] {
        let units = (self.inputs / INPUTS) as u32;
        [Address(self.units.all().address), Address(self.factors.all().address), U32(units)]
    }
}

/// Stores 32 weights of a part, counted over all its rows, as those of an output of a unit.
fn put_unit(unit: &mut [u8], form: Form, output: usize, part: &QuantRows, index: usize) {
    let Described { group, least, bits, offsets, .. } = part.described;
    let (codes, record) = unit.split_at_mut(form.codes);
    let code = |code: &i8| (i32::from(*code) - i32::from(least)) as u8;
    let stored = part.codes[index * INPUTS..][..INPUTS].iter().map(code);
    if bits == 8 {
        const HALF: usize = INPUTS / 2;
        stored.enumerate().for_each(|(i, code)| codes[(i / HALF * OUTPUTS + output) * HALF + i % HALF] = code);
    } else {
        let (mut plane, mut below) = (0, 0);
        for width in [4, 2, 1].into_iter().filter(|width| bits as usize & width != 0) {
            let bytes = INPUTS * width / 8;
            for (i, code) in stored.clone().enumerate() {
                let bit = i * width;
                codes[plane + output * bytes + bit / 8] |= (code >> below & ((1 << width) - 1)) << (bit % 8);
            }
            plane += OUTPUTS * bytes;
            below += width;
        }
    }
    let groups = index * INPUTS / group..(index + 1) * INPUTS / group;
    let bytes =
        [Some(&part.scales), offsets.then_some(&part.offsets)].into_iter().flatten().flat_map(|scales: &Scales| {
            let groups = groups.clone();
            groups.flat_map(|group| match scales.integers.get(group) {
                Some(integer) => vec![*integer as u8],
                None => scales.factors[group].to_le_bytes().to_vec(),
            })
        });
    record[output * form.record..].iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
}

/// Stores the factors of 256 inputs of a part, counted over all its rows, as those of an output.
fn put_factors(to: &mut [u8], output: usize, part: &QuantRows, index: usize) {
    let numbers = [&part.scales, &part.offsets].into_iter().filter_map(|scales| scales.factors.get(index));
    let bytes = numbers.flat_map(|factor| factor.to_le_bytes());
    let first = output * to.len() / OUTPUTS;
    to[first..].iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
}
