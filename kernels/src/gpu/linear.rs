//! Linear layers.

use half::bf16;

use super::driver::{Number, Product};
use super::{Buffer, Gpu, Result, View, ViewMut};
use crate::Element;

/// A linear layer `y = W x + b`, its weights `[outputs, inputs]` in row order.
#[derive(Debug)]
pub struct Linear<E> {
    weights: Buffer<E>,
    bias: Option<Bias<E>>,
    inputs: usize,
    outputs: usize,
}

/// As cuBLASLt wants it: in the type of the result.
#[derive(Debug)]
struct Bias<E> {
    wide: Buffer<f32>,
    narrow: Buffer<E>,
}

impl<E: Element> Bias<E> {
    fn new(gpu: &Gpu, values: &[f32]) -> Result<Self> {
        let narrow: Vec<E> = values.iter().map(|value| E::from_f32(*value)).collect();
        Ok(Self { wide: gpu.upload(values)?, narrow: gpu.upload(&narrow)? })
    }

    /// Where that of the outputs from `first` on is, for results of this type.
    fn address<O: Element>(&self, first: usize, count: usize) -> u64 {
        match number::<O>() {
            Number::F32 => self.wide.view(first..first + count).address,
            Number::Bf16 => self.narrow.view(first..first + count).address,
        }
    }
}

/// Types that a layer's result may have: f32, or that of its weights.
pub trait Output<E>: Element {}

impl Output<f32> for f32 {}
impl Output<bf16> for f32 {}
impl Output<bf16> for bf16 {}

fn number<T: Element>() -> Number {
    if size_of::<T>() == size_of::<f32>() { Number::F32 } else { Number::Bf16 }
}

impl<E: Element> Linear<E> {
    /// A layer of these rows, each of so many inputs, and with a bias for each row or none.
    ///
    /// # Errors
    /// If there is no memory for it.
    ///
    /// # Panics
    /// If rows are not whole, or the bias has another length.
    pub fn new(gpu: &Gpu, rows: &[E], bias: Option<&[f32]>, inputs: usize) -> Result<Self> {
        let outputs = rows.len() / inputs;
        assert_eq!(rows.len(), outputs * inputs, "rows of a linear layer");
        assert!(bias.is_none_or(|bias| bias.len() == outputs), "a bias of the wrong length");
        let bias = bias.map(|bias| Bias::new(gpu, bias)).transpose()?;
        Ok(Self { weights: gpu.upload(rows)?, bias, inputs, outputs })
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.bias.as_ref().map_or(0, |bias| bias.wide.bytes() + bias.narrow.bytes())
    }

    /// The weights `[outputs, inputs]`: an embedding, where the layer is a tied language head.
    pub fn weights(&self) -> View<'_, E> {
        self.weights.all()
    }

    /// `y[rows, outputs]` from `x[rows, inputs]`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward<O: Output<E>>(&self, gpu: &Gpu, x: View<'_, E>, y: ViewMut<'_, O>) -> Result<()> {
        self.part(gpu, 0, self.outputs, x, y)
    }

    /// `y[rows, count]`: the outputs from `first` on.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn part<O: Output<E>>(
        &self,
        gpu: &Gpu,
        first: usize,
        count: usize,
        x: View<'_, E>,
        y: ViewMut<'_, O>,
    ) -> Result<()> {
        self.multiply(gpu, first, count, x, y, false)
    }

    /// `y[rows, outputs] += W x + b`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn add_to(&self, gpu: &Gpu, x: View<'_, E>, y: ViewMut<'_, f32>) -> Result<()>
    where
        f32: Output<E>,
    {
        self.multiply(gpu, 0, self.outputs, x, y, true)
    }

    fn multiply<O: Output<E>>(
        &self,
        gpu: &Gpu,
        first: usize,
        count: usize,
        x: View<'_, E>,
        y: ViewMut<'_, O>,
        add: bool,
    ) -> Result<()> {
        let rows = x.len / self.inputs;
        assert_eq!((x.len, y.len), (rows * self.inputs, rows * count), "shapes of a linear layer");
        let weights = self.weights.view(first * self.inputs..(first + count) * self.inputs);
        if rows == 0 || count == 0 {
            return Ok(());
        }
        let product = Product {
            inputs_are: number::<E>(),
            outputs_are: number::<O>(),
            w: weights.address,
            x: x.address,
            y: y.address,
            bias: self.bias.as_ref().map_or(0, |bias| bias.address::<O>(first, count)),
            rows,
            inputs: self.inputs,
            outputs: count,
            add,
            invariant: gpu.is_invariant(),
        };
        // SAFETY: the shapes are those of the buffers, and only f32 is added to.
        unsafe { gpu.0.multiply(&product) }
    }
}
