//! NVIDIA GPUs, through the driver and cuBLASLt.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::{result as blas, sys as blas_sys};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use super::driver::{Argument, Driver, Number, Order, Product};
use super::{GpuError, Memory, Result};

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

pub(super) struct Cuda {
    context: Arc<CudaContext>,
    name: String,
    handles: Handles,
    workspace: u64,
    functions: Mutex<HashMap<String, Function>>,
    /// What was found out about products: by everything but their addresses.
    plans: Mutex<HashMap<PlanKey, Plan>>,
}

/// What belongs to the context.
struct Handles {
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    blas: blas_sys::cublasLtHandle_t,
}

/// A kernel, and how much dynamic shared memory it was promised.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

/// Types, whether something is added and whether there is a bias, how the matrices lie, shapes, and what addresses are
/// multiples of.
type PlanKey = ([Number; 2], [bool; 2], [Order; 2], [usize; 4], [u32; 3]);

/// How cuBLASLt computes a product.
#[derive(Clone, Copy)]
struct Plan {
    description: blas_sys::cublasLtMatmulDesc_t,
    /// Of w, x and y.
    layouts: [blas_sys::cublasLtMatrixLayout_t; 3],
    algorithm: blas_sys::cublasLtMatmulAlgo_t,
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
        let mut handles = Handles { stream: std::ptr::null_mut(), modules: Vec::new(), blas: std::ptr::null_mut() };
        handles.stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(none)?;
        for module in MODULES {
            // SAFETY: it is what nvcc has written.
            handles.modules.push(unsafe { result::module::load_data(module.as_ptr().cast()) }.map_err(none)?);
        }
        handles.blas = blas::create_handle().map_err(|error| GpuError::Missing(format!("cuBLASLt: {error:?}")))?;
        let mut cuda =
            Self { context, name, handles, workspace: 0, functions: Mutex::default(), plans: Mutex::default() };
        cuda.workspace = cuda.allocate(WORKSPACE)?;
        Ok(cuda)
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)
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

    fn plan(&self, product: &Product) -> Result<Plan> {
        let Product { inputs_are, outputs_are, bias, rows, inputs, outputs, x_is, x_stride, w_is, add, .. } = *product;
        let alignments = [product.w, product.x, product.y].map(alignment);
        let flags = [add, bias != 0];
        let key = ([inputs_are, outputs_are], flags, [x_is, w_is], [rows, inputs, outputs, x_stride], alignments);
        let mut plans = lock(&self.plans);
        if let Some(plan) = plans.get(&key) {
            return Ok(*plan);
        }
        let plan = self.new_plan(product).map_err(|error| blas_failed(product, error))?;
        plans.insert(key, plan);
        Ok(plan)
    }

    /// cuBLASLt thinks in columns: `y^T[outputs, rows] = w^T^T x^T`, where a matrix in row order is its transpose in
    /// column order. So a `w` that lies by its outputs is transposed once more, and an `x` that lies by its inputs.
    fn new_plan(&self, product: &Product) -> Result<Plan, blas::CublasError> {
        use blas_sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Product { inputs_are, outputs_are, bias, rows, inputs, outputs, x_is, x_stride, w_is, .. } = *product;
        let [rows, inputs, outputs] = [rows, inputs, outputs].map(|n| n as u64);
        let description = blas::create_matmul_desc(
            // No TF32: a model in f32 is asked for its precision.
            blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas_sys::cudaDataType::CUDA_R_32F,
        )?;
        let set = |attribute, value: &i32| {
            let value = std::ptr::from_ref(value).cast::<c_void>();
            // SAFETY: the description is there, and these attributes are of four bytes.
            unsafe { blas::set_matmul_desc_attribute(description, attribute, value, size_of::<i32>()) }
        };
        let (w_operation, w_shape) = match w_is {
            Order::Plain => (OP_T, [inputs, outputs]),
            Order::Transposed => (OP_N, [outputs, inputs]),
        };
        let (x_operation, x_shape) = match x_is {
            Order::Plain => (OP_N, [inputs, rows]),
            Order::Transposed => (OP_T, [rows, inputs]),
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &w_operation)?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &x_operation)?;
        if bias != 0 {
            let epilogue = blas_sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(kind(outputs_are) as i32))?;
        }
        let layouts = [
            blas::create_matrix_layout(kind(inputs_are), w_shape[0], w_shape[1], w_shape[0] as i64)?,
            blas::create_matrix_layout(kind(inputs_are), x_shape[0], x_shape[1], x_stride as i64)?,
            blas::create_matrix_layout(kind(outputs_are), outputs, rows, outputs as i64)?,
        ];
        let preference = blas::create_matmul_pref()?;
        use blas_sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let prefer = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference is there, and the value is of as many bytes as the attribute.
            unsafe { blas::set_matmul_pref_attribute(preference, attribute, value, bytes) }
        };
        let most = std::ptr::from_ref(&WORKSPACE).cast();
        let [w_at, x_at, y_at] = [product.w, product.x, product.y].map(alignment);
        let aligned = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w_at),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x_at),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &y_at),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &y_at),
        ];
        let [w, x, y] = layouts;
        let found = prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most, size_of::<usize>())
            .and_then(|()| {
                let mut values = aligned.into_iter();
                values.try_for_each(|(attribute, value)| {
                    prefer(attribute, std::ptr::from_ref(value).cast(), size_of::<u32>())
                })
            })
            .and_then(|()| {
                // SAFETY: all of them are there.
                unsafe { blas::get_matmul_algo_heuristic(self.handles.blas, description, w, x, y, y, preference) }
            });
        // SAFETY: nobody uses it any more.
        let _ = unsafe { blas::destroy_matmul_pref(preference) };
        Ok(Plan { description, layouts, algorithm: found?.algo })
    }
}

impl Driver for Cuda {
    fn name(&self) -> &str {
        &self.name
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
        // SAFETY: what is there is set before anybody reads it.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::OutOfMemory { bytes },
            _ => failed(error),
        })?;
        // SAFETY: so many bytes were just allocated there.
        unsafe { result::memset_d8_async(address, 0, bytes, self.handles.stream) }.map_err(failed)?;
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        // What was asked for may still use it. If the device is lost, so is its memory.
        if self.synchronize().is_ok() {
            // SAFETY: it was allocated, once, and nothing uses it any more.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: so many bytes are there, and here until it is waited for.
        unsafe { result::memcpy_htod_async(address, bytes, self.handles.stream) }.map_err(failed)?;
        // A device that reads the memory of the process by itself may not have taken them yet.
        self.synchronize()
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return self.synchronize();
        }
        self.bind()?;
        // SAFETY: so many bytes are there, and here until it is waited for.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.handles.stream) }.map_err(failed)?;
        self.synchronize()
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
        // SAFETY: the arguments are the kernel's, and taken before it returns.
        unsafe {
            let stream = self.handles.stream;
            result::launch_kernel(function, (x, y, z), (threads, 1, 1), shared_bytes, stream, &mut pointers)
        }
        .map_err(|error| GpuError::Failed(format!("{kernel}: {}", describe(error))))
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        self.bind()?;
        let plan = self.plan(product)?;
        // The bias is part of a description: one call at a time, which has taken it when it returns.
        let _turn = lock(&self.plans);
        let attribute = blas_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        let (one, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        let [w, x, y] = plan.layouts;
        // SAFETY: the plan is that of these shapes and types; as much memory is there.
        unsafe {
            let bias = std::ptr::from_ref(&product.bias).cast::<c_void>();
            blas::set_matmul_desc_attribute(plan.description, attribute, bias, size_of::<u64>()).and_then(|()| {
                blas::matmul(
                    self.handles.blas,
                    plan.description,
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
                    WORKSPACE,
                    self.handles.stream.cast(),
                )
            })
        }
        .map_err(|error| blas_failed(product, error))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.synchronize().is_err() {
            return;
        }
        // SAFETY: nobody uses any of it any more.
        unsafe {
            for plan in lock(&self.plans).values() {
                let _ = blas::destroy_matmul_desc(plan.description);
                for layout in plan.layouts {
                    let _ = blas::destroy_matrix_layout(layout);
                }
            }
            let _ = blas::destroy_handle(self.handles.blas);
            let _ = result::free_sync(self.workspace);
            for module in &self.handles.modules {
                let _ = result::module::unload(*module);
            }
            let _ = result::stream::destroy(self.handles.stream);
        }
    }
}

fn kind(number: Number) -> blas_sys::cudaDataType {
    match number {
        Number::F32 => blas_sys::cudaDataType::CUDA_R_32F,
        Number::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
    }
}

/// What an address is a multiple of, as far as cuBLASLt asks.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
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
