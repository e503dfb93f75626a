//! Gradients of a linear layer's weights.

use crate::Element;
use crate::linear::{Linear, Store};
use crate::parallel::{Shared, for_each_piece};

/// Rows and columns of a block that is transposed in the first-level cache.
const BLOCK: usize = 32;
/// Columns whose sums a thread takes at a time.
const COLUMNS: usize = 64;

/// Sums of outer products over rows: the gradient of a linear layer's weights. Holds what is laid out anew for them.
#[derive(Debug)]
pub struct Outer<E> {
    /// `[outputs, rows]`.
    transposed: Vec<E>,
    /// The layer's inputs in panels.
    packed: Linear<E>,
}

impl<E: Element> Default for Outer<E> {
    fn default() -> Self {
        Self { transposed: Vec::new(), packed: Linear::empty() }
    }
}

impl<E: Element> Outer<E> {
    /// Takes what the layer was given, `x[rows, inputs]`.
    ///
    /// # Panics
    /// If the rows are not whole.
    pub fn take(&mut self, x: &[E], inputs: usize) {
        self.packed.fill_transposed(x, inputs);
    }

    /// `weights[outputs, inputs] += dy[rows, outputs]^T . x[rows, inputs]` for the inputs that were taken.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn add(&mut self, dy: &[E], weights: &mut [f32]) {
        let outputs = weights.len() / self.packed.outputs();
        assert_eq!(weights.len(), outputs * self.packed.outputs(), "shapes of an outer product");
        // As in the panels, where the inner loop takes pairs of rows.
        let rows = self.packed.inputs();
        assert_eq!((dy.len() / outputs).next_multiple_of(E::PAIR), rows, "shapes of an outer product");
        self.transposed.resize(outputs * rows, E::default());
        transpose(dy, outputs, rows, &mut self.transposed);
        self.packed.forward(&self.transposed, weights, Store::Add);
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.transposed.capacity() * size_of::<E>() + self.packed.bytes()
    }
}

/// `[rows, columns]` to `[columns, padded]`; what lies behind the rows becomes zero.
fn transpose<E: Element>(x: &[E], columns: usize, padded: usize, out: &mut [E]) {
    let rows = x.len() / columns;
    let shared = Shared::new(out);
    for_each_piece(columns, BLOCK, |piece| {
        // SAFETY: pieces are disjoint.
        let out = unsafe { shared.range(piece.start * padded..piece.end * padded) };
        for first in (0..rows).step_by(BLOCK) {
            let last = rows.min(first + BLOCK);
            for (column, out) in piece.clone().zip(out.chunks_exact_mut(padded)) {
                for (row, out) in (first..last).zip(&mut out[first..last]) {
                    *out = x[row * columns + column];
                }
            }
        }
        out.chunks_exact_mut(padded).for_each(|row| row[rows..].fill(E::default()));
    });
}

/// `sums[columns] += sum over rows of x[rows, columns]`: the gradient of a bias.
///
/// # Panics
/// If the rows are not whole.
pub fn column_sums<E: Element>(x: &[E], sums: &mut [f32]) {
    let columns = sums.len();
    assert!(x.len().is_multiple_of(columns), "rows that are not whole");
    let shared = Shared::new(sums);
    for_each_piece(columns, COLUMNS, |piece| {
        // SAFETY: pieces are disjoint.
        let sums = unsafe { shared.range(piece.clone()) };
        for row in x.chunks_exact(columns) {
            for (sum, x) in sums.iter_mut().zip(&row[piece.clone()]) {
                *sum += x.to_f32();
            }
        }
    });
}

/// Adds `x[rows, width]`, times a factor, to the rows of `sums[_, width]` that `to` names, in the order of `x`: the gradient
/// of an embedding, or of a residual stream from which rows were taken.
///
/// # Panics
/// If the lengths do not fit or there is no such row.
pub fn add_rows(x: &[f32], to: &[u32], factor: f32, sums: &mut [f32], width: usize) {
    assert_eq!(x.len(), to.len() * width, "shapes of rows");
    let sums = Shared::new(sums);
    for_each_piece(width, COLUMNS, |columns| {
        for (row, x) in to.iter().zip(x.chunks_exact(width)) {
            let start = *row as usize * width;
            // SAFETY: pieces differ in their columns.
            let sums = unsafe { sums.range(start + columns.start..start + columns.end) };
            sums.iter_mut().zip(&x[columns.clone()]).for_each(|(sum, x)| *sum += x * factor);
        }
    });
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
        let (dy, x) = (values::<E>(rows * outputs, 1), values::<E>(rows * inputs, 2));
        let mut weights = vec![1.0; outputs * inputs];
        let mut outer = Outer::default();
        // What was there before must not be seen.
        outer.take(&values::<E>((rows + 3) * inputs, 3), inputs);
        outer.add(&values::<E>((rows + 3) * outputs, 3), &mut weights);
        weights.fill(1.0);
        outer.take(&x, inputs);
        outer.add(&dy, &mut weights);
        for o in 0..outputs {
            for i in 0..inputs {
                let terms =
                    (0..rows).map(|r| f64::from(dy[r * outputs + o].to_f32()) * f64::from(x[r * inputs + i].to_f32()));
                let expected = 1.0 + terms.sum::<f64>();
                let found = f64::from(weights[o * inputs + i]);
                assert!(
                    (found - expected).abs() < 1e-4 * (rows as f64).sqrt(),
                    "{rows} {outputs} {inputs}: {found} {expected}"
                );
            }
        }
        let mut sums = vec![1.0; outputs];
        column_sums(&dy, &mut sums);
        for (o, sum) in sums.iter().enumerate() {
            let expected: f32 = 1.0 + (0..rows).map(|r| dy[r * outputs + o].to_f32()).sum::<f32>();
            assert!((sum - expected).abs() < 1e-4 * (rows as f32).sqrt());
        }
    }

    #[test]
    fn rows_are_added_where_they_belong() {
        let x: Vec<f32> = (0..3 * 100).map(|i| i as f32).collect();
        let mut sums = vec![1.0; 4 * 100];
        add_rows(&x, &[2, 0, 2], 0.5, &mut sums, 100);
        assert_eq!([sums[1], sums[100], sums[201]], [1.0 + 101.0 / 2.0, 1.0, 1.0 + (1.0 + 201.0) / 2.0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn matches_the_sum_in_f64(rows in 1usize..150, outputs in 1usize..100, inputs in 1usize..150) {
            check::<f32>(rows, outputs, inputs);
            check::<bf16>(rows, outputs, inputs);
        }
    }
}
