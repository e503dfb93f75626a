//! Linear layers.

use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::driver::{Number, Product};
use super::fp8::{self, Fp8};
use super::quantised::{self, Quantised};
use super::{Buffer, Gpu, GpuError, Result, View, ViewMut};
use crate::Element;
use crate::fp8::Fp8Rows;
use crate::linear::{Held, Matrix, Rows};
use crate::quantised::QuantRows;

/// A linear layer `y = W x + b`.
#[derive(Debug)]
pub struct Linear<E> {
    /// On top of one another.
    pieces: Vec<Piece<E>>,
    pub(super) bias: Option<Bias<E>>,
    inputs: usize,
    outputs: usize,
}

/// Outputs in a row that are held alike.
#[derive(Debug)]
enum Piece<E> {
    /// `[outputs, inputs]` in row order.
    Plain(Buffer<E>),
    Quantised(Quantised, Room),
    Fp8(Fp8, Room),
}

/// Where products of matrices that are not as cuBLASLt wants them are made ready, one after the other: all layers of a
/// model share one, which is as large as the neediest of them wants.
#[derive(Clone, Debug)]
pub struct Room(Arc<Mutex<Buffer<u8>>>);

impl Room {
    /// Takes no memory yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self(Arc::new(Mutex::new(gpu.empty())))
    }

    /// Where so many bytes are, which nobody else uses meanwhile.
    fn with<R>(&self, bytes: usize, f: impl FnOnce(u64) -> Result<R>) -> Result<R> {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.grow(bytes)?;
        f(buffer.all().address)
    }
}

/// As cuBLASLt wants it: in the type of the result.
#[derive(Debug)]
pub(super) struct Bias<E> {
    pub(super) wide: Buffer<f32>,
    pub(super) narrow: Buffer<E>,
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
            _ => self.narrow.view(first..first + count).address,
        }
    }
}

/// Types that a layer's result may have: f32, or that of its weights.
pub trait Output<E>: Element {}

impl Output<f32> for f32 {}
impl Output<bf16> for f32 {}
impl Output<bf16> for bf16 {}

pub(super) fn number<T: Element>() -> Number {
    if size_of::<T>() == size_of::<f32>() { Number::F32 } else { Number::Bf16 }
}

/// Whether layers of this type are multiplied as e4m3 where they are so in the checkpoint; others have them expanded.
fn in_fp8<E: Element>(held: Held) -> bool {
    held == Held::Fp8 && number::<E>() == Number::Bf16
}

/// Bytes that matrices on top of one another take, each of so many outputs, and those of the [`Room`] that they take.
pub fn stacked_bytes<E: Element>(parts: &[(usize, Held)], inputs: usize) -> [usize; 2] {
    let runs = parts.chunk_by(|a, b| a.1 == b.1).map(|run| (run.iter().map(|part| part.0).sum::<usize>(), run[0].1));
    runs.fold([0; 2], |[bytes, room], (outputs, held)| {
        let [more, needed] = match held {
            Held::Quantised(described) => {
                [quantised::bytes(described, outputs, inputs), quantised::room_bytes::<E>(outputs, inputs)]
            }
            Held::Fp8 if in_fp8::<E>(held) => [fp8::bytes(outputs, inputs), fp8::room_bytes(outputs, inputs)],
            Held::Plain | Held::Fp8 => [outputs * inputs * size_of::<E>(), 0],
        };
        [bytes + more, room.max(needed)]
    })
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
        Self::stacked(gpu, &[Matrix { weights: Rows::Plain(rows), bias }], inputs, &Room::new(gpu))
    }

    /// Matrices of so many inputs on top of one another. What is quantised stays so; a bias that is missing where others
    /// have one is 0.
    ///
    /// # Errors
    /// If there is no memory for it, or the GPU does not multiply such matrices.
    ///
    /// # Panics
    /// If rows are not whole, or a bias has another length.
    pub fn stacked(gpu: &Gpu, parts: &[Matrix<'_, E>], inputs: usize, room: &Room) -> Result<Self> {
        let outputs = |part: &Matrix<'_, E>| part.weights.len(inputs);
        let whole = |part: &Matrix<'_, E>| match part.weights {
            Rows::Plain(rows) => rows.len() == outputs(part) * inputs,
            Rows::Quantised(rows) => rows.inputs == inputs,
            Rows::Fp8(rows) => rows.inputs == inputs,
        };
        assert!(parts.iter().all(whole), "rows of a linear layer");
        let runs = parts.chunk_by(|a, b| a.weights.held() == b.weights.held());
        let pieces = runs.map(|run| Piece::new(gpu, run, inputs, room)).collect::<Result<Vec<_>>>()?;
        let mut bias = Vec::new();
        for part in parts {
            let values = part.bias.map_or_else(|| vec![0.0; outputs(part)], <[f32]>::to_vec);
            assert_eq!(values.len(), outputs(part), "a bias of the wrong length");
            bias.extend(values);
        }
        let outputs = bias.len();
        let bias = parts.iter().any(|part| part.bias.is_some()).then(|| Bias::new(gpu, &bias)).transpose()?;
        Ok(Self { pieces, bias, inputs, outputs })
    }

    /// All weights `[outputs, inputs]`, which one can change, or take the other way round.
    ///
    /// # Errors
    /// If they are held another way than one number of the type each.
    pub(super) fn plain(&self) -> Result<&Buffer<E>> {
        match &self.pieces[..] {
            [Piece::Plain(rows)] => Ok(rows),
            _ => Err(not_plain()),
        }
    }

    /// The same, to change them.
    ///
    /// # Errors
    /// As [`Linear::plain`].
    pub(super) fn plain_mut(&mut self) -> Result<&mut Buffer<E>> {
        match &mut self.pieces[..] {
            [Piece::Plain(rows)] => Ok(rows),
            _ => Err(not_plain()),
        }
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that it takes, but for a [`Room`].
    pub fn bytes(&self) -> usize {
        let pieces = self.pieces.iter().map(|piece| match piece {
            Piece::Plain(rows) => rows.bytes(),
            Piece::Quantised(rows, _) => rows.bytes(),
            Piece::Fp8(rows, _) => rows.bytes(),
        });
        pieces.sum::<usize>() + self.bias.as_ref().map_or(0, |bias| bias.wide.bytes() + bias.narrow.bytes())
    }

    /// `x[i] = row ids[i] * scale`: an embedding, where the layer is a tied language head.
    ///
    /// # Errors
    /// If the GPU refuses, or the layer is of several matrices that are held in several ways.
    ///
    /// # Panics
    /// If shapes do not fit. That there are such rows is for the caller to see to.
    pub fn embed(&self, gpu: &Gpu, ids: View<'_, u32>, scale: f32, x: ViewMut<'_, f32>) -> Result<()> {
        match &self.pieces[..] {
            [Piece::Plain(table)] => gpu.embed(table.all(), ids, scale, self.inputs, x),
            [Piece::Quantised(table, _)] => table.embed::<E>(gpu, ids, scale, x),
            _ => Err(GpuError::Failed("an embedding is one matrix".to_owned())),
        }
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
    /// If shapes do not fit, or a part of quantised weights begins elsewhere than at a multiple of 16.
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

    /// `y[rows, outputs] = gelu(W x + b)` by tanh, in one go. False, with nothing done, where that cannot be: of weights
    /// that are no numbers of the type, and on a GPU that is invariant or not made for it.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward_gelu_tanh(&self, gpu: &Gpu, x: View<'_, E>, y: ViewMut<'_, E>) -> Result<bool>
    where
        E: Output<E>,
    {
        let [Piece::Plain(rows)] = &self.pieces[..] else { return Ok(false) };
        let product = Product { w: rows.all().address, gelu: true, ..self.product(gpu, 0, self.outputs, x, &y) };
        if gpu.is_invariant() || (product.rows > 0 && !gpu.driver.multiplies(&product)) {
            return Ok(false);
        }
        if product.rows > 0 {
            // SAFETY: the shapes are those of the buffers.
            unsafe { gpu.driver.multiply(&product)? };
        }
        Ok(true)
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
        let product = Product { add, ..self.product(gpu, first, count, x, &y) };
        if product.rows == 0 || count == 0 {
            return Ok(());
        }
        let mut before = 0;
        for piece in &self.pieces {
            let behind = before + piece.outputs(self.inputs);
            let (start, end) = (first.max(before), (first + count).min(behind));
            if start < end {
                let product = match (piece, &self.bias) {
                    (Piece::Fp8(..), Some(bias)) => {
                        Product { bias: bias.address::<E>(first, count), bias_is: number::<E>(), ..product }
                    }
                    _ => product,
                };
                // SAFETY: the shapes are those of the buffers, and only f32 is added to.
                unsafe { piece.multiply(gpu, start - before, &product.part(start - first, end - start))? };
            }
            before = behind;
        }
        Ok(())
    }

    /// The product of the outputs from `first` on; its `w` is nobody's.
    fn product<O: Output<E>>(
        &self,
        gpu: &Gpu,
        first: usize,
        count: usize,
        x: View<'_, E>,
        y: &ViewMut<'_, O>,
    ) -> Product {
        let rows = x.len / self.inputs;
        assert_eq!((x.len, y.len), (rows * self.inputs, rows * count), "shapes of a linear layer");
        assert!(first + count <= self.outputs, "outputs of a linear layer");
        Product {
            x: x.address,
            y: y.address,
            bias: self.bias.as_ref().map_or(0, |bias| bias.address::<O>(first, count)),
            invariant: gpu.is_invariant(),
            ..Product::new(number::<E>(), number::<O>(), [rows, self.inputs, count])
        }
    }
}

impl<E: Element> Piece<E> {
    /// Of matrices that are held alike.
    fn new(gpu: &Gpu, run: &[Matrix<'_, E>], inputs: usize, room: &Room) -> Result<Self> {
        let parts: Vec<(usize, Held)> =
            run.iter().map(|part| (part.weights.len(inputs), part.weights.held())).collect();
        let [_, needed] = stacked_bytes::<E>(&parts, inputs);
        room.with(needed, |_| Ok(()))?;
        let mut plain: Vec<E> = Vec::new();
        let (mut quantised, mut fp8): (Vec<&QuantRows>, Vec<&Fp8Rows>) = (Vec::new(), Vec::new());
        for part in run {
            match part.weights {
                Rows::Plain(rows) if run.len() == 1 => return Ok(Self::Plain(gpu.upload(rows)?)),
                Rows::Plain(rows) => plain.extend_from_slice(rows),
                Rows::Quantised(rows) => quantised.push(rows),
                Rows::Fp8(rows) if in_fp8::<E>(Held::Fp8) => fp8.push(rows),
                Rows::Fp8(rows) => plain.extend(rows.expand::<E>()),
            }
        }
        Ok(match (quantised.is_empty(), fp8.is_empty()) {
            (false, _) => Self::Quantised(Quantised::new(gpu, &quantised)?, room.clone()),
            (_, false) => Self::Fp8(Fp8::new(gpu, &fp8)?, room.clone()),
            _ => Self::Plain(gpu.upload(&plain)?),
        })
    }

    fn outputs(&self, inputs: usize) -> usize {
        match self {
            Self::Plain(rows) => rows.len() / inputs,
            Self::Quantised(rows, _) => rows.outputs(),
            Self::Fp8(rows, _) => rows.outputs(),
        }
    }

    /// The product of the outputs from `first` on; its `w` is nobody's.
    ///
    /// # Safety
    /// As [`Driver::multiply`](super::driver::Driver::multiply), but for `w`; numbers of the inputs are `E`.
    unsafe fn multiply(&self, gpu: &Gpu, first: usize, product: &Product) -> Result<()> {
        match self {
            Self::Plain(rows) => {
                let w = rows.view(first * product.inputs..(first + product.outputs) * product.inputs).address;
                // SAFETY: as above; the weights are of the piece.
                unsafe { gpu.driver.multiply(&Product { w, ..*product }) }
            }
            Self::Quantised(rows, room) => {
                let bytes = quantised::room_bytes::<E>(rows.outputs(), product.inputs);
                // SAFETY: as above; there is so much room.
                room.with(bytes, |room| unsafe { rows.multiply::<E>(gpu, room, first, product) })
            }
            Self::Fp8(rows, room) => {
                let bytes = fp8::room_bytes(rows.outputs(), product.inputs);
                // SAFETY: as above; there is so much room, and such pieces are of bf16 only.
                room.with(bytes, |room| unsafe { rows.multiply(gpu, room, first, product) })
            }
        }
    }
}

fn not_plain() -> GpuError {
    GpuError::Unsupported("weights in fp8 or blocks have no gradients: take f32 or bf16".to_owned())
}
