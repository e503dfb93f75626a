//! The CPU, doing what a GPU would, one thread after the other.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;

use super::driver::{Argument, Driver, Number, Order, Product};
use super::{GpuError, Memory, Result};

unsafe extern "C" {
    /// See `cuda/emulate.cpp`.
    fn plumb_emulated_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        arguments: *mut *mut c_void,
    ) -> bool;
}

/// Kernels run one at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Memory that it lets itself have.
const MEMORY: usize = 4 << 30;

#[derive(Default)]
pub(super) struct Emulated {
    allocated: Mutex<HashMap<u64, Layout>>,
}

impl Emulated {
    fn allocated(&self) -> MutexGuard<'_, HashMap<u64, Layout>> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Emulated {
    fn name(&self) -> &str {
        "emulated"
    }

    fn memory(&self) -> Result<Memory> {
        let taken: usize = self.allocated().values().map(Layout::size).sum();
        Ok(Memory { free: MEMORY.saturating_sub(taken), total: MEMORY })
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let refused = GpuError::OutOfMemory { bytes };
        if bytes > self.memory()?.free {
            return Err(refused);
        }
        let layout = Layout::from_size_align(bytes, 256).map_err(|_| refused.clone())?;
        // SAFETY: the size is not 0.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            return Err(refused);
        }
        let address = pointer.expose_provenance() as u64;
        self.allocated().insert(address, layout);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        if let Some(layout) = self.allocated().remove(&address) {
            // SAFETY: it came from `alloc_zeroed` with this layout.
            unsafe { dealloc(pointer(address), layout) };
        }
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: so many bytes are allocated there, and no kernel is running.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), pointer(address), bytes.len()) };
        Ok(())
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: so many bytes are allocated there, and no kernel is running.
        unsafe { std::ptr::copy_nonoverlapping(pointer::<u8>(address), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        let name = CString::new(kernel).map_err(|error| GpuError::Failed(error.to_string()))?;
        let mut arguments: Vec<*mut c_void> = arguments.iter().map(Argument::pointer).collect();
        let block = [threads, 1, 1];
        let name: &CStr = &name;
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the arguments are the kernel's, and live until it returns.
        let found = unsafe {
            plumb_emulated_launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared_bytes as usize,
                arguments.as_mut_ptr(),
            )
        };
        if found { Ok(()) } else { Err(GpuError::Failed(format!("there is no kernel {kernel}"))) }
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        let Product { inputs_are, outputs_are, w, x, y, bias, rows, inputs, outputs, x_is, x_stride, w_is, add } =
            *product;
        let x_len = match x_is {
            Order::Plain => (rows - 1) * x_stride + inputs,
            Order::Transposed => (inputs - 1) * x_stride + rows,
        };
        // SAFETY: as much memory is there.
        let (w, x) = unsafe { (numbers(inputs_are, w, outputs * inputs), numbers(inputs_are, x, x_len)) };
        // SAFETY: as before.
        let bias = (bias != 0).then(|| unsafe { numbers(outputs_are, bias, outputs) });
        let x_at = |row: usize, input: usize| match x_is {
            Order::Plain => x[row * x_stride + input],
            Order::Transposed => x[input * x_stride + row],
        };
        let w_at = |output: usize, input: usize| match w_is {
            Order::Plain => w[output * inputs + input],
            Order::Transposed => w[input * outputs + output],
        };
        for row in 0..rows {
            for output in 0..outputs {
                let sum: f32 = (0..inputs).map(|input| x_at(row, input) * w_at(output, input)).sum();
                let sum = sum + bias.as_ref().map_or(0.0, |bias| bias[output]);
                let at = row * outputs + output;
                // SAFETY: as before.
                unsafe {
                    match outputs_are {
                        Number::F32 => {
                            let to = pointer::<f32>(y).add(at);
                            *to = if add { *to + sum } else { sum };
                        }
                        Number::Bf16 => *pointer::<bf16>(y).add(at) = bf16::from_f32(sum),
                    }
                }
            }
        }
        Ok(())
    }
}

fn pointer<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

/// # Safety
/// So many are there.
unsafe fn numbers(are: Number, address: u64, len: usize) -> Vec<f32> {
    // SAFETY: as above.
    unsafe {
        match are {
            Number::F32 => std::slice::from_raw_parts(pointer::<f32>(address), len).to_vec(),
            Number::Bf16 => {
                std::slice::from_raw_parts(pointer::<bf16>(address), len).iter().map(|x| x.to_f32()).collect()
            }
        }
    }
}
