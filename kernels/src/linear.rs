//! Linear layers over weights that are packed once at load.

use crate::element::Element;
use crate::gemm::{LANES, Tile};
use crate::parallel::{Shared, for_each_piece};

/// Outputs that a packed panel holds: four vectors, so that six rows fill the registers.
pub(crate) const PANEL: usize = 4 * LANES;
/// Rows of the input that stay in the second-level cache while the weights stream by.
const ROW_BLOCK: usize = 192;
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
    packed: Vec<E>,
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
        let packed = vec![E::default(); outputs.div_ceil(PANEL) * PANEL * inputs];
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
        std::mem::size_of_val(self.packed.as_slice()) + self.bias.as_ref().map_or(0, |b| b.len() * 4)
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
        let panels = self.outputs.div_ceil(PANEL);
        // With few rows there is nothing to share between panels, and every panel is a piece of its own.
        let panels_a_piece = if rows <= ROW_BLOCK { 2 } else { 8 };
        let pieces_a_block = panels.div_ceil(panels_a_piece);
        let shared = Shared::new(out);
        for_each_piece(rows.div_ceil(ROW_BLOCK) * pieces_a_block, 1, |piece| {
            let (block, first) = (piece.start / pieces_a_block, piece.start % pieces_a_block * panels_a_piece);
            let block = block * ROW_BLOCK..((block + 1) * ROW_BLOCK).min(rows);
            let x = &x[block.start * self.inputs..block.end * self.inputs];
            let mut scratch = [0.0; ROW_BLOCK * PANEL];
            for panel in first..(first + panels_a_piece).min(panels) {
                let sums = &mut scratch[..block.len() * PANEL];
                self.panel(panel, x, sums, kernel);
                let columns = panel * PANEL..((panel + 1) * PANEL).min(self.outputs);
                for (r, sums) in block.clone().zip(sums.chunks_exact(PANEL)) {
                    // SAFETY: pieces differ in their rows or their columns.
                    let out = unsafe { shared.range(r * self.outputs + columns.start..r * self.outputs + columns.end) };
                    self.store(columns.start, sums, out, store);
                }
            }
        });
    }

    /// `sums[rows, PANEL]` of one panel, without bias.
    pub(crate) fn panel<A>(&self, panel: usize, x: &[A], sums: &mut [f32], kernel: fn(Tile<'_, A, E>)) {
        let rows = sums.len() / PANEL;
        let weights = &self.packed[panel * PANEL * self.inputs..(panel + 1) * PANEL * self.inputs];
        let mut done = 0;
        while done < self.inputs {
            let k = (self.inputs - done).min(SUM_BLOCK);
            kernel(Tile {
                a: &x[done..],
                lda: self.inputs,
                rows,
                b: &weights[done * PANEL..],
                ldb: PANEL * E::PAIR,
                cols: PANEL,
                k,
                c: sums,
                ldc: PANEL,
                accumulate: done > 0,
            });
            done += k;
        }
    }

    fn store(&self, first: usize, sums: &[f32], out: &mut [f32], store: Store) {
        let bias = self.bias.as_ref().map(|bias| &bias[first..first + out.len()]);
        for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
            let y = sum + bias.map_or(0.0, |bias| bias[i]);
            *out = if store == Store::Add { *out + y } else { y };
        }
    }
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
