//! The CPU, doing what a GPU would, one thread after the other.

use std::alloc::{Layout, alloc, dealloc};
use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};

use half::bf16;

use super::driver::{Argument, Collective, Driver, Exchange, Fetched, Number, Order, Product, Recording, all_of};
use super::recording::{Allocations, Validity};
use super::{Gpu, GpuError, MeetingId, Memory, Result};
use crate::fp8;

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
    allocations: Allocations,
    recorded: Mutex<Vec<Work>>,
}

/// What is recorded.
#[derive(Debug)]
enum Work {
    Launch { kernel: String, grid: [u32; 3], threads: u32, shared_bytes: u32, arguments: Vec<Owned> },
    Product(Product),
}

/// An argument of a kernel.
#[derive(Debug)]
enum Owned {
    Address(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    Bytes(Vec<u8>),
}

impl Owned {
    fn of(argument: &Argument<'_>) -> Self {
        match *argument {
            Argument::Address(value) => Self::Address(value),
            Argument::U32(value) => Self::U32(value),
            Argument::U64(value) => Self::U64(value),
            Argument::F32(value) => Self::F32(value),
            Argument::Bytes(bytes) => Self::Bytes(bytes.to_vec()),
        }
    }

    fn argument(&self) -> Argument<'_> {
        match self {
            Self::Address(value) => Argument::Address(*value),
            Self::U32(value) => Argument::U32(*value),
            Self::U64(value) => Argument::U64(*value),
            Self::F32(value) => Argument::F32(*value),
            Self::Bytes(bytes) => Argument::Bytes(bytes),
        }
    }
}

#[derive(Debug)]
struct Recorded {
    work: Vec<Work>,
    validity: Validity,
}

impl Recording for Recorded {}

/// Everything is done when it was asked for.
impl Fetched for Vec<u8> {
    fn is_there(&self) -> bool {
        true
    }

    fn wait(&self, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(self);
        Ok(())
    }
}

impl Emulated {
    fn allocated(&self) -> MutexGuard<'_, HashMap<u64, Layout>> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recorded(&self) -> MutexGuard<'_, Vec<Work>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Emulated {
    fn name(&self) -> &str {
        "emulated"
    }

    fn has_warp_groups(&self) -> bool {
        true
    }

    fn memory(&self) -> Result<Memory> {
        let taken: usize = self.allocated().values().map(Layout::size).sum();
        Ok(Memory { free: MEMORY.saturating_sub(taken), total: MEMORY })
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.allocations.refuse_recording("taking memory")?;
        let refused = GpuError::OutOfMemory { bytes };
        if bytes > self.memory()?.free {
            return Err(refused);
        }
        let layout = Layout::from_size_align(bytes, 256).map_err(|_| refused.clone())?;
        // SAFETY: the size is not 0.
        let pointer = unsafe { alloc(layout) };
        if pointer.is_null() {
            return Err(refused);
        }
        // No numbers, so that a result shows who reads them.
        // SAFETY: so many bytes were just allocated.
        unsafe { pointer.write_bytes(0xff, bytes) };
        let address = pointer.expose_provenance() as u64;
        self.allocated().insert(address, layout);
        self.allocations.allocated(address);
        Ok(address)
    }

    unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        self.allocations.refuse_recording("clearing memory")?;
        // SAFETY: so many bytes are allocated there, and no kernel is running.
        unsafe { pointer::<u8>(address).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn free(&self, address: u64) {
        if let Some(layout) = self.allocated().remove(&address) {
            self.allocations.freed(address);
            // SAFETY: it came from `alloc` with this layout.
            unsafe { dealloc(pointer(address), layout) };
        }
    }

    unsafe fn load(&self, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: as above; there is nothing beside which it could be done.
        unsafe { self.write(address, bytes) }
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.allocations.refuse_recording("a copy")?;
        // SAFETY: so many bytes are allocated there, and no kernel is running.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), pointer(address), bytes.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.allocations.refuse_recording("a copy")?;
        // SAFETY: so many bytes are at both places, which have none in common, and no kernel is running.
        unsafe { std::ptr::copy_nonoverlapping(pointer::<u8>(from), pointer::<u8>(to), bytes) };
        Ok(())
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.allocations.refuse_recording("a copy")?;
        // SAFETY: so many bytes are allocated there, and no kernel is running.
        unsafe { std::ptr::copy_nonoverlapping(pointer::<u8>(address), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn fetch(&self, address: u64, bytes: usize) -> Result<Box<dyn Fetched>> {
        let mut copied = vec![0; bytes];
        // SAFETY: as above.
        unsafe { self.read(address, &mut copied)? };
        Ok(Box::new(copied))
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        if self.allocations.note_launch(arguments) {
            let arguments = arguments.iter().map(Owned::of).collect();
            self.recorded().push(Work::Launch { kernel: kernel.to_owned(), grid, threads, shared_bytes, arguments });
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { run(kernel, grid, threads, shared_bytes, arguments) }
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        if self.allocations.note_product(product) {
            self.recorded().push(Work::Product(*product));
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { multiply(product) };
        Ok(())
    }

    fn multiplies(&self, product: &Product) -> bool {
        // As a device would that scales some products itself and leaves others to be scaled afterwards.
        product.scales.is_none() || !product.add
    }

    fn begin_recording(&self) -> Result<()> {
        self.allocations.begin()
    }

    fn end_recording(&self) -> Result<Box<dyn Recording>> {
        let work = std::mem::take(&mut *self.recorded());
        Ok(Box::new(Recorded { work, validity: self.allocations.end() }))
    }

    fn replay(&self, recording: &dyn Recording) -> Result<bool> {
        let recording: &dyn Any = recording;
        let Some(Recorded { work, validity }) = recording.downcast_ref() else {
            return Err(GpuError::Failed("a recording of another kind of device".into()));
        };
        self.allocations.replay(validity, || {
            work.iter().try_for_each(|work| {
                // SAFETY: it was asked for with these, and the arrays are still there.
                unsafe {
                    match work {
                        Work::Launch { kernel, grid, threads, shared_bytes, arguments } => {
                            let arguments: Vec<_> = arguments.iter().map(Owned::argument).collect();
                            run(kernel, *grid, *threads, *shared_bytes, &arguments)
                        }
                        Work::Product(product) => {
                            multiply(product);
                            Ok(())
                        }
                    }
                }
            })
        })
    }

    fn group(&self, gpus: &[Gpu]) -> Result<Arc<dyn Collective>> {
        Ok(Arc::new(EmulatedGroup(all_of(gpus)?)))
    }

    fn check_peers(&self) -> Result<()> {
        Err(no_peers())
    }

    fn meeting_id(&self) -> Result<MeetingId> {
        Err(no_peers())
    }

    fn meet(&self, _: &Gpu, _: &MeetingId, _: usize, _: usize) -> Result<Box<dyn Exchange>> {
        Err(no_peers())
    }
}

fn no_peers() -> GpuError {
    GpuError::Missing("emulated GPUs of several processes have no memory in common".to_owned())
}

/// Devices of so many threads of this process, which meet at every exchange.
pub(super) fn exchanges(count: usize) -> Vec<Box<dyn Exchange>> {
    let meeting = Arc::new(Meeting { sent: Mutex::new(vec![Vec::new(); count]), all: Barrier::new(count) });
    let exchange = |rank| -> Box<dyn Exchange> { Box::new(EmulatedExchange { meeting: meeting.clone(), rank }) };
    (0..count).map(exchange).collect()
}

struct Meeting {
    /// What each sends, to each.
    sent: Mutex<Vec<Vec<(u64, usize)>>>,
    all: Barrier,
}

struct EmulatedExchange {
    meeting: Arc<Meeting>,
    rank: usize,
}

impl Exchange for EmulatedExchange {
    unsafe fn exchange(&self, send: &[(u64, usize)], receive: &[(u64, usize)]) -> Result<()> {
        let Meeting { sent, all } = &*self.meeting;
        sent.lock().unwrap_or_else(PoisonError::into_inner)[self.rank] = send.to_vec();
        all.wait();
        let sent_here: Vec<(u64, usize)> =
            sent.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|sent| sent[self.rank]).collect();
        for ((from, sent), (to, received)) in sent_here.iter().zip(receive) {
            assert_eq!(sent, received, "numbers that are sent, and received");
            // SAFETY: so many are at both places; nobody changes what is sent before all have it.
            unsafe { std::ptr::copy_nonoverlapping(pointer::<f32>(*from), pointer::<f32>(*to), *sent) };
        }
        all.wait();
        Ok(())
    }
}

/// Devices that all have the memory of this process.
struct EmulatedGroup(Vec<Arc<Emulated>>);

impl Collective for EmulatedGroup {
    fn len(&self) -> usize {
        self.0.len()
    }

    unsafe fn all_reduce(&self, addresses: &[u64], len: usize) -> Result<()> {
        self.0.iter().try_for_each(|gpu| gpu.allocations.refuse_recording("a sum over GPUs"))?;
        for i in 0..len {
            // SAFETY: so many are there, and no kernel is running.
            unsafe {
                let sum: f32 = addresses.iter().map(|address| *pointer::<f32>(*address).add(i)).sum();
                addresses.iter().for_each(|address| *pointer::<f32>(*address).add(i) = sum);
            }
        }
        Ok(())
    }
}

/// # Safety
/// See `Gpu::launch`.
unsafe fn run(kernel: &str, grid: [u32; 3], threads: u32, shared_bytes: u32, arguments: &[Argument<'_>]) -> Result<()> {
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

/// # Safety
/// See [`Driver::multiply`].
unsafe fn multiply(product: &Product) {
    let Product {
        inputs_are,
        outputs_are,
        w,
        x,
        y,
        scales,
        bias,
        bias_is,
        rows,
        inputs,
        outputs,
        x_is,
        x_stride,
        w_is,
        stride,
        add,
        gelu,
        ..
    } = *product;
    let x_len = match x_is {
        Order::Plain => (rows - 1) * x_stride + inputs,
        Order::Transposed => (inputs - 1) * x_stride + rows,
    };
    // SAFETY: as much memory is there.
    let (w, x) = unsafe { (numbers(inputs_are, w, outputs * inputs), numbers(inputs_are, x, x_len)) };
    // SAFETY: as before.
    let bias = (bias != 0).then(|| unsafe { numbers(bias_is, bias, outputs) });
    // SAFETY: as before.
    let scales = scales.map(|[w, x]| unsafe { (numbers(Number::F32, w, outputs), numbers(Number::F32, x, rows)) });
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
            let sum = scales.as_ref().map_or(sum, |(w, x)| sum * w[output] * x[row]);
            let sum = sum + bias.as_ref().map_or(0.0, |bias| bias[output]);
            let sum = if gelu { gelu_tanh(sum) } else { sum };
            let at = row * stride + output;
            // SAFETY: as before.
            unsafe {
                match outputs_are {
                    Number::F32 => {
                        let to = pointer::<f32>(y).add(at);
                        *to = if add { *to + sum } else { sum };
                    }
                    Number::Bf16 => *pointer::<bf16>(y).add(at) = bf16::from_f32(sum),
                    Number::Fp8 => *pointer::<u8>(y).add(at) = fp8::from_f32(sum),
                }
            }
        }
    }
}

/// As cuBLASLt has it.
fn gelu_tanh(x: f32) -> f32 {
    0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh())
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
            Number::Fp8 => {
                std::slice::from_raw_parts(pointer::<u8>(address), len).iter().map(|x| fp8::to_f32(*x)).collect()
            }
        }
    }
}
