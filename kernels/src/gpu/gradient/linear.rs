//! Gradients of linear layers.

use super::super::driver::{Number, Order, Product};
use super::super::linear::number;
use super::super::{Gpu, Linear, Output, Result, View, ViewMut};
use crate::Element;

/// Some columns of rows.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a, E> {
    x: View<'a, E>,
    stride: usize,
    first: usize,
    count: usize,
}

impl<'a, E: Element> Columns<'a, E> {
    /// `x[rows, count]`.
    ///
    /// # Panics
    /// If the rows are not whole.
    pub fn all(x: View<'a, E>, count: usize) -> Self {
        Self::part(x, count, 0, count)
    }

    /// The columns from `first` on of `x[rows, stride]`.
    ///
    /// # Panics
    /// If the rows are not whole, or have fewer columns.
    pub fn part(x: View<'a, E>, stride: usize, first: usize, count: usize) -> Self {
        assert!(x.len.is_multiple_of(stride) && first + count <= stride, "columns of rows");
        Self { x, stride, first, count }
    }

    pub(super) fn rows(&self) -> usize {
        self.x.len / self.stride
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn address(&self) -> u64 {
        self.x.address + (self.first * size_of::<E>()) as u64
    }
}

impl<E: Output<E>> Linear<E>
where
    f32: Output<E>,
{
    /// From the gradient `dy[rows, outputs]` of what it answered that of what it was given, into `dx[rows, inputs]`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn backward(&self, gpu: &Gpu, dy: View<'_, E>, dx: ViewMut<'_, f32>) -> Result<()> {
        self.part_backward(gpu, 0, self.outputs(), dy, dx, false)
    }

    /// The same of the outputs from `first` on; the result is added to `dx` if that is wanted.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn part_backward(
        &self,
        gpu: &Gpu,
        first: usize,
        count: usize,
        dy: View<'_, E>,
        dx: ViewMut<'_, f32>,
        add: bool,
    ) -> Result<()> {
        let (rows, inputs) = (dx.len / self.inputs(), self.inputs());
        assert_eq!((dy.len, dx.len), (rows * count, rows * inputs), "shapes of a linear layer");
        let weights = self.plain()?.view(first * inputs..(first + count) * inputs);
        if rows == 0 || count == 0 {
            return Ok(());
        }
        let product = Product {
            w: weights.address,
            x: dy.address,
            y: dx.address,
            w_is: Order::Transposed,
            add,
            invariant: gpu.is_invariant(),
            ..Product::new(number::<E>(), Number::F32, [rows, count, inputs])
        };
        // SAFETY: the shapes are those of the buffers.
        unsafe { gpu.driver.multiply(&product) }
    }

    /// The weights of so many outputs from `first` on, `[count, inputs]`, to be replaced.
    ///
    /// # Errors
    /// If they are held another way than one number of the type each.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn weights_mut(&mut self, first: usize, count: usize) -> Result<ViewMut<'_, E>> {
        let inputs = self.inputs();
        Ok(self.plain_mut()?.view_mut(first * inputs..(first + count) * inputs))
    }

    /// Takes new biases for the outputs from `first` on.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If it has none, or fewer.
    pub fn set_bias(&mut self, gpu: &Gpu, first: usize, values: View<'_, f32>) -> Result<()> {
        assert!(self.bias.is_some(), "a layer without biases");
        let Some(bias) = &mut self.bias else { return Ok(()) };
        let range = first..first + values.len;
        gpu.copy(values, bias.wide.view_mut(range.clone()))?;
        gpu.round(values, bias.narrow.view_mut(range))
    }
}

impl Gpu {
    /// `sums[outputs, inputs] += dy[rows, outputs]^T x[rows, inputs]`: the gradient of a linear layer's weights.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn add_outer<E: Element>(
        &self,
        x: View<'_, E>,
        inputs: usize,
        dy: Columns<'_, E>,
        sums: ViewMut<'_, f32>,
    ) -> Result<()> {
        let (rows, outputs) = (dy.rows(), dy.count());
        assert_eq!((x.len, sums.len), (rows * inputs, outputs * inputs), "shapes of an outer product");
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let product = Product {
            w: x.address,
            x: dy.address(),
            y: sums.address,
            x_is: Order::Transposed,
            x_stride: dy.stride(),
            w_is: Order::Transposed,
            add: true,
            ..Product::new(number::<E>(), Number::F32, [outputs, rows, inputs])
        };
        // SAFETY: the shapes are those of the buffers.
        unsafe { self.driver.multiply(&product) }
    }
}
