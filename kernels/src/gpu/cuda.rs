//! NVIDIA GPUs, through the driver and cuBLASLt.

mod landing;
mod staging;

use std::any::Any;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::{result as blas, sys as blas_sys};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use super::driver::{Argument, Collective, Driver, Fetched, Number, Order, Product, Recording, all_of};
use super::nccl::Communicators;
use super::recording::{Allocations, Validity};
use super::{Gpu, GpuError, Memory, Result};
use landing::Landings;
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

/// What cuBLASLt computes in, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `CUBLAS_OP_N` and `CUBLAS_OP_T` of cublas_api.h.
const OP_N: i32 = 0;
const OP_T: i32 = 1;

/// Products that are to be invariant are computed as is best for the first of these numbers of rows, if the others can be
/// computed in the same way.
const INVARIANT_ROWS: [usize; 6] = [1024, 1, 8, 64, 4096, 8192];
/// Ways that are tried for them.
const CANDIDATES: usize = 16;
/// `CUBLASLT_REDUCTION_SCHEME_NONE` of cublasLt.h.
const NO_REDUCTION: u32 = 0;

/// Plans that are kept: those of as many products as a few hundred batches of different sizes have.
const MAX_PLANS: usize = 4096;

/// Where a step's lists wait for the device: a few steps' worth.
const STEP_STAGING: (usize, usize) = (8, 256 << 10);
/// Where weights do: one place is filled while the device takes the other.
const LOAD_STAGING: (usize, usize) = (2, 16 << 20);

pub(super) struct Cuda {
    context: Arc<CudaContext>,
    name: String,
    has_warp_groups: bool,
    handles: Handles,
    workspace: u64,
    /// For the stream, and for that of loads.
    staging: [Mutex<Staging>; 2],
    landings: Landings,
    allocations: Allocations,
    functions: Mutex<HashMap<String, Function>>,
    /// What was found out about products: by everything but their addresses.
    plans: Mutex<Plans>,
    /// How products are computed that are to be invariant: the same for any number of rows, which is 0 here.
    invariant: Mutex<HashMap<PlanKey, blas_sys::cublasLtMatmulAlgo_t>>,
}

/// What belongs to the context.
struct Handles {
    stream: sys::CUstream,
    /// For copies that go on beside it.
    loads: sys::CUstream,
    /// For what is not to be run but recorded.
    recorder: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    blas: blas_sys::cublasLtHandle_t,
}

/// A kernel, and how much dynamic shared memory it was promised.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

/// Also of products that cuBLASLt does not do.
type Plans = HashMap<PlanKey, Result<Plan, blas::CublasError>>;

/// What a plan goes by.
#[derive(PartialEq, Eq, Hash)]
struct PlanKey {
    inputs_are: Number,
    outputs_are: Number,
    scaled: bool,
    bias: bool,
    add: bool,
    gelu: bool,
    invariant: bool,
    /// How x and w lie.
    orders: [Order; 2],
    /// Rows, inputs, outputs, and the strides of x and y.
    sizes: [usize; 5],
    /// Of w, x and y.
    alignments: [u32; 3],
}

impl PlanKey {
    fn of(product: &Product) -> Self {
        let Product { inputs_are, outputs_are, rows, inputs, outputs, add, gelu, invariant, .. } = *product;
        Self {
            inputs_are,
            outputs_are,
            scaled: product.scales.is_some(),
            bias: product.bias != 0,
            add,
            gelu,
            invariant,
            orders: [product.x_is, product.w_is],
            sizes: [rows, inputs, outputs, product.x_stride, product.stride],
            alignments: alignments(product),
        }
    }
}

/// How cuBLASLt computes a product.
struct Plan {
    description: Description,
    layouts: Layouts,
    algorithm: blas_sys::cublasLtMatmulAlgo_t,
}

/// What is done in a product.
struct Description(blas_sys::cublasLtMatmulDesc_t);

/// Shapes and types of w, x and y. cuBLASLt thinks in columns: `y^T[outputs, rows] = w^T^T x^T`, where a matrix in row
/// order is its transpose in column order. So `w` is transposed once more unless it lies by its inputs, and `x` if it
/// does.
struct Layouts([blas_sys::cublasLtMatrixLayout_t; 3]);

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
        let (modules, blas) = (Vec::new(), std::ptr::null_mut());
        let mut handles = Handles { stream: stream()?, loads: stream()?, recorder: stream()?, modules, blas };
        for module in MODULES {
            // SAFETY: it is what nvcc has written.
            handles.modules.push(unsafe { result::module::load_data(module.as_ptr().cast()) }.map_err(none)?);
        }
        handles.blas = blas::create_handle().map_err(|error| GpuError::Missing(format!("cuBLASLt: {error:?}")))?;
        let staging = |(slots, bytes)| Staging::new(slots, bytes).map(Mutex::new).map_err(none);
        let mut cuda = Self {
            context,
            name,
            has_warp_groups,
            handles,
            workspace: 0,
            staging: [staging(STEP_STAGING)?, staging(LOAD_STAGING)?],
            landings: Landings::default(),
            allocations: Allocations::default(),
            functions: Mutex::default(),
            plans: Mutex::default(),
            invariant: Mutex::default(),
        };
        cuda.workspace = cuda.allocate(WORKSPACE)?;
        Ok(cuda)
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

    fn plan<'a>(&self, plans: &'a mut Plans, product: &Product) -> &'a Result<Plan, blas::CublasError> {
        let key = PlanKey::of(product);
        if plans.len() >= MAX_PLANS && !plans.contains_key(&key) {
            plans.clear();
        }
        match plans.entry(key) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(self.new_plan(product)),
        }
    }

    fn new_plan(&self, product: &Product) -> Result<Plan, blas::CublasError> {
        use blas_sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Product { scales, bias, bias_is, gelu, x_is, w_is, invariant, .. } = *product;
        let description = Description(blas::create_matmul_desc(
            // No TF32: a model in f32 is asked for its precision.
            blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas_sys::cudaDataType::CUDA_R_32F,
        )?);
        let set = |attribute, value: &i32| {
            let value = std::ptr::from_ref(value).cast::<c_void>();
            // SAFETY: the description is there, and these attributes are of four bytes.
            unsafe { blas::set_matmul_desc_attribute(description.0, attribute, value, size_of::<i32>()) }
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, if w_is == Order::Plain { &OP_T } else { &OP_N })?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, if x_is == Order::Plain { &OP_N } else { &OP_T })?;
        use blas_sys::cublasLtEpilogue_t as Epilogue;
        // Its GELU is the one by tanh.
        let epilogue = match (bias != 0, gelu) {
            (false, false) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (true, false) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (false, true) => Epilogue::CUBLASLT_EPILOGUE_GELU,
            (true, true) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as i32))?;
        if bias != 0 {
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(kind(bias_is) as i32))?;
        }
        if let Some(scales) = scales {
            let of_rows = blas_sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
            set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &of_rows)?;
            set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &of_rows)?;
            description.set_scales(scales)?;
        }
        let layouts = Layouts::new(product)?;
        let algorithm = match invariant {
            true => self.invariant_algorithm(&description, product)?,
            false => self.algorithms(product, &description, &layouts, WORKSPACE, 1)?[0],
        };
        Ok(Plan { description, layouts, algorithm })
    }

    /// The best algorithm for many rows that can do any number of them, and adds up a row by itself: without memory in
    /// which parts of sums could lie.
    fn invariant_algorithm(
        &self,
        description: &Description,
        product: &Product,
    ) -> Result<blas_sys::cublasLtMatmulAlgo_t, blas::CublasError> {
        let mut known = lock(&self.invariant);
        let key = PlanKey::of(&Product { rows: 0, ..*product });
        if let Some(algorithm) = known.get(&key) {
            return Ok(*algorithm);
        }
        let layouts = INVARIANT_ROWS
            .map(|rows| Layouts::new(&Product { rows, ..*product }))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let does = |algorithm: &_| layouts.iter().all(|layouts| self.does(description, layouts, algorithm));
        let best = self.algorithms(product, description, &layouts[0], 0, CANDIDATES)?;
        let algorithm = best
            .into_iter()
            .find(does)
            .ok_or(blas::CublasError(blas_sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))?;
        known.insert(key, algorithm);
        Ok(algorithm)
    }

    /// At least one and at most `count` algorithms, the one that cuBLASLt thinks best first. Without memory to work in,
    /// they add up in one go.
    fn algorithms(
        &self,
        product: &Product,
        description: &Description,
        layouts: &Layouts,
        workspace: usize,
        count: usize,
    ) -> Result<Vec<blas_sys::cublasLtMatmulAlgo_t>, blas::CublasError> {
        use blas_sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = blas::create_matmul_pref()?;
        let [w, x, y] = layouts.0;
        let mut found = Vec::with_capacity(count);
        let mut length = 0;
        let [w_at, x_at, y_at] = alignments(product);
        let no_reduction =
            (workspace == 0).then_some((Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, NO_REDUCTION));
        let attributes = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w_at),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x_at),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y_at),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y_at),
        ];
        // SAFETY: all of them are there, the first attribute is of eight bytes, the others of four, and there is room for
        // so many answers, of which `length` are written.
        let asked = unsafe {
            let most = std::ptr::from_ref(&workspace).cast::<c_void>();
            let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let mut set = blas::set_matmul_pref_attribute(preference, attribute, most, size_of::<usize>());
            for (attribute, value) in attributes.into_iter().chain(no_reduction) {
                let value = std::ptr::from_ref(&value).cast::<c_void>();
                set =
                    set.and_then(|()| blas::set_matmul_pref_attribute(preference, attribute, value, size_of::<u32>()));
            }
            set.and_then(|()| {
                let (handle, answers): (_, *mut blas_sys::cublasLtMatmulHeuristicResult_t) =
                    (self.handles.blas, found.as_mut_ptr());
                let asked = blas_sys::cublasLtMatmulAlgoGetHeuristic(
                    handle,
                    description.0,
                    w,
                    x,
                    y,
                    y,
                    preference,
                    count as i32,
                    answers,
                    &mut length,
                );
                asked.result()?;
                found.set_len(length as usize);
                Ok(())
            })
        };
        // SAFETY: nobody uses it any more.
        let _ = unsafe { blas::destroy_matmul_pref(preference) };
        asked?;
        let good = blas_sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        let found: Vec<_> = found.into_iter().filter(|found| found.state == good).map(|found| found.algo).collect();
        match found.is_empty() {
            true => Err(blas::CublasError(blas_sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
            false => Ok(found),
        }
    }

    /// Whether an algorithm can do these shapes without memory to work in.
    fn does(&self, description: &Description, layouts: &Layouts, algorithm: &blas_sys::cublasLtMatmulAlgo_t) -> bool {
        let [w, x, y] = layouts.0;
        let mut result = std::mem::MaybeUninit::<blas_sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all of them are there; the result is written where the check succeeds.
        unsafe {
            let (handle, answer) = (self.handles.blas, result.as_mut_ptr());
            let checked = blas_sys::cublasLtMatmulAlgoCheck(handle, description.0, w, x, y, y, algorithm, answer);
            checked.result().is_ok() && result.assume_init().workspaceSize == 0
        }
    }
}

impl Description {
    fn set_bias(&self, address: u64) -> Result<(), blas::CublasError> {
        self.set_address(blas_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, address)
    }

    fn set_scales(&self, [w, x]: [u64; 2]) -> Result<(), blas::CublasError> {
        use blas_sys::cublasLtMatmulDescAttributes_t as Attribute;
        self.set_address(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, w)?;
        self.set_address(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x)
    }

    fn set_address(
        &self,
        attribute: blas_sys::cublasLtMatmulDescAttributes_t,
        address: u64,
    ) -> Result<(), blas::CublasError> {
        let address = std::ptr::from_ref(&address).cast::<c_void>();
        // SAFETY: the description is there, and these attributes are of eight bytes.
        unsafe { blas::set_matmul_desc_attribute(self.0, attribute, address, size_of::<u64>()) }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more.
        let _ = unsafe { blas::destroy_matmul_desc(self.0) };
    }
}

impl Layouts {
    fn new(product: &Product) -> Result<Self, blas::CublasError> {
        let Product { inputs_are, outputs_are, rows, inputs, outputs, x_is, x_stride, w_is, stride, .. } = *product;
        let mut layouts = Self([std::ptr::null_mut(); 3]);
        let w = if w_is == Order::Plain { [inputs, outputs] } else { [outputs, inputs] };
        let x = if x_is == Order::Plain { [inputs, rows] } else { [rows, inputs] };
        let shapes = [(inputs_are, w, w[0]), (inputs_are, x, x_stride), (outputs_are, [outputs, rows], stride)];
        for (layout, (number, [height, width], stride)) in layouts.0.iter_mut().zip(shapes) {
            *layout = blas::create_matrix_layout(kind(number), height as u64, width as u64, stride as i64)?;
        }
        Ok(layouts)
    }
}

impl Drop for Layouts {
    fn drop(&mut self) {
        for layout in self.0.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: nobody uses it any more.
            let _ = unsafe { blas::destroy_matrix_layout(layout) };
        }
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
        // SAFETY: what is there is set before anybody reads it.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::OutOfMemory { bytes },
            _ => failed(error),
        })?;
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
        let failed = |error| blas_failed(product, error);
        let Product { scales, bias, add, invariant, .. } = *product;
        // Held until the product is asked for: bias and scales are part of a description, which has been taken then.
        let mut plans = lock(&self.plans);
        let plan = self.plan(&mut plans, product).as_ref().map_err(|error| failed(*error))?;
        if bias != 0 {
            plan.description.set_bias(bias).map_err(failed)?;
        }
        if let Some(scales) = scales {
            plan.description.set_scales(scales).map_err(failed)?;
        }
        let (one, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let [w, x, y] = plan.layouts.0;
        let stream = self.stream(self.allocations.note_product(product));
        // SAFETY: the plan is that of these shapes and types; as much memory is there.
        unsafe {
            blas::matmul(
                self.handles.blas,
                plan.description.0,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(product.w),
                w,
                pointer(product.x),
                x,
                pointer(product.y),
                y,
                pointer(product.y),
                y,
                &plan.algorithm,
                pointer(self.workspace),
                if invariant { 0 } else { WORKSPACE },
                stream.cast(),
            )
        }
        .map_err(failed)
    }

    fn multiplies(&self, product: &Product) -> bool {
        self.bind().is_ok() && self.plan(&mut lock(&self.plans), product).is_ok()
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
            lock(&self.plans).clear();
            let _ = blas::destroy_handle(self.handles.blas);
            let _ = result::free_sync(self.workspace);
            for module in &self.handles.modules {
                let _ = result::module::unload(*module);
            }
            for stream in [self.handles.stream, self.handles.loads, self.handles.recorder] {
                let _ = result::stream::destroy(stream);
            }
        }
    }
}

/// What the addresses of w, x and y are multiples of, as far as it is told: cuBLASLt would take views of arrays for arrays.
/// Where rows begin must not change what is invariant.
fn alignments(product: &Product) -> [u32; 3] {
    let most = if product.invariant { 4 } else { 8 };
    [product.w, product.x, product.y].map(|address| 1 << address.trailing_zeros().min(most))
}

fn kind(number: Number) -> blas_sys::cudaDataType {
    match number {
        Number::F32 => blas_sys::cudaDataType::CUDA_R_32F,
        Number::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
        Number::Fp8 => blas_sys::cudaDataType::CUDA_R_8F_E4M3,
    }
}

/// An address of the device's, which is not one of this process's.
fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
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

fn blas_failed(product: &Product, error: blas::CublasError) -> GpuError {
    let Product { rows, inputs, outputs, .. } = product;
    GpuError::Failed(format!("cuBLASLt: a product of {rows} x {inputs} and {outputs} x {inputs}: {error:?}"))
}
