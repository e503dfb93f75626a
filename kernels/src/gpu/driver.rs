//! What is asked of a device: memory, copies, kernels by their names, and products of matrices.

use std::any::Any;
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::Arc;

use half::bf16;

use super::{Gpu, GpuError, MeetingId, Memory, Result};

/// A device. Addresses are the device's own.
pub(super) trait Driver: Any + Send + Sync {
    fn name(&self) -> &str;

    /// Whether it runs what is compiled for compute capability 9.0 alone: Hopper's warp groups.
    fn has_warp_groups(&self) -> bool;

    fn memory(&self) -> Result<Memory>;

    fn synchronize(&self) -> Result<()>;

    /// So many bytes, at least one, at an address that is a multiple of 256. What they are is not said.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Makes them zero.
    ///
    /// # Safety
    /// So many bytes are allocated there.
    unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()>;

    /// # Safety
    /// The address is one that [`Driver::allocate`] gave, once.
    unsafe fn free(&self, address: u64);

    /// Copies to the device. The bytes are taken when it returns.
    ///
    /// # Safety
    /// So many bytes are allocated there.
    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Copies to the device beside everything that was asked for, and waits until that is done.
    ///
    /// # Safety
    /// So many bytes are allocated there, and nothing that was asked for uses them.
    unsafe fn load(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Copies inside the device, in order.
    ///
    /// # Safety
    /// So many bytes are allocated at both addresses, and no byte is in both.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;

    /// Copies from the device, once everything before is done.
    ///
    /// # Safety
    /// So many bytes are allocated there.
    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()>;

    /// Asks for a copy from the device, in order, and does not wait for it.
    ///
    /// # Safety
    /// So many bytes are allocated there.
    unsafe fn fetch(&self, address: u64, bytes: usize) -> Result<Box<dyn Fetched>>;

    /// Runs a kernel.
    ///
    /// # Safety
    /// See `Gpu::launch`.
    unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &[Argument<'_>],
    ) -> Result<()>;

    /// `y[rows, outputs] = x[rows, inputs] w[outputs, inputs]^T`, or with either of them the other way round.
    ///
    /// # Safety
    /// The addresses are those of as much memory.
    unsafe fn multiply(&self, product: &Product) -> Result<()>;

    /// Whether it can do such a product.
    fn multiplies(&self, product: &Product) -> bool;

    /// Kernels and products that this thread asks for are not run but kept, until [`Driver::end_recording`]. Nothing else
    /// can be asked for by it meanwhile; one thread records at a time.
    fn begin_recording(&self) -> Result<()>;

    /// What was asked for since [`Driver::begin_recording`].
    fn end_recording(&self) -> Result<Box<dyn Recording>>;

    /// Runs a recording of this device; answers false, and does nothing, if an array that it uses is gone.
    fn replay(&self, recording: &dyn Recording) -> Result<bool>;

    /// A group of these, which are all devices of this kind.
    fn group(&self, gpus: &[Gpu]) -> Result<Arc<dyn Collective>>;

    /// Whether it could meet devices of other processes.
    fn check_peers(&self) -> Result<()>;

    /// By which devices of several processes meet once.
    fn meeting_id(&self) -> Result<MeetingId>;

    /// Meets the others; `gpu` is this device.
    fn meet(&self, gpu: &Gpu, id: &MeetingId, rank: usize, count: usize) -> Result<Box<dyn Exchange>>;
}

/// A device that has met those of other processes.
pub(super) trait Exchange: Send {
    /// Sends f32 to each device, itself among them, and receives some from each, in the order of the processes: addresses
    /// of this device, and how many. It is not recorded.
    ///
    /// # Safety
    /// So many are allocated there; those that are received are nobody else's, and as many as are sent.
    unsafe fn exchange(&self, send: &[(u64, usize)], receive: &[(u64, usize)]) -> Result<()>;
}

/// Bytes that are copied from the device. Dropping it leaves them alone.
pub(super) trait Fetched: Debug + Send + Sync {
    /// Whether there is nothing to wait for any more.
    fn is_there(&self) -> bool;

    /// Waits for the copy and all that was asked for before it, and hands out as many bytes as were asked for.
    fn wait(&self, bytes: &mut [u8]) -> Result<()>;
}

/// What the devices of a group do together.
pub(super) trait Collective: Send + Sync {
    /// Number of devices.
    fn len(&self) -> usize;

    /// The numbers at the addresses, one of each device in the group's order, all become their sum. It is not recorded.
    ///
    /// # Safety
    /// So many f32 are allocated at each address, on its device.
    unsafe fn all_reduce(&self, addresses: &[u64], len: usize) -> Result<()>;
}

/// The devices themselves, if all are of this kind.
pub(super) fn all_of<D: Driver>(gpus: &[Gpu]) -> Result<Vec<Arc<D>>> {
    let of = |gpu: &Gpu| {
        let driver: Arc<dyn Any + Send + Sync> = gpu.driver.clone();
        driver.downcast().map_err(|_| GpuError::Missing("a group takes GPUs of one kind".to_owned()))
    };
    gpus.iter().map(of).collect()
}

/// Kernels and products in their order.
pub(super) trait Recording: Any + Debug + Send + Sync {}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument<'a> {
    /// A pointer; 0 is null.
    Address(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    /// A structure.
    Bytes(&'a [u8]),
}

impl Argument<'_> {
    /// Where the value is, as CUDA wants it.
    pub(super) fn pointer(&self) -> *mut c_void {
        match self {
            Self::Address(value) | Self::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Bytes(bytes) => bytes.as_ptr().cast_mut().cast(),
        }
    }
}

/// Types of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Number {
    F32,
    Bf16,
    /// e4m3.
    Fp8,
}

impl Number {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<bf16>(),
            Self::Fp8 => size_of::<u8>(),
        }
    }
}

/// How a matrix of a product lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Order {
    /// By its rows or outputs.
    Plain,
    /// By its inputs.
    Transposed,
}

/// A product of matrices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// Of `w` and `x`; sums are f32.
    pub(super) inputs_are: Number,
    /// Of `y`: f32, or that of the inputs, or bf16 of e4m3.
    pub(super) outputs_are: Number,
    pub(super) w: u64,
    pub(super) x: u64,
    pub(super) y: u64,
    /// Of `w` and `x`, if they are e4m3: `[outputs]` and `[rows]` in f32, with which sums are multiplied.
    pub(super) scales: Option<[u64; 2]>,
    /// `[outputs]`, or 0.
    pub(super) bias: u64,
    /// Of the bias: that of `y`, or bf16 if the inputs are e4m3.
    pub(super) bias_is: Number,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// How `x` lies.
    pub(super) x_is: Order,
    /// Elements from the beginning of one of its rows, as they lie, to that of the next.
    pub(super) x_stride: usize,
    /// How `w` lies.
    pub(super) w_is: Order,
    /// Numbers from one row of `y` to the next.
    pub(super) stride: usize,
    /// To what is in `y` already; then `y` is f32.
    pub(super) add: bool,
    /// `y` is the GELU of that, by tanh; then nothing is added.
    pub(super) gelu: bool,
    /// A row of `y` has the same bits whatever `rows` is.
    pub(super) invariant: bool,
}

impl Product {
    /// Of matrices whose rows lie one behind the other, x by its rows and w by its outputs, and nothing else; the
    /// addresses are nobody's. Sizes are rows, inputs and outputs.
    pub(super) fn new(inputs_are: Number, outputs_are: Number, [rows, inputs, outputs]: [usize; 3]) -> Self {
        Self {
            inputs_are,
            outputs_are,
            w: 0,
            x: 0,
            y: 0,
            scales: None,
            bias: 0,
            bias_is: outputs_are,
            rows,
            inputs,
            outputs,
            x_is: Order::Plain,
            x_stride: inputs,
            w_is: Order::Plain,
            stride: outputs,
            add: false,
            gelu: false,
            invariant: false,
        }
    }

    /// That of so many outputs from the `first` on; `w` is still that of all.
    pub(super) fn part(&self, first: usize, outputs: usize) -> Self {
        let after = |address: u64, number: Number| match address {
            0 => 0,
            _ => address + (first * number.bytes()) as u64,
        };
        Self { y: after(self.y, self.outputs_are), bias: after(self.bias, self.bias_is), outputs, ..*self }
    }
}
