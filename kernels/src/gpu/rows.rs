//! What happens to each row by itself.

use super::driver::Argument::{Address, F32, U32, U64};
use super::{Buffer, Gpu, GpuError, Result, View, ViewMut};
use crate::Element;
use crate::activation::Activation;
use crate::norm;

/// Threads that norms and embeddings take for a row; `THREADS` in `cuda/norm.cu`.
pub(super) const THREADS: usize = 256;
/// Most blocks of what goes over all numbers of a buffer.
pub(super) const MAX_BLOCKS: usize = 1 << 16;

/// A norm over rows, as [`norm::Norm`].
#[derive(Debug)]
pub struct Norm {
    pub(super) weight: Buffer<f32>,
    pub(super) bias: Option<Buffer<f32>>,
    pub(super) eps: f32,
}

impl Norm {
    /// The same norm there.
    ///
    /// # Errors
    /// If there is no memory for it, or its width is no multiple of 4.
    pub fn new(gpu: &Gpu, norm: &norm::Norm) -> Result<Self> {
        check_width(norm.width())?;
        let (weight, bias, eps) = match norm {
            norm::Norm::Rms { weight, eps } => (weight, None, *eps),
            norm::Norm::Layer { weight, bias, eps } => (weight, Some(gpu.upload(bias)?), *eps),
        };
        Ok(Self { weight: gpu.upload(weight)?, bias, eps })
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// Weights, if it is an RMS norm, and its epsilon.
    pub(super) fn rms(&self) -> Option<(&Buffer<f32>, f32)> {
        self.bias.is_none().then_some((&self.weight, self.eps))
    }

    /// `out = norm(x)` for every row; of `x[_, width]` those rows that `rows` names, or all.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward<E: Element>(
        &self,
        gpu: &Gpu,
        x: View<'_, f32>,
        rows: Option<View<'_, u32>>,
        out: ViewMut<'_, E>,
    ) -> Result<()> {
        self.run(gpu, E::NAME, x, rows, out)
    }

    /// `sum += norm(x)` for every row.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn add_to(&self, gpu: &Gpu, x: View<'_, f32>, sum: ViewMut<'_, f32>) -> Result<()> {
        self.run(gpu, "add", x, None, sum)
    }

    fn run<T>(
        &self,
        gpu: &Gpu,
        how: &str,
        x: View<'_, f32>,
        rows: Option<View<'_, u32>>,
        out: ViewMut<'_, T>,
    ) -> Result<()> {
        let width = self.width();
        let count = out.len / width;
        assert!(out.len == count * width && x.len.is_multiple_of(width), "shapes of a norm");
        assert!(rows.map_or(x.len == out.len, |rows| rows.len == count), "rows of a norm");
        let start =
            [Address(x.address), Address(rows.map_or(0, |rows| rows.address)), Address(self.weight.all().address)];
        let end = [F32(self.eps), Address(out.address), U32(width as u32)];
        let bias = self.bias.as_ref().map(|bias| Address(bias.all().address));
        let arguments: Vec<_> = start.into_iter().chain(bias).chain(end).collect();
        let kernel = if bias.is_some() { "layer_norm" } else { "rms_norm" };
        // SAFETY: as in `cuda/norm.cu`. Whoever names rows names rows of x.
        unsafe { gpu.launch(&format!("{kernel}_{how}"), [count, 1, 1], THREADS, 0, &arguments) }
    }
}

impl Gpu {
    /// `x[i] = table[ids[i]] * scale`, both of this width.
    ///
    /// # Errors
    /// If the GPU refuses, or the width is no multiple of 4.
    ///
    /// # Panics
    /// If shapes do not fit. That ids are in the table is for the caller to see to.
    pub fn embed<E: Element>(
        &self,
        table: View<'_, E>,
        ids: View<'_, u32>,
        scale: f32,
        width: usize,
        x: ViewMut<'_, f32>,
    ) -> Result<()> {
        check_width(width)?;
        assert!(x.len == ids.len * width && table.len.is_multiple_of(width), "shapes of an embedding");
        let arguments =
            [Address(table.address), Address(ids.address), F32(scale), Address(x.address), U32(width as u32)];
        // SAFETY: as in `cuda/embedding.cu`.
        unsafe { self.launch(&format!("embed_{}", E::NAME), [ids.len, 1, 1], THREADS, 0, &arguments) }
    }

    /// `out[rows, width] = activation(x[rows, width])`; where `gated`, `x[rows, 2 * width]` is gate and up beside one
    /// another, and `out = activation(gate) * up`.
    ///
    /// # Errors
    /// If the GPU refuses, or the width is no multiple of 4.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn activate<E: Element>(
        &self,
        activation: Activation,
        gated: bool,
        x: View<'_, E>,
        width: usize,
        out: ViewMut<'_, E>,
    ) -> Result<()> {
        check_width(width)?;
        assert!(out.len.is_multiple_of(width), "shapes of an activation");
        assert_eq!(x.len, if gated { 2 * out.len } else { out.len }, "shapes of an activation");
        let kernel = format!("{}{}_{}", if gated { "gated_" } else { "" }, activation.name(), E::NAME);
        let arguments = [Address(x.address), Address(out.address), U32(width as u32), U64(out.len as u64)];
        let blocks = (out.len / 4).div_ceil(THREADS).min(MAX_BLOCKS);
        // SAFETY: as in `cuda/activation.cu`.
        unsafe { self.launch(&kernel, [blocks, 1, 1], THREADS, 0, &arguments) }
    }

    /// `x = cap * tanh(x / cap)`.
    ///
    /// # Errors
    /// If the GPU refuses.
    pub fn soft_cap(&self, x: ViewMut<'_, f32>, cap: f32) -> Result<()> {
        let arguments = [Address(x.address), F32(cap), U64(x.len as u64)];
        let blocks = x.len.div_ceil(THREADS).min(MAX_BLOCKS);
        // SAFETY: as in `cuda/head.cu`.
        unsafe { self.launch("soft_cap", [blocks, 1, 1], THREADS, 0, &arguments) }
    }
}

pub(super) fn check_width(width: usize) -> Result<()> {
    match width.is_multiple_of(4) && width > 0 {
        true => Ok(()),
        false => Err(GpuError::Failed(format!("rows of {width} numbers: the kernels take multiples of 4"))),
    }
}
