//! NVIDIA GPUs, through the driver and cuBLASLt.

mod landing;
mod products;
mod staging;

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::sys as blas_sys;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use super::driver::{Argument, Collective, Driver, Exchange, Fetched, Product, Recording, all_of};
use super::nccl::{self, Communicator, Communicators};
use super::recording::{Allocations, Validity};
use super::{Gpu, GpuError, MeetingId, Memory, Result};
use landing::Landings;
use products::Products;
use staging::Staging;

/// Bytes at an address that is a multiple of 16.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

macro_rules! module {
    ($path:expr) => {{
        static MODULE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &MODULE.0
    }};
}

/// The kernels, a module for each file.
static MODULES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// Where a step's lists wait for the device: a few steps' worth.
const STEP_STAGING: (usize, usize) = (8, 256 << 10);
/// Where weights do: one place is filled while the device takes the other.
const LOAD_STAGING: (usize, usize) = (2, 16 << 20);

pub(super) struct Cuda {
    context: Arc<CudaContext>,
    name: String,
    has_warp_groups: bool,
    handles: Handles,
    products: Products,
    /// For the stream, and for that of loads.
    staging: [Mutex<Staging>; 2],
    landings: Landings,
    allocations: Allocations,
    functions: Mutex<HashMap<String, Function>>,
}

/// What belongs to the context.
struct Handles {
    stream: sys::CUstream,
    /// For copies that go on beside it.
    loads: sys::CUstream,
    /// For what is not to be run but recorded.
    recorder: sys::CUstream,
    modules: Vec<sys::CUmodule>,
}

/// A kernel, and how much dynamic shared memory it was promised.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

// SAFETY: handles of the driver and of cuBLASLt may be used from any thread on which the context is current, which every
// call sees to; what changes is behind a lock.
unsafe impl Send for Cuda {}
// SAFETY: as above. A handle of cuBLASLt may be used by several threads at once.
unsafe impl Sync for Cuda {}

impl Cuda {
    pub(super) fn new(number: usize) -> Result<Self> {
        let missing = |reason: &str| Err(GpuError::Missing(reason.to_owned()));
        // SAFETY: they look for a library and load it, as every use of it would.
        let (driver, cublaslt) = unsafe { (sys::is_culib_present(), blas_sys::is_culib_present()) };
        if !driver {
            return missing("NVIDIA's driver (libcuda.so.1) is not on this machine");
        }
        if !cublaslt {
            return missing(
                "cuBLAS of CUDA 13 (libcublasLt.so.13) is not on this machine, or not where libraries are looked for \
                 (LD_LIBRARY_PATH)",
            );
        }
        let none = |error: DriverError| GpuError::Missing(format!("GPU {number}: {}", describe(error)));
        let context = CudaContext::new(number).map_err(none)?;
        let name = context.name().map_err(none)?;
        let has_warp_groups = context.compute_capability().map_err(none)? == (9, 0);
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(none);
        let mut handles = Handles { stream: stream()?, loads: stream()?, recorder: stream()?, modules: Vec::new() };
        for module in MODULES {
            // SAFETY: it is what nvcc has written.
            handles.modules.push(unsafe { result::module::load_data(module.as_ptr().cast()) }.map_err(none)?);
        }
        let staging = |(slots, bytes)| Staging::new(slots, bytes).map(Mutex::new).map_err(none);
        Ok(Self {
            context,
            name,
            has_warp_groups,
            handles,
            products: Products::new()?,
            staging: [staging(STEP_STAGING)?, staging(LOAD_STAGING)?],
            landings: Landings::default(),
            allocations: Allocations::default(),
            functions: Mutex::default(),
        })
    }

    /// Number of the device, as CUDA counts.
    pub(super) fn number(&self) -> usize {
        self.context.ordinal()
    }

    /// On which everything happens. Refused while this thread records.
    pub(super) fn running_stream(&self) -> Result<*mut c_void> {
        self.allocations.refuse_recording("a sum over GPUs")?;
        Ok(self.handles.stream.cast())
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)
    }

    /// Where work goes that is run, or recorded.
    fn stream(&self, recorded: bool) -> sys::CUstream {
        if recorded { self.handles.recorder } else { self.handles.stream }
    }

    fn function(&self, name: &str, shared_bytes: u32) -> Result<sys::CUfunction> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(name)
            && function.shared_bytes >= shared_bytes
        {
            return Ok(function.handle);
        }
        let absent = || GpuError::Failed(format!("there is no kernel {name}"));
        let c_name = CString::new(name).map_err(|_| absent())?;
        // SAFETY: modules are loaded until `self` is dropped.
        let find = |module: &sys::CUmodule| unsafe { result::module::get_function(*module, c_name.clone()) }.ok();
        let handle = self.handles.modules.iter().find_map(find).ok_or_else(absent)?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was just found.
        unsafe { result::function::set_function_attribute(handle, attribute, shared_bytes as i32) }.map_err(failed)?;
        functions.insert(name.to_owned(), Function { handle, shared_bytes });
        Ok(handle)
    }
}

impl Driver for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn has_warp_groups(&self) -> bool {
        self.has_warp_groups
    }

    fn memory(&self) -> Result<Memory> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(failed)?;
        Ok(Memory { free, total })
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is there until `self` is dropped.
        unsafe { result::stream::synchronize(self.handles.stream) }.map_err(failed)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        self.allocations.refuse_recording("taking memory")?;
        let address = take(bytes)?;
        self.allocations.allocated(address);
        Ok(address)
    }

    unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.allocations.refuse_recording("clearing memory")?;
        // SAFETY: so many bytes are allocated there.
        unsafe { result::memset_d8_async(address, 0, bytes, self.handles.stream) }.map_err(failed)
    }

    unsafe fn free(&self, address: u64) {
        self.allocations.freed(address);
        // What was asked for may still use it. If the device is lost, so is its memory.
        if self.synchronize().is_ok() {
            // SAFETY: it was allocated, once, and nothing uses it any more.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        self.allocations.refuse_recording("a copy")?;
        // SAFETY: so many bytes are there.
        unsafe { lock(&self.staging[0]).copy(self.handles.stream, address, bytes) }.map_err(failed)
    }

    unsafe fn load(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let stream = self.handles.loads;
        // SAFETY: so many bytes are there, and the stream lives as long as `self`.
        unsafe {
            let copied = lock(&self.staging[1]).copy(stream, address, bytes);
            // Also after an error: the memory may be given back then.
            let done = result::stream::synchronize(stream);
            copied.and(done).map_err(failed)
        }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.allocations.refuse_recording("a copy")?;
        // SAFETY: so many bytes are at both places.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.handles.stream) }.map_err(failed)
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.allocations.refuse_recording("a copy")?;
        if bytes.is_empty() {
            return self.synchronize();
        }
        self.bind()?;
        // SAFETY: so many bytes are there, and here until it is waited for.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.handles.stream) }.map_err(failed)?;
        self.synchronize()
    }

    unsafe fn fetch(&self, address: u64, bytes: usize) -> Result<Box<dyn Fetched>> {
        self.bind()?;
        self.allocations.refuse_recording("a copy")?;
        // SAFETY: so many bytes are there, and all copies are on this stream.
        let landed = unsafe { self.landings.copy(&self.context, self.handles.stream, address, bytes) };
        Ok(Box::new(landed.map_err(failed)?))
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        self.bind()?;
        let function = self.function(kernel, shared_bytes)?;
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(Argument::pointer).collect();
        let [x, y, z] = grid;
        let stream = self.stream(self.allocations.note_launch(arguments));
        // SAFETY: the arguments are the kernel's, and taken before it returns.
        unsafe { result::launch_kernel(function, (x, y, z), (threads, 1, 1), shared_bytes, stream, &mut pointers) }
            .map_err(|error| GpuError::Failed(format!("{kernel}: {}", describe(error))))
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        self.bind()?;
        let stream = self.stream(self.allocations.note_product(product));
        // SAFETY: as the caller says; the stream is there until `self` is dropped.
        unsafe { self.products.multiply(product, stream) }
    }

    fn multiplies(&self, product: &Product) -> bool {
        self.bind().is_ok() && self.products.does(product)
    }

    fn begin_recording(&self) -> Result<()> {
        self.bind()?;
        self.allocations.begin()?;
        // What other threads ask of the device meanwhile has nothing to do with it.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is there until `self` is dropped.
        unsafe { result::stream::begin_capture(self.handles.recorder, mode) }.map_err(|error| {
            self.allocations.end();
            failed(error)
        })
    }

    fn end_recording(&self) -> Result<Box<dyn Recording>> {
        let bound = self.bind();
        // SAFETY: the stream is there until `self` is dropped.
        let graph = unsafe { result::stream::end_capture(self.handles.recorder) };
        let validity = self.allocations.end();
        bound?;
        let graph = graph.map_err(failed)?;
        // SAFETY: it was just made, and is not needed once it can be launched.
        let launchable = unsafe {
            let launchable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            launchable
        };
        Ok(Box::new(Recorded { context: self.context.clone(), graph: launchable.map_err(failed)?, validity }))
    }

    fn replay(&self, recording: &dyn Recording) -> Result<bool> {
        let recording: &dyn Any = recording;
        let Some(Recorded { graph, validity, .. }) = recording.downcast_ref() else {
            return Err(GpuError::Failed("a recording of another kind of device".into()));
        };
        self.bind()?;
        // SAFETY: the graph is there, and the arrays that it uses.
        self.allocations
            .replay(validity, || unsafe { result::graph::launch(*graph, self.handles.stream) }.map_err(failed))
    }

    fn group(&self, gpus: &[Gpu]) -> Result<Arc<dyn Collective>> {
        Ok(Arc::new(Communicators::new(all_of(gpus)?)?))
    }

    fn check_peers(&self) -> Result<()> {
        nccl::check()
    }

    fn meeting_id(&self) -> Result<MeetingId> {
        nccl::meeting_id()
    }

    fn meet(&self, gpu: &Gpu, id: &MeetingId, rank: usize, count: usize) -> Result<Box<dyn Exchange>> {
        self.bind()?;
        let gpu = all_of(std::slice::from_ref(gpu))?.remove(0);
        Ok(Box::new(Communicator::new(gpu, id, rank, count)?))
    }
}

/// A CUDA graph.
#[derive(Debug)]
struct Recorded {
    context: Arc<CudaContext>,
    graph: sys::CUgraphExec,
    validity: Validity,
}

// SAFETY: a graph may be launched from any thread, by one at a time, which the lock of `Allocations::replay` sees to.
unsafe impl Send for Recorded {}
// SAFETY: as above.
unsafe impl Sync for Recorded {}

impl Recording for Recorded {}

impl Drop for Recorded {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: nobody launches it any more. One that runs still runs to its end.
            let _ = unsafe { result::graph::exec_destroy(self.graph) };
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.synchronize().is_err() {
            return;
        }
        // SAFETY: nobody uses any of it any more.
        unsafe {
            self.products.close();
            for module in &self.handles.modules {
                let _ = result::module::unload(*module);
            }
            for stream in [self.handles.stream, self.handles.loads, self.handles.recorder] {
                let _ = result::stream::destroy(stream);
            }
        }
    }
}

/// Memory of the device whose context is current.
fn take(bytes: usize) -> Result<u64> {
    // SAFETY: what is there is set before anybody reads it.
    unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::OutOfMemory { bytes },
        _ => failed(error),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn describe(error: DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| "an unknown error".to_owned(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

fn failed(error: DriverError) -> GpuError {
    GpuError::Failed(describe(error))
}
