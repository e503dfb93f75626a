//! What is done with a gradient.

use bytemuck::{Pod, Zeroable};

use super::super::driver::Argument::{Address, Bytes, U64};
use super::super::rows::THREADS;
use super::super::{Buffer, Gpu, Result, View, ViewMut};
use super::blocks;
use crate::Element;
use crate::gradient::AdamW;

/// Numbers whose squares a block sums up; as in `cuda/optimiser.cu`.
const PIECE: usize = 1 << 16;

/// As in `cuda/optimiser.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct KernelAdamW {
    rate: f32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    second: f32,
    scale: f32,
}

impl AdamW {
    /// As [`AdamW::update`], on a GPU. The new weights are rounded to `rounded` too, if that is given, without being read
    /// again.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn update_on<E: Element>(
        &self,
        gpu: &Gpu,
        weights: ViewMut<'_, f32>,
        gradient: View<'_, f32>,
        [mean, square]: [ViewMut<'_, f32>; 2],
        rounded: Option<ViewMut<'_, E>>,
    ) -> Result<()> {
        let len = weights.len;
        let rounded_len = rounded.as_ref().map_or(len, |rounded| rounded.len);
        assert!([gradient.len, mean.len, square.len, rounded_len] == [len; 4], "shapes of a step");
        let [first, second] = self.corrections();
        let how = KernelAdamW {
            rate: self.lr / first,
            keep: 1.0 - self.lr * self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            second,
            scale: self.scale,
        };
        let arguments = [
            Bytes(bytemuck::bytes_of(&how)),
            Address(weights.address),
            Address(gradient.address),
            Address(mean.address),
            Address(square.address),
            Address(rounded.map_or(0, |rounded| rounded.address)),
            U64(len as u64),
        ];
        // SAFETY: as in `cuda/optimiser.cu`.
        unsafe { gpu.launch(&format!("adamw_{}", E::NAME), [blocks(len), 1, 1], THREADS, 0, &arguments) }
    }
}

impl Gpu {
    /// Sum of squares, in f64 over pieces of a fixed length.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for the sums.
    pub fn sum_of_squares(&self, x: View<'_, f32>) -> Result<f64> {
        let count = x.len.div_ceil(PIECE);
        let sums: Buffer<f64> = self.zeros(count)?;
        let mut total: Buffer<f64> = self.zeros(1)?;
        let arguments = [Address(x.address), U64(x.len as u64), Address(sums.all().address)];
        // SAFETY: as in `cuda/optimiser.cu`.
        unsafe { self.launch("squares", [count, 1, 1], THREADS, 0, &arguments)? };
        let arguments = [Address(sums.all().address), U64(count as u64), Address(total.all_mut().address)];
        // SAFETY: as in `cuda/optimiser.cu`.
        unsafe { self.launch("total", [1, 1, 1], THREADS, 0, &arguments)? };
        Ok(total.to_vec()?[0])
    }

    /// `sum += x`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: View<'_, f32>, sum: ViewMut<'_, f32>) -> Result<()> {
        assert_eq!(x.len, sum.len, "lengths of a sum");
        let arguments = [Address(x.address), Address(sum.address), U64(x.len as u64)];
        // SAFETY: as in `cuda/optimiser.cu`.
        unsafe { self.launch("add", [blocks(x.len), 1, 1], THREADS, 0, &arguments) }
    }
}
