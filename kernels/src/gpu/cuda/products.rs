//! Products of matrices, by cuBLASLt.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::{result as blas, sys as blas_sys};
use cudarc::driver::{result, sys};

use super::super::driver::{Number, Order, Product};
use super::super::{GpuError, Result};
use super::{lock, take};

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

/// What computes products, and has found out how.
pub(super) struct Products {
    handle: blas_sys::cublasLtHandle_t,
    workspace: u64,
    /// By everything of a product but its addresses.
    plans: Mutex<Plans>,
    /// How products are computed that are to be invariant: the same for any number of rows, which is 0 here.
    invariant: Mutex<HashMap<PlanKey, blas_sys::cublasLtMatmulAlgo_t>>,
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

impl Products {
    /// On the device whose context is current.
    pub(super) fn new() -> Result<Self> {
        let handle = blas::create_handle().map_err(|error| GpuError::Missing(format!("cuBLASLt: {error:?}")))?;
        Ok(Self { handle, workspace: take(WORKSPACE)?, plans: Mutex::default(), invariant: Mutex::default() })
    }

    /// Gives everything back.
    ///
    /// # Safety
    /// The context is current, and no product is running or will be asked for.
    pub(super) unsafe fn close(&self) {
        lock(&self.plans).clear();
        // SAFETY: as above.
        unsafe {
            let _ = blas::destroy_handle(self.handle);
            let _ = result::free_sync(self.workspace);
        }
    }

    /// Whether cuBLASLt does such a product.
    pub(super) fn does(&self, product: &Product) -> bool {
        self.plan(&mut lock(&self.plans), product).is_ok()
    }

    /// Asks for a product on a stream.
    ///
    /// # Safety
    /// The context is current, the stream is there, and the addresses are those of as much memory.
    pub(super) unsafe fn multiply(&self, product: &Product, stream: sys::CUstream) -> Result<()> {
        let failed = |error| failed(product, error);
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
        // SAFETY: the plan is that of these shapes and types; as much memory is there.
        unsafe {
            blas::matmul(
                self.handle,
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
        let does = |algorithm: &_| layouts.iter().all(|layouts| self.fits(description, layouts, algorithm));
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
                    (self.handle, found.as_mut_ptr());
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
    fn fits(&self, description: &Description, layouts: &Layouts, algorithm: &blas_sys::cublasLtMatmulAlgo_t) -> bool {
        let [w, x, y] = layouts.0;
        let mut result = std::mem::MaybeUninit::<blas_sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all of them are there; the result is written where the check succeeds.
        unsafe {
            let (handle, answer) = (self.handle, result.as_mut_ptr());
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

fn failed(product: &Product, error: blas::CublasError) -> GpuError {
    let Product { rows, inputs, outputs, .. } = product;
    GpuError::Failed(format!("cuBLASLt: a product of {rows} x {inputs} and {outputs} x {inputs}: {error:?}"))
}
