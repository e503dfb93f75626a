//! Linear layers over weights that are packed once at load.

use std::ops::Range;

use crate::activation::Activation;
use crate::element::Element;
use crate::gemm::{LANES, Tile};
use crate::memory::Buffer;
use crate::parallel::{Rows, Shared, for_each_piece};

/// Outputs that a packed panel holds: four vectors, so that six rows fill the registers.
pub(crate) const PANEL: usize = 4 * LANES;
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

/// A linear layer `y = W x + b` whose weights `[outputs, inputs]` are stored as panels of 64 outputs.
///
/// The last panel is filled up with zeros. No second copy of the weights is kept: [`Linear::row`] reads one back.
#[derive(Debug)]
pub struct Linear<E> {
    outputs: usize,
    inputs: usize,
    /// `[panel][input / PAIR][PANEL][PAIR]`.
    packed: Buffer<E>,
    bias: Option<Vec<f32>>,
}

/// Packs rows one after the other, so that several matrices can become one layer without being joined first.
#[derive(Debug)]
pub struct LinearBuilder<E> {
    linear: Linear<E>,
    next_row: usize,
}

impl<E: Element> LinearBuilder<E> {
    /// A layer of `outputs` by `inputs`, to be filled with [`LinearBuilder::rows`].
    ///
    /// # Panics
    /// If `inputs` is odd and the element is bf16.
    pub fn new(outputs: usize, inputs: usize) -> Self {
        assert!(inputs.is_multiple_of(E::PAIR), "an odd number of inputs: {inputs}");
        let packed = Buffer::zeros(outputs.div_ceil(PANEL) * PANEL * inputs);
        Self { linear: Linear { outputs, inputs, packed, bias: None }, next_row: 0 }
    }

    /// Appends output rows, `[rows, inputs]`.
    ///
    /// # Panics
    /// If they are not whole rows or too many.
    pub fn rows(mut self, rows: &[E]) -> Self {
        let Linear { outputs, inputs, packed, .. } = &mut self.linear;
        assert!(rows.len().is_multiple_of(*inputs) && self.next_row + rows.len() / *inputs <= *outputs);
        for row in rows.chunks_exact(*inputs) {
            let (panel, column) = (self.next_row / PANEL, self.next_row % PANEL);
            let panel = &mut packed[panel * PANEL * *inputs..(panel + 1) * PANEL * *inputs];
            for (step, values) in row.chunks_exact(E::PAIR).enumerate() {
                let at = (step * PANEL + column) * E::PAIR;
                panel[at..at + E::PAIR].copy_from_slice(values);
            }
            self.next_row += 1;
        }
        self
    }

    /// The layer.
    ///
    /// # Panics
    /// If rows are missing or the bias has another length than there are outputs.
    pub fn finish(mut self, bias: Option<Vec<f32>>) -> Linear<E> {
        assert_eq!(self.next_row, self.linear.outputs, "rows are missing");
        assert!(bias.as_ref().is_none_or(|b| b.len() == self.linear.outputs), "a bias of the wrong length");
        self.linear.bias = bias;
        self.linear
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
        size_of_val(&*self.packed) + self.bias.as_ref().map_or(0, |b| b.len() * 4)
    }

    /// Weights of one output, in f32: an embedding row where the layer is a tied language head.
    ///
    /// # Panics
    /// If there is no such output or `out` is not `[inputs]`.
    pub fn row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs && out.len() == self.inputs);
        let panel = &self.packed[output / PANEL * PANEL * self.inputs..];
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
                    self.strip(whole, x, rows.len(), &mut Rows::new(&mut scratch, PANEL), Store::Set, kernel);
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
        out: &mut Rows<'_, f32>,
        store: Store,
        kernel: fn(Tile<'_, A, E>),
    ) {
        let weights = &self.packed[columns.start / PANEL * PANEL * self.inputs..];
        let mut done = 0;
        while done < self.inputs {
            let k = (self.inputs - done).min(SUM_BLOCK);
            kernel(Tile {
                a: &x[done..],
                lda: self.inputs,
                rows,
                b: &weights[done * PANEL + columns.start % PANEL * E::PAIR..],
                ldb: PANEL * E::PAIR,
                cols: columns.len(),
                k,
                c: out.reborrow(),
                accumulate: done > 0 || store == Store::Add,
            });
            done += k;
        }
        if let Some(bias) = &self.bias {
            let bias = &bias[columns.start..columns.end.min(self.outputs)];
            for row in 0..rows {
                out.row(row, 0..bias.len()).iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
    }
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
        let panel = (start < end).then(|| start..end);
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

impl<E: Element> Activated<E> {
    /// A layer of the rows `[outputs, inputs]`, with their biases.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn new(activation: Activation, rows: Matrix<'_, E>, inputs: usize, gate: Option<Matrix<'_, E>>) -> Self {
        let outputs = rows.weights.len() / inputs;
        let padded = outputs.next_multiple_of(PANEL);
        let parts = || gate.iter().chain([&rows]);
        let padding = vec![E::default(); (padded - outputs) * inputs];
        let mut builder = LinearBuilder::new(parts().count() * padded, inputs);
        for part in parts() {
            builder = builder.rows(part.weights).rows(&padding);
        }
        let bias = rows.bias.map(|_| {
            let padding = vec![0.0; padded - outputs];
            parts().flat_map(|part| part.bias.into_iter().flatten().chain(&padding)).copied().collect()
        });
        Self { linear: builder.finish(bias), activation, outputs, gated: gate.is_some() }
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes that the layer takes.
    pub fn bytes(&self) -> usize {
        self.linear.bytes()
    }

    /// `out[rows, outputs]` from `x[rows, inputs]`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn forward(&self, x: &[E], out: &mut [E]) {
        let inputs = self.linear.inputs;
        let rows = x.len() / inputs;
        assert_eq!((x.len(), out.len()), (rows * inputs, rows * self.outputs), "shapes of a linear layer");
        let shared = Shared::new(out);
        for_each_block(rows, self.outputs, |rows, columns| {
            for columns in panels(columns) {
                // SAFETY: blocks differ in their rows or their columns.
                let mut out = unsafe { shared.rows(rows.start * self.outputs + columns.start, self.outputs) };
                for first in (0..rows.len()).step_by(ACTIVATED_ROWS) {
                    let len = ACTIVATED_ROWS.min(rows.len() - first);
                    let x = &x[(rows.start + first) * inputs..(rows.start + first + len) * inputs];
                    let mut scratch = [[0.0; ACTIVATED_ROWS * PANEL]; 2];
                    let [gate, up] = &mut scratch;
                    let compute = |first: usize, sums: &mut [f32]| {
                        let columns = first + columns.start..first + columns.end.next_multiple_of(LANES);
                        self.linear.strip(columns, x, len, &mut Rows::new(sums, PANEL), Store::Set, E::gemm_tile);
                    };
                    compute(0, gate);
                    if self.gated {
                        compute(self.outputs.next_multiple_of(PANEL), up);
                    }
                    for (row, (gate, up)) in gate.chunks_exact(PANEL).zip(up.chunks_exact(PANEL)).take(len).enumerate()
                    {
                        let out = out.row(first + row, 0..columns.len());
                        if self.gated {
                            self.activation.gated(gate, up, out);
                        } else {
                            self.activation.plain(gate, out);
                        }
                    }
                }
            }
        });
    }
}

/// Rows of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, E> {
    /// `[outputs, inputs]`.
    pub weights: &'a [E],
    /// `[outputs]`.
    pub bias: Option<&'a [f32]>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    fn values<E: Element>(n: usize, seed: usize) -> Vec<E> {
        (0..n).map(|i| E::from_f32((((i + seed) * 7919) % 1009) as f32 / 504.0 - 1.0)).collect()
    }

    fn check<E: Element>(rows: usize, outputs: usize, inputs: usize) {
        let weights = values::<E>(outputs * inputs, 1);
        let bias: Vec<f32> = values::<f32>(outputs, 5);
        let split = outputs / 3 * inputs;
        let layer = LinearBuilder::new(outputs, inputs)
            .rows(&weights[..split])
            .rows(&weights[split..])
            .finish(Some(bias.clone()));
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

    #[test]
    fn many_rows_and_a_long_sum() {
        check::<bf16>(400, 70, 16);
        check::<bf16>(3, 66, 5000);
        check::<f32>(3, 66, 4098);
    }
}
