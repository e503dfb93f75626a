//! Gradients of what happens to each row by itself, and sums over rows.

use super::super::driver::Argument::{self, Address, F32, U32, U64};
use super::super::rows::{MAX_BLOCKS, Norm, THREADS, check_width};
use super::super::{Buffer, Gpu, Result, View, ViewMut};
use super::Columns;
use crate::Element;
use crate::activation::Activation;

/// Rows that a part of a sum goes over; `ROWS` in `cuda/sums.cu` and `cuda/norm_backward.cu`.
const ROWS: usize = 64;
/// Threads of [`Gpu::add_rows`], four columns each.
const ADDING: usize = 128;

impl Norm {
    /// Given rows `x[rows, width]` and the gradients `dy` of their norms, adds the gradients of the rows to `dx`, and those
    /// of the weights, then of the biases where there are some, to `d_weights`. `parts` is room that may grow.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for the parts.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn backward(
        &self,
        gpu: &Gpu,
        x: View<'_, f32>,
        dy: View<'_, f32>,
        dx: ViewMut<'_, f32>,
        d_weights: ViewMut<'_, f32>,
        parts: &mut Buffer<f32>,
    ) -> Result<()> {
        let width = self.width();
        let (rows, weights) = (x.len / width, self.weights());
        assert!(x.len == rows * width && dy.len == x.len && dx.len == x.len, "shapes of a norm");
        assert_eq!(d_weights.len, weights, "weights of a norm");
        let (count, stats) = (rows.div_ceil(ROWS), 2 * rows);
        parts.grow(stats + count * weights)?;
        let sums = Address(parts.view(stats..stats + count * weights).address);
        let stats = Address(parts.view(0..stats).address);
        let name = if self.bias.is_some() { "layer_norm" } else { "rms_norm" };
        let arguments = [
            Address(x.address),
            Address(self.weight.all().address),
            F32(self.eps),
            Address(dy.address),
            Address(dx.address),
            stats,
            U32(width as u32),
        ];
        // SAFETY: as in `cuda/norm_backward.cu`.
        unsafe { gpu.launch(&format!("{name}_backward"), [rows, 1, 1], THREADS, 0, &arguments)? };
        let arguments = [Address(x.address), Address(dy.address), stats, U32(rows as u32), U32(width as u32), sums];
        let grid = [width.div_ceil(THREADS), count, 1];
        // SAFETY: as in `cuda/norm_backward.cu`.
        unsafe { gpu.launch(&format!("{name}_weights"), grid, THREADS, 0, &arguments)? };
        gpu.add_parts(sums, count, d_weights)
    }

    /// Numbers in the gradient of its weights: those of the weight, then those of the bias where there is one.
    pub fn weights(&self) -> usize {
        self.weight.len() + self.bias.as_ref().map_or(0, Buffer::len)
    }

    /// Takes new weights, and biases behind them where there are some; `offset` is added to the weights.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If there are more or fewer.
    pub fn set(&mut self, gpu: &Gpu, values: View<'_, f32>, offset: f32) -> Result<()> {
        assert_eq!(values.len, self.weights(), "weights of a norm");
        let (width, all) = (self.width(), values.len);
        let (weight, bias) = (values.part(0..width), values.part(width..all));
        gpu.fill(self.weight.all_mut(), offset)?;
        gpu.add(weight, self.weight.all_mut())?;
        self.bias.as_mut().map_or(Ok(()), |to| gpu.copy(bias, to.all_mut()))
    }
}

/// To which rows of a sum rows are added.
#[derive(Debug)]
pub struct Scatter {
    rows: usize,
    /// Rows of the sum, and where their list begins in `order`, and ends.
    count: usize,
    ids: Buffer<u32>,
    starts: Buffer<u32>,
    /// Rows that are added, those of the first id first.
    order: Buffer<u32>,
    /// The largest id.
    last: u32,
}

impl Scatter {
    /// Of no rows.
    pub fn new(gpu: &Gpu) -> Self {
        Self { rows: 0, count: 0, ids: gpu.empty(), starts: gpu.empty(), order: gpu.empty(), last: 0 }
    }

    /// Row `i` is added to row `to[i]`, and to each of these in the order of `i`.
    ///
    /// # Errors
    /// If there is no memory for the lists.
    pub fn set(&mut self, to: &[u32]) -> Result<()> {
        let mut order: Vec<u32> = (0..to.len() as u32).collect();
        order.sort_by_key(|row| to[*row as usize]);
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        for (i, row) in order.iter().enumerate() {
            let id = to[*row as usize];
            if ids.last() != Some(&id) {
                ids.push(id);
                starts.push(i as u32);
            }
        }
        starts.push(order.len() as u32);
        (self.rows, self.count, self.last) = (to.len(), ids.len(), ids.last().copied().unwrap_or(0));
        for (list, values) in [(&mut self.ids, ids), (&mut self.starts, starts), (&mut self.order, order)] {
            list.grow(values.len())?;
            list.write(0, &values)?;
        }
        Ok(())
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.ids.bytes() + self.starts.bytes() + self.order.bytes()
    }
}

impl Gpu {
    /// Takes `act(gate) * up`, or `act(up)` without a gate, apart: `inner[rows, width]` becomes that value, `x`, which
    /// held what was activated as [`Gpu::activate`] takes it, the gradient of that, given the gradient `d` of the value.
    ///
    /// # Errors
    /// If the GPU refuses, or the width is no multiple of 4.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn activate_backward<E: Element>(
        &self,
        activation: Activation,
        gated: bool,
        x: ViewMut<'_, E>,
        width: usize,
        d: View<'_, f32>,
        inner: ViewMut<'_, E>,
    ) -> Result<()> {
        check_width(width)?;
        assert!(d.len.is_multiple_of(width) && inner.len == d.len, "shapes of an activation");
        assert_eq!(x.len, if gated { 2 * d.len } else { d.len }, "shapes of an activation");
        let kernel = format!("{}{}_backward_{}", if gated { "gated_" } else { "" }, activation.name(), E::NAME);
        let arguments =
            [Address(x.address), Address(d.address), Address(inner.address), U32(width as u32), U64(d.len as u64)];
        let blocks = (d.len / 4).div_ceil(THREADS).min(MAX_BLOCKS);
        // SAFETY: as in `cuda/activation_backward.cu`.
        unsafe { self.launch(&kernel, [blocks, 1, 1], THREADS, 0, &arguments) }
    }

    /// `sums[columns] += sum over rows of x[rows, columns]`: the gradient of a bias. `parts` is room that may grow.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for the parts.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn column_sums<E: Element>(
        &self,
        x: Columns<'_, E>,
        sums: ViewMut<'_, f32>,
        parts: &mut Buffer<f32>,
    ) -> Result<()> {
        let (rows, columns) = (x.rows(), x.count());
        assert_eq!(sums.len, columns, "shapes of a sum");
        let count = rows.div_ceil(ROWS);
        parts.grow(count * columns)?;
        let part = Address(parts.view(0..count * columns).address);
        let arguments = [Address(x.address()), U32(rows as u32), U64(x.stride() as u64), U32(columns as u32), part];
        let grid = [columns.div_ceil(THREADS), count, 1];
        // SAFETY: as in `cuda/sums.cu`.
        unsafe { self.launch(&format!("column_sums_{}", E::NAME), grid, THREADS, 0, &arguments)? };
        self.add_parts(part, count, sums)
    }

    /// Adds the parts `[count, columns]` to `sums[columns]`.
    pub(in super::super) fn add_parts(&self, parts: Argument<'_>, count: usize, sums: ViewMut<'_, f32>) -> Result<()> {
        let arguments = [parts, U32(count as u32), U32(sums.len as u32), Address(sums.address)];
        // SAFETY: as in `cuda/sums.cu`; so many parts are there.
        unsafe { self.launch("add_parts", [sums.len.div_ceil(THREADS), 1, 1], THREADS, 0, &arguments) }
    }

    /// Adds `x[rows, width]`, times a factor, to the rows of `sums[_, width]` that `to` names: the gradient of an
    /// embedding, or of a residual stream from which rows were taken.
    ///
    /// # Errors
    /// If the GPU refuses, or the width is no multiple of 4.
    ///
    /// # Panics
    /// If shapes do not fit or there is no such row.
    pub fn add_rows(
        &self,
        x: View<'_, f32>,
        to: &Scatter,
        factor: f32,
        sums: ViewMut<'_, f32>,
        width: usize,
    ) -> Result<()> {
        check_width(width)?;
        assert_eq!(x.len, to.rows * width, "shapes of rows");
        assert!(to.rows == 0 || (to.last as usize) < sums.len / width, "no such row");
        let arguments = [
            Address(x.address),
            Address(to.ids.all().address),
            Address(to.starts.all().address),
            Address(to.order.all().address),
            F32(factor),
            Address(sums.address),
            U32(width as u32),
        ];
        // SAFETY: as in `cuda/sums.cu`; the ids are rows of the sum, and the order is one of the rows.
        unsafe { self.launch("add_rows", [to.count, width.div_ceil(4 * ADDING), 1], ADDING, 0, &arguments) }
    }
}
