//! Linear layers over weights that are packed once at load.

use std::ops::Range;

use crate::activation::Activation;
use crate::element::{Element, round};
use crate::fp8::Fp8Rows;
use crate::gemm::{LANES, Tile};
use crate::memory::{Buffer, OutOfMemory, carve, carved, with_scratch};
use crate::parallel::{self, Shared, for_each_piece};
use crate::quantised::{Described, QuantPanels, QuantRows};

/// Outputs that a packed panel holds: four vectors, so that six rows fill the registers.
pub const PANEL: usize = 4 * LANES;
/// Most rows of the input that stay in the second-level cache while the weights stream by.
const BLOCK_ROWS: usize = 96;
/// Rows that the kernel takes at a time.
const KERNEL_ROWS: usize = 6;
/// Outputs in which work is cut where the panels are shared out.
const STRIP: usize = PANEL / 2;
/// Rows of which a thread needs so many for its own pass over all weights to be worth it.
const FEW_ROWS: usize = 48;
/// Rows whose result waits in the first-level cache for its non-linearity.
const ACTIVATED_ROWS: usize = 48;
/// Longest stretch of the sum for which a panel's weights stay in the second-level cache.
const SUM_BLOCK: usize = 2048;
/// Inputs of a quantised panel that are expanded together, into the first-level cache.
const EXPANDED: usize = 256;

/// A linear layer `y = W x + b` whose weights `[outputs, inputs]` are stored as panels of 64 outputs.
///
/// The last panel is filled up with zeros. No second copy of the weights is kept: [`Linear::row`] reads one back.
#[derive(Debug)]
pub struct Linear<E> {
    outputs: usize,
    inputs: usize,
    weights: Weights<E>,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Weights<E> {
    /// `[panel][input / PAIR][PANEL][PAIR]`.
    Plain(Buffer<E>),
    /// Expanded on the way into the kernel.
    Quantised(QuantPanels),
}

/// Rows of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, E> {
    /// `[outputs, inputs]`.
    pub weights: Rows<'a, E>,
    /// `[outputs]`.
    pub bias: Option<&'a [f32]>,
}

/// Weights as they come from a checkpoint.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a, E> {
    /// One number a weight.
    Plain(&'a [E]),
    /// Integers and scales.
    Quantised(&'a QuantRows),
    /// e4m3 and scales.
    Fp8(&'a Fp8Rows),
}

/// How weights are held in a checkpoint, as far as it is known before they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// One number a weight.
    Plain,
    /// Integers and scales.
    Quantised(Described),
    /// e4m3 and scales.
    Fp8,
}

impl<E: Element> Rows<'_, E> {
    pub(crate) fn len(&self, inputs: usize) -> usize {
        match self {
            Self::Plain(rows) => rows.len() / inputs,
            Self::Quantised(rows) => rows.rows(),
            Self::Fp8(rows) => rows.rows(),
        }
    }

    /// How they are held.
    pub fn held(&self) -> Held {
        match self {
            Self::Plain(_) => Held::Plain,
            Self::Quantised(rows) => Held::Quantised(rows.described),
            Self::Fp8(_) => Held::Fp8,
        }
    }
}

/// What to do with a linear layer's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `out = y`.
    Set,
    /// `out = out + y`: a residual.
    Add,
}

impl<E: Element> Linear<E> {
    /// A layer of matrices on top of one another. It is held quantised if all of them are.
    ///
    /// # Errors
    /// If there is no memory for it.
    ///
    /// # Panics
    /// If rows are not whole, a bias has another length than its rows, or `inputs` is odd and the element is bf16.
    pub fn new(parts: &[Matrix<'_, E>], inputs: usize) -> Result<Self, OutOfMemory> {
        Self::stack(parts, inputs, 1)
    }

    /// As [`Linear::new`], with each part filled up to a multiple of `align` outputs.
    fn stack(parts: &[Matrix<'_, E>], inputs: usize, align: usize) -> Result<Self, OutOfMemory> {
        assert!(inputs.is_multiple_of(E::PAIR), "an odd number of inputs: {inputs}");
        let outputs = parts.iter().map(|part| part.weights.len(inputs).next_multiple_of(align)).sum();
        let quantised: Vec<&QuantRows> = parts
            .iter()
            .filter_map(|part| match part.weights {
                Rows::Quantised(rows) => Some(rows),
                Rows::Plain(_) | Rows::Fp8(_) => None,
            })
            .collect();
        let weights = match quantised.len() == parts.len() {
            true => Weights::Quantised(QuantPanels::new(&quantised, inputs, align)?),
            false => Weights::Plain(pack(parts, inputs, outputs, align)?),
        };
        let mut bias = Vec::new();
        if parts.iter().any(|part| part.bias.is_some()) {
            for part in parts {
                let (start, rows) = (bias.len(), part.weights.len(inputs));
                assert!(part.bias.is_none_or(|bias| bias.len() == rows), "a bias of the wrong length");
                bias.extend_from_slice(part.bias.unwrap_or(&[]));
                bias.resize(start + rows.next_multiple_of(align), 0.0);
            }
        }
        Ok(Self { outputs, inputs, weights, bias: (!bias.is_empty()).then_some(bias) })
    }

    /// A layer without inputs and outputs, to be filled.
    pub fn empty() -> Self {
        let weights = Buffer::zeros(0).unwrap_or_else(|error| error.abort());
        Self { outputs: 0, inputs: 0, weights: Weights::Plain(weights), bias: None }
    }

    /// Bytes that weights `[outputs, inputs]` take in panels.
    pub fn packed_bytes(outputs: usize, inputs: usize) -> usize {
        outputs.next_multiple_of(PANEL) * inputs * size_of::<E>()
    }

    /// Takes new weights `rows[_, inputs]` for the outputs from `first` on.
    ///
    /// # Panics
    /// If the rows are not whole, `first` is not the beginning of a panel, or the weights are quantised.
    pub fn refill(&mut self, first: usize, rows: &[f32]) {
        let inputs = self.inputs;
        let count = rows.len() / inputs;
        assert!(rows.len() == count * inputs && first.is_multiple_of(PANEL) && first + count <= self.outputs, "rows");
        assert!(matches!(self.weights, Weights::Plain(_)), "quantised weights do not change");
        let Weights::Plain(packed) = &mut self.weights else { return };
        let shared = Shared::new(packed);
        for_each_piece(count, PANEL, |piece| {
            let start = (first + piece.start) * inputs;
            // SAFETY: every piece is a panel.
            let panel = unsafe { shared.range(start..start + PANEL * inputs) };
            for (output, row) in rows[piece.start * inputs..piece.end * inputs].chunks_exact(inputs).enumerate() {
                for (step, values) in row.chunks_exact(E::PAIR).enumerate() {
                    let at = (step * PANEL + output) * E::PAIR;
                    for (weight, value) in panel[at..at + E::PAIR].iter_mut().zip(values) {
                        *weight = E::from_f32(*value);
                    }
                }
            }
        });
    }

    /// Takes a new bias.
    ///
    /// # Panics
    /// If it had none or one of another length.
    pub fn refill_bias(&mut self, bias: &[f32]) {
        assert!(self.bias.is_some(), "there was no bias");
        self.bias.iter_mut().for_each(|old| old.copy_from_slice(bias));
    }

    /// Becomes the layer without bias whose weights are `rows[inputs, outputs]` transposed. An odd number of inputs
    /// becomes even, by one that counts nothing.
    ///
    /// # Panics
    /// If the rows are not whole.
    pub fn fill_transposed(&mut self, rows: &[E], outputs: usize) {
        assert!(rows.len().is_multiple_of(outputs), "rows that are not whole");
        self.fill_columns(rows.len() / outputs, outputs, |row, columns, out| {
            out.copy_from_slice(&rows[row * outputs..][columns]);
        });
    }

    /// As [`Linear::fill_transposed`], rounding to the weights' type.
    ///
    /// # Panics
    /// If the rows are not whole.
    pub fn fill_transposed_f32(&mut self, rows: &[f32], outputs: usize) {
        assert!(rows.len().is_multiple_of(outputs), "rows that are not whole");
        self.fill_columns(rows.len() / outputs, outputs, |row, columns, out| {
            round(&rows[row * outputs..][columns], out);
        });
    }

    /// `get` writes columns of a row.
    fn fill_columns(&mut self, rows: usize, outputs: usize, get: impl Fn(usize, Range<usize>, &mut [E]) + Sync + Send) {
        let inputs = rows.next_multiple_of(E::PAIR);
        (self.inputs, self.outputs, self.bias) = (inputs, outputs, None);
        let needed = outputs.next_multiple_of(PANEL) * inputs;
        if !matches!(&self.weights, Weights::Plain(packed) if packed.len() >= needed) {
            self.weights = Weights::Plain(Buffer::zeros(needed).unwrap_or_else(|error| error.abort()));
        }
        let Weights::Plain(packed) = &mut self.weights else { return };
        let shared = Shared::new(packed);
        for_each_piece(outputs, PANEL, |columns| {
            let start = columns.start * inputs;
            // SAFETY: every piece is a panel.
            let panel = unsafe { shared.range(start..start + PANEL * inputs) };
            let mut values = [E::default(); PANEL];
            for (step, packed) in panel.chunks_exact_mut(PANEL * E::PAIR).enumerate() {
                for i in 0..E::PAIR {
                    match step * E::PAIR + i {
                        row if row < rows => get(row, columns.clone(), &mut values[..columns.len()]),
                        _ => values.fill(E::default()),
                    }
                    for (packed, value) in packed.chunks_exact_mut(E::PAIR).zip(&values) {
                        packed[i] = *value;
                    }
                }
            }
        });
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that the layer takes.
    pub fn bytes(&self) -> usize {
        let weights = match &self.weights {
            Weights::Plain(packed) => size_of_val(&**packed),
            Weights::Quantised(panels) => panels.len(),
        };
        weights + self.bias.as_ref().map_or(0, |b| b.len() * 4)
    }

    /// Weights of one output, in f32: an embedding row where the layer is a tied language head.
    ///
    /// # Panics
    /// If there is no such output or `out` is not `[inputs]`.
    pub fn row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs && out.len() == self.inputs);
        let packed = match &self.weights {
            Weights::Plain(packed) => packed,
            Weights::Quantised(panels) => return panels.row::<E>(output, out),
        };
        let panel = &packed[output / PANEL * PANEL * self.inputs..];
        for (step, values) in out.chunks_exact_mut(E::PAIR).enumerate() {
            let at = (step * PANEL + output % PANEL) * E::PAIR;
            for (value, weight) in values.iter_mut().zip(&panel[at..at + E::PAIR]) {
                *value = weight.to_f32();
            }
        }
    }

    /// `out[rows, outputs]` from `x[rows, inputs]`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn forward(&self, x: &[E], out: &mut [f32], store: Store) {
        self.run(x, out, store, E::gemm_tile);
    }

    /// As [`Linear::forward`], with inputs that are not rounded to the weights' type.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn forward_f32(&self, x: &[f32], out: &mut [f32], store: Store) {
        self.run(x, out, store, E::gemm_tile_f32);
    }

    fn run<A: Copy + Sync>(&self, x: &[A], out: &mut [f32], store: Store, kernel: fn(Tile<'_, A, E>)) {
        let rows = x.len() / self.inputs;
        assert_eq!((x.len(), out.len()), (rows * self.inputs, rows * self.outputs), "shapes of a linear layer");
        let shared = Shared::new(out);
        for_each_block(rows, self.outputs, |rows, columns| {
            let x = &x[rows.start * self.inputs..rows.end * self.inputs];
            for columns in panels(columns) {
                let len = columns.len();
                // SAFETY: blocks differ in their rows or their columns.
                let mut out = unsafe { shared.rows(rows.start * self.outputs + columns.start, self.outputs) };
                if len.is_multiple_of(LANES) {
                    self.strip(columns, x, rows.len(), &mut out, store, kernel);
                } else {
                    let mut scratch = [0.0; BLOCK_ROWS * PANEL];
                    let whole = columns.start..columns.start + len.next_multiple_of(LANES);
                    self.strip(whole, x, rows.len(), &mut parallel::Rows::new(&mut scratch, PANEL), Store::Set, kernel);
                    for (row, sums) in scratch.chunks_exact(PANEL).take(rows.len()).enumerate() {
                        for (out, sum) in out.row(row, 0..len).iter_mut().zip(sums) {
                            *out = if store == Store::Add { *out + sum } else { *sum };
                        }
                    }
                }
            }
        });
    }

    /// Columns of the result that lie in one panel, bias included, into `out`; a multiple of the lanes.
    pub(crate) fn strip<A>(
        &self,
        columns: Range<usize>,
        x: &[A],
        rows: usize,
        out: &mut parallel::Rows<'_, f32>,
        store: Store,
        kernel: fn(Tile<'_, A, E>),
    ) {
        let panel = columns.start / PANEL;
        let within = columns.start % PANEL..columns.start % PANEL + columns.len();
        let mut tile = |done: usize, k: usize, b: &[E], ldb: usize| {
            kernel(Tile {
                a: &x[done..],
                lda: self.inputs,
                rows,
                b: &[b],
                ldb,
                cols: columns.len(),
                k,
                c: out.reborrow(),
                accumulate: done > 0 || store == Store::Add,
                from_memory: rows < FEW_ROWS && matches!(self.weights, Weights::Plain(_)),
            });
        };
        let stretches = |longest: usize| {
            (0..self.inputs).step_by(longest).map(move |done| (done, (self.inputs - done).min(longest)))
        };
        match &self.weights {
            Weights::Plain(packed) => {
                let weights = &packed[panel * PANEL * self.inputs..];
                for (done, k) in stretches(SUM_BLOCK) {
                    tile(done, k, &weights[done * PANEL + within.start * E::PAIR..], PANEL * E::PAIR);
                }
            }
            Weights::Quantised(panels) => with_scratch(carved::<E>(EXPANDED * PANEL), |scratch| {
                let (expanded, _) = carve::<E>(scratch, EXPANDED * PANEL);
                for (done, k) in stretches(EXPANDED) {
                    let expanded = &mut expanded[..k * columns.len()];
                    panels.expand(panel, done..done + k, within.clone(), expanded);
                    tile(done, k, expanded, columns.len() * E::PAIR);
                }
            }),
        }
        if let Some(bias) = &self.bias {
            let bias = &bias[columns.start..columns.end.min(self.outputs)];
            for row in 0..rows {
                out.row(row, 0..bias.len()).iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
    }
}

/// Packs rows into panels, one part after the other.
fn pack<E: Element>(
    parts: &[Matrix<'_, E>],
    inputs: usize,
    outputs: usize,
    align: usize,
) -> Result<Buffer<E>, OutOfMemory> {
    let mut packed = Buffer::<E>::zeros(outputs.next_multiple_of(PANEL) * inputs)?;
    let mut first = 0;
    for part in parts {
        let expanded;
        let rows = match part.weights {
            Rows::Plain(rows) => rows,
            Rows::Quantised(rows) => {
                expanded = rows.expand();
                &expanded
            }
            Rows::Fp8(rows) => {
                expanded = rows.expand();
                &expanded
            }
        };
        assert!(rows.len().is_multiple_of(inputs), "rows that are not whole");
        for (output, row) in (first..).zip(rows.chunks_exact(inputs)) {
            let panel = &mut packed[output / PANEL * PANEL * inputs..][..PANEL * inputs];
            for (step, values) in row.chunks_exact(E::PAIR).enumerate() {
                let at = (step * PANEL + output % PANEL) * E::PAIR;
                panel[at..at + E::PAIR].copy_from_slice(values);
            }
        }
        first += (rows.len() / inputs).next_multiple_of(align);
    }
    Ok(packed)
}

/// Calls `f` for blocks of rows and columns that together are all of them, on all threads.
///
/// With many rows every thread takes blocks of rows and goes through all columns; with few the columns are shared out,
/// so that every weight is read once, and each thread reads one stretch of them.
fn for_each_block(rows: usize, columns: usize, f: impl Fn(Range<usize>, Range<usize>) + Sync + Send) {
    let threads = rayon::current_num_threads();
    if rows >= threads * FEW_ROWS {
        // As many blocks for one thread as for another, in whole steps of the kernel.
        let blocks = rows.div_ceil(BLOCK_ROWS).next_multiple_of(threads);
        let block = rows.div_ceil(blocks).next_multiple_of(KERNEL_ROWS);
        for_each_piece(rows, block, |rows| f(rows, 0..columns));
    } else {
        let stretch = columns.div_ceil(threads).next_multiple_of(STRIP);
        for_each_piece(columns, stretch, |columns| {
            (0..rows).step_by(BLOCK_ROWS).for_each(|start| {
                f(start..(start + BLOCK_ROWS).min(rows), columns.clone());
            })
        });
    }
}

/// The columns, cut where a panel ends.
fn panels(columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut start = columns.start;
    std::iter::from_fn(move || {
        let end = ((start / PANEL + 1) * PANEL).min(columns.end);
        let panel = (start < end).then_some(start..end);
        start = end;
        panel
    })
}

/// A linear layer whose result goes through a non-linearity before it is stored: `act(W x + b)`, or with a gate
/// `act(G x + a) * (U x + b)`.
#[derive(Debug)]
pub struct Activated<E> {
    /// The gate's panels, if there is one, then the others.
    linear: Linear<E>,
    activation: Activation,
    outputs: usize,
    gated: bool,
}

/// What went into a non-linearity, `[rows, outputs]` each.
#[derive(Debug)]
pub struct Kept<'a, E> {
    /// Empty where there is no gate.
    pub gate: &'a mut [E],
    /// The other half.
    pub up: &'a mut [E],
}

impl<E: Element> Activated<E> {
    /// A layer of the rows `[outputs, inputs]`, with their biases.
    ///
    /// # Errors
    /// If there is no memory for it.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn new(
        activation: Activation,
        rows: Matrix<'_, E>,
        inputs: usize,
        gate: Option<Matrix<'_, E>>,
    ) -> Result<Self, OutOfMemory> {
        let parts: Vec<_> = gate.into_iter().chain([rows]).collect();
        let linear = Linear::stack(&parts, inputs, PANEL)?;
        Ok(Self { linear, activation, outputs: rows.weights.len(inputs), gated: gate.is_some() })
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The non-linearity.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Bytes that the layer takes.
    pub fn bytes(&self) -> usize {
        self.linear.bytes()
    }

    /// Takes new weights `[outputs, inputs]`.
    ///
    /// # Panics
    /// If the lengths do not fit or the weights are quantised.
    pub fn refill(&mut self, rows: &[f32], gate: Option<&[f32]>) {
        assert!(gate.is_some() == self.gated && gate.is_none_or(|gate| gate.len() == rows.len()), "a gate");
        if let Some(gate) = gate {
            self.linear.refill(0, gate);
        }
        self.linear.refill(self.first_up(), rows);
    }

    /// Takes new biases `[outputs]`.
    ///
    /// # Panics
    /// If the lengths do not fit or there was no bias.
    pub fn refill_bias(&mut self, bias: &[f32], gate: Option<&[f32]>) {
        assert!(gate.is_some() == self.gated, "a gate");
        let first = self.first_up();
        assert!(self.linear.bias.is_some(), "there was no bias");
        if let Some(all) = &mut self.linear.bias {
            if let Some(gate) = gate {
                all[..gate.len()].copy_from_slice(gate);
            }
            all[first..first + bias.len()].copy_from_slice(bias);
        }
    }

    /// The output of the linear layer where those begin that are not the gate's.
    fn first_up(&self) -> usize {
        if self.gated { self.outputs.next_multiple_of(PANEL) } else { 0 }
    }

    /// `out[rows, outputs]` from `x[rows, inputs]`; what the non-linearity was given is kept where that is asked for.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn forward(&self, x: &[E], out: &mut [E], keep: Option<Kept<'_, E>>) {
        let inputs = self.linear.inputs;
        let rows = x.len() / inputs;
        assert_eq!((x.len(), out.len()), (rows * inputs, rows * self.outputs), "shapes of a linear layer");
        if let Some(Kept { gate, up }) = &keep {
            assert!(up.len() == out.len() && gate.len() == if self.gated { out.len() } else { 0 }, "what is kept");
        }
        let shared = Shared::new(out);
        let keep = keep.map(|kept| (Shared::new(kept.gate), Shared::new(kept.up)));
        for_each_block(rows, self.outputs, |rows, columns| {
            with_scratch(2 * carved::<f32>(BLOCK_ROWS * PANEL), |scratch| {
                for columns in panels(columns) {
                    for first in rows.clone().step_by(self.rows_at_a_time()) {
                        let x = &x[first * inputs..rows.end.min(first + self.rows_at_a_time()) * inputs];
                        // SAFETY: blocks differ in their rows or their columns.
                        let mut out = unsafe { shared.rows(first * self.outputs + columns.start, self.outputs) };
                        let (gate, up) = self.strip(columns.clone(), x, scratch, &mut out);
                        let Some((kept_gate, kept_up)) = &keep else { continue };
                        let kept = [(kept_gate, gate), (kept_up, if self.gated { up } else { gate })];
                        for (kept, sums) in &kept[usize::from(!self.gated)..] {
                            for (row, sums) in sums.chunks_exact(PANEL).enumerate() {
                                let start = (first + row) * self.outputs;
                                // SAFETY: as above.
                                let kept = unsafe { kept.range(start + columns.start..start + columns.end) };
                                round(&sums[..columns.len()], kept);
                            }
                        }
                    }
                }
            });
        });
    }

    /// Few enough for their sums to wait in the first-level cache; more where weights have to be expanded for them.
    fn rows_at_a_time(&self) -> usize {
        match self.linear.weights {
            Weights::Plain(_) => ACTIVATED_ROWS,
            Weights::Quantised(_) => BLOCK_ROWS,
        }
    }

    /// Columns of the result that lie in one panel. Answers what the non-linearity was given, `[rows, PANEL]` of the gate
    /// and of the rest; without a gate the first of them.
    fn strip<'a>(
        &self,
        columns: Range<usize>,
        x: &[E],
        scratch: &'a mut [u8],
        out: &mut parallel::Rows<'_, E>,
    ) -> (&'a [f32], &'a [f32]) {
        let rows = x.len() / self.linear.inputs;
        let (gate, scratch) = carve::<f32>(scratch, rows * PANEL);
        let (up, _) = carve::<f32>(scratch, rows * PANEL);
        let compute = |first: usize, sums: &mut [f32]| {
            let columns = first + columns.start..first + columns.end.next_multiple_of(LANES);
            self.linear.strip(columns, x, rows, &mut parallel::Rows::new(sums, PANEL), Store::Set, E::gemm_tile);
        };
        compute(0, gate);
        if self.gated {
            compute(self.first_up(), up);
        }
        for (row, (gate, up)) in gate.chunks_exact(PANEL).zip(up.chunks_exact(PANEL)).enumerate() {
            let out = out.row(row, 0..columns.len());
            match self.gated {
                true => self.activation.gated(gate, up, out),
                false => self.activation.plain(gate, out),
            }
        }
        (gate, up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantised::tests::quantised;
    use half::bf16;
    use proptest::prelude::*;

    fn values<E: Element>(n: usize, seed: usize) -> Vec<E> {
        (0..n).map(|i| E::from_f32((((i + seed) * 7919) % 1009) as f32 / 504.0 - 1.0)).collect()
    }

    fn check<E: Element>(rows: usize, outputs: usize, inputs: usize) {
        let weights = values::<E>(outputs * inputs, 1);
        let bias: Vec<f32> = values::<f32>(outputs, 5);
        let (first, second) = weights.split_at(outputs / 3 * inputs);
        let (first_bias, second_bias) = bias.split_at(outputs / 3);
        let part = |weights, bias| Matrix { weights: Rows::Plain(weights), bias: Some(bias) };
        let layer = Linear::new(&[part(first, first_bias), part(second, second_bias)], inputs).unwrap();
        let x = values::<E>(rows * inputs, 2);
        let mut out = vec![1.0; rows * outputs];
        layer.forward(&x, &mut out, Store::Add);
        let plain: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let w: Vec<f32> = weights.iter().map(|w| w.to_f32()).collect();
        let expected = crate::reference::linear(&plain, &w, Some(&bias), inputs);
        for (out, expected) in out.iter().zip(&expected) {
            assert!((out - 1.0 - expected).abs() < 1e-3 * (inputs as f32).sqrt(), "{out} {expected}");
        }
        let mut row = vec![0.0; inputs];
        for o in 0..outputs {
            layer.row(o, &mut row);
            assert_eq!(row, w[o * inputs..(o + 1) * inputs]);
        }
        // A row alone has the same bits as among others.
        let mut alone = vec![1.0; outputs];
        for r in 0..rows.min(3) {
            alone.fill(1.0);
            layer.forward(&x[r * inputs..(r + 1) * inputs], &mut alone, Store::Add);
            assert_eq!(alone, out[r * outputs..(r + 1) * outputs]);
        }
        let mut exact = vec![0.0; rows * outputs];
        layer.forward_f32(&plain, &mut exact, Store::Set);
        for (a, b) in exact.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-3 * (inputs as f32).sqrt());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn matches_the_reference_at_odd_shapes(rows in 1usize..40, outputs in 1usize..200, pairs in 1usize..100) {
            check::<f32>(rows, outputs, 2 * pairs);
            check::<bf16>(rows, outputs, 2 * pairs);
        }
    }

    fn check_quantised<E: Element>(rows: usize, outputs: usize, groups: usize, codes: Range<i32>) {
        let inputs = 32 * groups;
        let parts = [(outputs, 32, true), (outputs / 2 + 1, 16, false)]
            .map(|(rows, group, offsets)| quantised(rows, inputs, group, codes.clone(), offsets, true));
        let expanded = parts.each_ref().map(QuantRows::expand::<E>);
        let bias = vec![0.5; parts[0].rows()];
        let x = values::<E>(rows * inputs, 2);
        let part = |weights, bias| Matrix { weights, bias };
        let layers = [
            [part(Rows::Quantised(&parts[0]), Some(&bias[..])), part(Rows::Quantised(&parts[1]), None)],
            [part(Rows::Plain(&expanded[0]), Some(&bias[..])), part(Rows::Plain(&expanded[1]), None)],
            [part(Rows::Plain(&expanded[0]), Some(&bias[..])), part(Rows::Quantised(&parts[1]), None)],
        ];
        let results = layers.map(|parts| {
            let layer = Linear::new(&parts, inputs).unwrap();
            let mut out = vec![0.0; rows * layer.outputs()];
            layer.forward(&x, &mut out, Store::Set);
            let mut exact = out.clone();
            layer.forward_f32(&values::<f32>(rows * inputs, 3), &mut exact, Store::Add);
            let activated = Activated::new(Activation::Silu, parts[0], inputs, Some(parts[0])).unwrap();
            let mut gated = vec![E::default(); rows * activated.outputs()];
            activated.forward(&x, &mut gated, None);
            (out, exact, gated)
        });
        assert!(
            results[0] == results[1] && results[0] == results[2],
            "{rows} rows, {outputs} outputs, {inputs} inputs"
        );
    }

    #[test]
    fn quantised_weights_give_the_bits_of_expanded_ones() {
        for (rows, outputs, groups) in [(1, 64, 18), (3, 70, 9), (100, 33, 2), (230, 130, 3)] {
            check_quantised::<bf16>(rows, outputs, groups, 0..16);
            check_quantised::<bf16>(rows, outputs, groups, -128..128);
            check_quantised::<f32>(rows, outputs, groups, -8..8);
        }
    }

    #[test]
    fn many_rows_and_a_long_sum() {
        check::<bf16>(400, 70, 16);
        check::<bf16>(3, 66, 5000);
        check::<f32>(3, 66, 4098);
    }
}
