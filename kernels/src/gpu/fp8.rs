//! Matrices of e4m3, multiplied with rows that are made e4m3 on the way.

use half::bf16;

use super::driver::Argument::{Address, U32, U64};
use super::driver::{Number, Product};
use super::{Buffer, Gpu, GpuError, Result};
use crate::fp8::Fp8Rows;

/// Threads of a block; `THREADS` in `cuda/fp8.cu`.
const THREADS: usize = 256;
/// Most blocks of what goes over all numbers of a buffer.
const MAX_BLOCKS: usize = 1 << 12;
/// Tensor cores take so many numbers of a row, and rows of weights.
const STEP: usize = 16;
/// Rows that are made e4m3 at a time.
const ROWS: usize = 4096;
/// Bytes of products at most that wait for their scales.
const SUMS: usize = 64 << 20;

/// Rows of a linear layer, on a GPU that multiplies e4m3.
#[derive(Debug)]
pub(super) struct Fp8 {
    /// `[outputs, inputs]`.
    codes: Buffer<u8>,
    /// `[outputs]`.
    scales: Buffer<f32>,
}

/// What is where in a [`Room`](super::Room): x as e4m3, its scales, and products that wait for theirs.
struct Places {
    scales: usize,
    sums: usize,
    end: usize,
    /// Rows whose products there is room for.
    rows: usize,
}

impl Places {
    fn of(outputs: usize, inputs: usize) -> Self {
        // Each at an address as aligned as those of arrays.
        let scales = (ROWS * inputs).next_multiple_of(256);
        let sums = scales + ROWS * size_of::<f32>();
        let row = outputs * size_of::<f32>();
        let rows = (SUMS / row).clamp(1, ROWS);
        Self { scales, sums, end: sums + rows * row, rows }
    }
}

/// Bytes of the room that a matrix `[outputs, inputs]` takes, which it shares with others.
pub(super) fn room_bytes(outputs: usize, inputs: usize) -> usize {
    Places::of(outputs, inputs).end
}

/// Bytes of a matrix.
pub(super) fn bytes(outputs: usize, inputs: usize) -> usize {
    outputs * (inputs + size_of::<f32>())
}

impl Fp8 {
    /// The rows of all parts on top of one another.
    ///
    /// # Errors
    /// If the GPU multiplies no e4m3, or none of these shapes, or has no memory for it.
    pub(super) fn new(gpu: &Gpu, parts: &[&Fp8Rows]) -> Result<Self> {
        let inputs = parts[0].inputs;
        let codes: Vec<u8> = parts.iter().flat_map(|part| &part.codes).copied().collect();
        let scales: Vec<f32> = parts.iter().flat_map(|part| &part.scales).copied().collect();
        let outputs = scales.len();
        assert_eq!(codes.len(), outputs * inputs, "rows of e4m3");
        if !inputs.is_multiple_of(STEP) || !outputs.is_multiple_of(STEP) {
            return Err(GpuError::Unsupported(format!(
                "fp8 takes matrices of a multiple of {STEP} inputs and outputs, this is {outputs} x {inputs}; take --dtype bf16"
            )));
        }
        let fp8 = Self { codes: gpu.upload(&codes)?, scales: gpu.upload(&scales)? };
        let anywhere = fp8.codes.all().address;
        let probe = Product {
            w: anywhere,
            x: anywhere,
            y: anywhere,
            invariant: gpu.is_invariant(),
            ..Product::new(Number::Fp8, Number::F32, [STEP, inputs, outputs])
        };
        match gpu.driver.multiplies(&probe) {
            true => Ok(fp8),
            false => Err(GpuError::Unsupported(format!(
                "{} multiplies no e4m3, for which it takes a GPU of compute capability 8.9 or later; take --dtype bf16",
                gpu.name()
            ))),
        }
    }

    pub(super) fn outputs(&self) -> usize {
        self.scales.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }

    /// The product of the outputs from `first` on with x as e4m3, each row by itself; `w` and the types of the inputs are
    /// nobody's. cuBLASLt scales the sums where it can, which is on Hopper; elsewhere they are scaled afterwards.
    ///
    /// # Safety
    /// As [`Driver::multiply`](super::driver::Driver::multiply), but for `w`; x is bf16, as is the bias, and `room` is the
    /// address of as much memory as [`room_bytes`] says.
    pub(super) unsafe fn multiply(&self, gpu: &Gpu, room: u64, first: usize, product: &Product) -> Result<()> {
        let Product { inputs, outputs, stride, .. } = *product;
        let places = Places::of(self.outputs(), inputs);
        let (codes, scales) = (room, room + places.scales as u64);
        let w = self.codes.view(first * inputs..(first + outputs) * inputs).address;
        let of_w = self.scales.view(first..first + outputs).address;
        for start in (0..product.rows).step_by(ROWS) {
            let rows = ROWS.min(product.rows - start);
            let x = product.x + (start * inputs * size_of::<bf16>()) as u64;
            let arguments = [Address(x), Address(codes), Address(scales), U32(inputs as u32)];
            // SAFETY: as in `cuda/fp8.cu`; the memory is there, as the caller says.
            unsafe { gpu.launch("quantise_bf16", [rows, 1, 1], THREADS, 0, &arguments)? };
            let y = product.y + (start * stride * product.outputs_are.bytes()) as u64;
            let part = Product { inputs_are: Number::Fp8, w, x: codes, y, rows, ..*product };
            let scaled = Product { scales: Some([of_w, scales]), ..part };
            // Where no row is to change another one, their number decides nothing.
            let probe = Product { rows: if product.invariant { STEP } else { rows }, ..scaled };
            if gpu.driver.multiplies(&probe) {
                // SAFETY: as the caller says, and x has just been made.
                unsafe { gpu.driver.multiply(&scaled)? };
            } else {
                // SAFETY: as before.
                unsafe { self.multiply_and_scale(gpu, room, &places, of_w, &part)? };
            }
        }
        Ok(())
    }

    /// Products first, as many as there is room for, then their scales.
    ///
    /// # Safety
    /// As [`Fp8::multiply`]; x is in its place.
    unsafe fn multiply_and_scale(
        &self,
        gpu: &Gpu,
        room: u64,
        places: &Places,
        of_w: u64,
        product: &Product,
    ) -> Result<()> {
        let Product { outputs_are, bias, inputs, outputs, stride, add, .. } = *product;
        let sums = room + places.sums as u64;
        let name = match outputs_are {
            Number::F32 if add => "rescale_add",
            Number::F32 => "rescale_f32",
            _ => "rescale_bf16",
        };
        for start in (0..product.rows).step_by(places.rows) {
            let rows = places.rows.min(product.rows - start);
            let x = product.x + (start * inputs) as u64;
            let plain = Product {
                outputs_are: Number::F32,
                x,
                y: sums,
                bias: 0,
                rows,
                stride: outputs,
                add: false,
                ..*product
            };
            let of_x = room + (places.scales + start * size_of::<f32>()) as u64;
            let y = product.y + (start * stride * outputs_are.bytes()) as u64;
            let arguments = [
                Address(sums),
                Address(of_x),
                Address(of_w),
                Address(bias),
                Address(y),
                U64(stride as u64),
                U32(outputs as u32),
                U64((rows * outputs) as u64),
            ];
            let blocks = (rows * outputs).div_ceil(THREADS).min(MAX_BLOCKS);
            // SAFETY: as the caller says; then as in `cuda/fp8.cu`.
            unsafe {
                gpu.driver.multiply(&plain)?;
                gpu.launch(name, [blocks, 1, 1], THREADS, 0, &arguments)?;
            }
        }
        Ok(())
    }
}
