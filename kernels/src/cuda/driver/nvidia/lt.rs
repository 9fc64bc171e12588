//! Dense products by cuBLASLt, which is looked for when the first one runs.
//!
//! The library counts rows where we count columns: a row-major matrix is its transpose there. So
//! `out = input * weight^T` is asked for as `out^T = weight * input^T`, with the weight as A (transposed back, since our
//! row is its column), the input as B and the output as C and D.
//!
//! What is found out about a shape is kept as a [`Plan`]. A plan, once there, stays for the life of the process, so that
//! the same product gives the same bits.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr::{from_mut, from_ref, null_mut};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as ComputeType, cublasLtMatmulAlgo_t as Algorithm,
    cublasLtMatmulAlgoCapAttributes_t as Capability, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulHeuristicResult_t as Candidate,
    cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute,
    cublasLtMatrixLayoutAttribute_t as LayoutAttribute, cublasLtReductionScheme_t as ReductionScheme,
    cublasStatus_t as Status, cudaDataType_t as DataType,
};

use crate::OpError;
use crate::cuda::driver::{DevicePtr, Multiply};
use crate::cuda::{Element, buffer};

/// What a product may use beside its matrices: what NVIDIA advises for Hopper, whose kernels ask for most.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// Oldest version that has every function used here with the same meaning: 12.0.
const VERSION_MIN: usize = 120_000;

/// How many algorithms the library is asked for. It sorts them by what it thinks they take.
const CANDIDATES: usize = 16;

/// `CUBLAS_OP_T`, which the bindings leave out.
const TRANSPOSED: i32 = 1;

/// Of `cublasLtNumericalImplFlags_t`: multiplies on tensor cores (`TENSOR_OP_MASK`), or rounds its inputs to f16, bf16 or
/// tf32 (`INPUT_…`). Nothing for f32, which is for proof.
const ROUNDS_INPUT: u64 = 0xfe | 0x07 << 16;

/// The library, and what it has been asked for.
#[derive(Debug)]
pub(super) struct CublasLt {
    library: Library,
    plans: HashMap<Key, Plan>,
}

// SAFETY: the library's handles may be used from any thread; this is behind a lock.
unsafe impl Send for CublasLt {}

/// What every call needs.
#[derive(Clone, Copy, Debug)]
struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: DevicePtr,
    stream: sys::cudaStream_t,
}

/// Where the matrices of a product are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) input: DevicePtr,
    pub(super) weight: DevicePtr,
    /// What is added to, where something is.
    pub(super) out: DevicePtr,
    /// Where the result goes: `out`, or aligned as it is.
    pub(super) to: DevicePtr,
}

/// All that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    product: Multiply,
    /// Of input, weight and output: what the addresses of all rows are multiples of.
    alignments: [u32; 3],
}

/// How to run products of one kind.
#[derive(Debug)]
struct Plan {
    shape: Shape,
    algorithm: Algorithm,
}

impl CublasLt {
    /// For the current context, and products that run on one stream, one after the other. `workspace` has
    /// [`WORKSPACE_BYTES`], for them alone.
    ///
    /// Errors, with the name of the library, when it is not there.
    pub(super) fn open(op: &'static str, workspace: DevicePtr, stream: *mut c_void) -> Result<Self, OpError> {
        find(op)?;
        let mut handle = null_mut();
        // SAFETY: the library is there. The handle lives as long as the process.
        check(op, "cublasLtCreate", unsafe { sys::cublasLtCreate(&mut handle) })?;
        let library = Library { handle, workspace, stream: stream.cast() };
        Ok(Self { library, plans: HashMap::new() })
    }

    /// Runs a product by its plan. One that has none gets the first that the library proposes.
    ///
    /// # Safety
    /// The matrices lie in memory as `product` says.
    pub(super) unsafe fn multiply(
        &mut self,
        op: &'static str,
        product: &Multiply,
        at: Operands,
    ) -> Result<(), OpError> {
        let key = Key::new(product, at);
        let plan = match self.plans.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let shape = Shape::new(op, product)?;
                let algorithm = shape.candidates(op, self.library, &key)?[0];
                entry.insert(Plan { shape, algorithm })
            }
        };
        // SAFETY: as the caller vouches.
        unsafe { plan.shape.run(op, self.library, &plan.algorithm, product.add, at) }
    }

    /// Whether there is a plan.
    pub(super) fn has_plan(&self, product: &Multiply, at: Operands) -> bool {
        self.plans.contains_key(&Key::new(product, at))
    }

    /// Makes a plan of the fastest among those that the library proposes. `time` runs what it is given a few times and
    /// answers how long that takes.
    ///
    /// # Safety
    /// As for [`multiply`](Self::multiply); `at.to` is room that nobody uses.
    pub(super) unsafe fn tune(
        &mut self,
        op: &'static str,
        product: &Multiply,
        at: Operands,
        mut time: impl FnMut(&dyn Fn() -> Result<(), OpError>) -> Result<f32, OpError>,
    ) -> Result<(), OpError> {
        let key = Key::new(product, at);
        let shape = Shape::new(op, product)?;
        let candidates = shape.candidates(op, self.library, &key)?;
        let (mut algorithm, mut least) = (candidates[0], f32::INFINITY);
        for candidate in candidates {
            // SAFETY: as the caller vouches.
            let run = || unsafe { shape.run(op, self.library, &candidate, product.add, at) };
            // One that is proposed and then refused is passed over.
            if run().is_ok() {
                let duration = time(&run)?;
                if duration < least {
                    (algorithm, least) = (candidate, duration);
                }
            }
        }
        self.plans.insert(key, Plan { shape, algorithm });
        Ok(())
    }
}

/// The bindings panic when they are used without the library.
fn find(op: &'static str) -> Result<(), OpError> {
    // SAFETY: it only tries to load the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpError::driver(op, "cuBLASLt of CUDA 13 is not on this machine (libcublasLt.so.13)"));
    }
    // SAFETY: the library is there; a plain question.
    let version = unsafe { sys::cublasLtGetVersion() };
    if version < VERSION_MIN {
        let reason = format!("cuBLASLt is of version {version}, too old; CUDA 13 has libcublasLt.so.13");
        return Err(OpError::driver(op, reason));
    }
    Ok(())
}

impl Key {
    fn new(product: &Multiply, at: Operands) -> Self {
        let mut product = *product;
        if product.batch == 1 {
            product.batch_strides = [0; 3];
        }
        let Multiply { rows, outputs, element, out_element, batch_strides, .. } = product;
        let alignments = [
            alignment(at.input, element, rows, product.input_stride, batch_strides[0]),
            alignment(at.weight, element, outputs, product.weight_stride, batch_strides[1]),
            alignment(at.to, out_element, rows, product.out_stride, batch_strides[2]),
        ];
        Self { product, alignments }
    }
}

/// What the addresses of all rows of all matrices are multiples of, up to the 256 that the library takes for granted.
fn alignment(at: DevicePtr, element: Element, rows: usize, stride: usize, between: usize) -> u32 {
    let stride = if rows > 1 { stride } else { 0 };
    let bits = at.0 | ((stride | between) * element.size()) as u64 | 256;
    1 << bits.trailing_zeros()
}

/// A product in the library's words.
#[derive(Debug)]
struct Shape {
    desc: Desc,
    weight: Layout,
    input: Layout,
    out: Layout,
}

impl Shape {
    fn new(op: &'static str, product: &Multiply) -> Result<Self, OpError> {
        let Multiply { rows, outputs, inputs, element, out_element, batch, .. } = *product;
        let [input_batch, weight_batch, out_batch] = product.batch_strides;
        Ok(Self {
            desc: Desc::new(op)?,
            weight: Layout::new(
                op,
                element,
                [outputs, inputs, product.weight_stride],
                [batch, weight_batch],
            )?,
            input: Layout::new(op, element, [rows, inputs, product.input_stride], [batch, input_batch])?,
            out: Layout::new(op, out_element, [rows, outputs, product.out_stride], [batch, out_batch])?,
        })
    }

    /// What the library proposes, the best first; at least one.
    fn candidates(&self, op: &'static str, library: Library, key: &Key) -> Result<Vec<Algorithm>, OpError> {
        let preference = Preference::new(op, key)?;
        // SAFETY: numbers and an enum that has a variant of value zero.
        let mut found = vec![unsafe { std::mem::zeroed::<Candidate>() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: all handles are valid, and there is room for as many as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                library.handle,
                self.desc.0,
                self.weight.0,
                self.input.0,
                self.out.0,
                self.out.0,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        // Where it has none it says that it does not support this.
        if status != Status::CUBLAS_STATUS_NOT_SUPPORTED {
            check(op, "cublasLtMatmulAlgoGetHeuristic", status)?;
            found.truncate(usize::try_from(count).unwrap_or(0));
        } else {
            found.clear();
        }
        let mut algorithms = Vec::new();
        for Candidate { algo, workspaceSize, state, .. } in found {
            let runs = state == Status::CUBLAS_STATUS_SUCCESS && workspaceSize <= WORKSPACE_BYTES;
            if runs && (key.product.element != Element::F32 || !rounds_input(op, &algo)?) {
                algorithms.push(algo);
            }
        }
        if algorithms.is_empty() {
            return Err(OpError::driver(op, format!("cuBLASLt has no algorithm for {key:?}")));
        }
        Ok(algorithms)
    }

    /// Starts the product.
    ///
    /// # Safety
    /// The matrices lie in memory as the shape says, and `algorithm` is one of its candidates.
    unsafe fn run(
        &self,
        op: &'static str,
        library: Library,
        algorithm: &Algorithm,
        add: bool,
        at: Operands,
    ) -> Result<(), OpError> {
        let (one, beta) = (1f32, f32::from(u8::from(add)));
        let device = |ptr: DevicePtr| std::ptr::with_exposed_provenance_mut::<c_void>(ptr.0 as usize);
        // SAFETY: as the caller vouches. The factors are read before this returns.
        let status = unsafe {
            sys::cublasLtMatmul(
                library.handle,
                self.desc.0,
                from_ref(&one).cast(),
                device(at.weight),
                self.weight.0,
                device(at.input),
                self.input.0,
                from_ref(&beta).cast(),
                device(at.out),
                self.out.0,
                device(at.to),
                self.out.0,
                algorithm,
                device(library.workspace),
                WORKSPACE_BYTES,
                library.stream,
            )
        };
        check(op, "cublasLtMatmul", status)
    }
}

/// Whether an algorithm computes with less than its f32 inputs hold.
fn rounds_input(op: &'static str, algorithm: &Algorithm) -> Result<bool, OpError> {
    let (mut flags, mut written) = (0u64, 0);
    // SAFETY: an algorithm of the library's, and room for the eight bytes of this attribute.
    let status = unsafe {
        sys::cublasLtMatmulAlgoCapGetAttribute(
            algorithm,
            Capability::CUBLASLT_ALGO_CAP_NUMERICAL_IMPL_FLAGS,
            from_mut(&mut flags).cast(),
            size_of::<u64>(),
            &mut written,
        )
    };
    check(op, "cublasLtMatmulAlgoCapGetAttribute", status)?;
    Ok(flags & ROUNDS_INPUT != 0)
}

/// Declares a description of the library's, which is given back when it is dropped.
macro_rules! description {
    ($(#[$meta:meta])* $name:ident($handle:ty, $attribute:ty), $set:ident, $destroy:ident) => {
        $(#[$meta])*
        #[derive(Debug)]
        struct $name($handle);

        impl $name {
            fn set<T>(&self, op: &'static str, attribute: $attribute, value: T) -> Result<(), OpError> {
                // SAFETY: a valid handle; the value is copied, and the library checks its size.
                let status = unsafe { sys::$set(self.0, attribute, from_ref(&value).cast(), size_of::<T>()) };
                check(op, stringify!($set), status)
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: a valid handle that nobody uses any more. It is host memory: nothing can be done if it stays.
                let _ = unsafe { sys::$destroy(self.0) };
            }
        }
    };
}

description!(
    /// What is computed.
    Desc(sys::cublasLtMatmulDesc_t, DescAttribute), cublasLtMatmulDescSetAttribute, cublasLtMatmulDescDestroy
);
description!(
    /// How a matrix lies in memory.
    Layout(sys::cublasLtMatrixLayout_t, LayoutAttribute), cublasLtMatrixLayoutSetAttribute, cublasLtMatrixLayoutDestroy
);
description!(
    /// What an algorithm may do.
    Preference(sys::cublasLtMatmulPreference_t, PreferenceAttribute),
    cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreferenceDestroy
);

impl Desc {
    fn new(op: &'static str) -> Result<Self, OpError> {
        // Sums and factors in f32. Of f32 inputs this one keeps every bit; `FAST_TF32` is the one that does not.
        let (compute, scale) = (ComputeType::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F);
        let mut handle = null_mut();
        // SAFETY: it stores a handle.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&mut handle, compute, scale) };
        check(op, "cublasLtMatmulDescCreate", status)?;
        let desc = Self(handle);
        desc.set(op, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        Ok(desc)
    }
}

impl Layout {
    /// Of a row-major matrix, which the library sees as columns.
    fn new(
        op: &'static str,
        element: Element,
        [rows, cols, stride]: [usize; 3],
        [batch, between]: [usize; 2],
    ) -> Result<Self, OpError> {
        let element = match element {
            Element::F32 => DataType::CUDA_R_32F,
            Element::F16 => DataType::CUDA_R_16F,
            Element::BF16 => DataType::CUDA_R_16BF,
            Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
                return Err(buffer::wrong_element(op, element));
            }
        };
        let mut handle = null_mut();
        // SAFETY: it stores a handle.
        let status = unsafe {
            sys::cublasLtMatrixLayoutCreate(&mut handle, element, cols as u64, rows as u64, stride as i64)
        };
        check(op, "cublasLtMatrixLayoutCreate", status)?;
        let layout = Self(handle);
        if batch > 1 {
            let count = i32::try_from(batch)
                .map_err(|_| OpError::unsupported(op, format!("{batch} products at once")))?;
            layout.set(op, LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count)?;
            let offset = LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
            layout.set(op, offset, between as i64)?;
        }
        Ok(layout)
    }
}

impl Preference {
    fn new(op: &'static str, key: &Key) -> Result<Self, OpError> {
        use PreferenceAttribute as A;
        let mut handle = null_mut();
        // SAFETY: it stores a handle.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&mut handle) };
        check(op, "cublasLtMatmulPreferenceCreate", status)?;
        let preference = Self(handle);
        preference.set(op, A::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES as u64)?;
        // Where the inputs are split between blocks, their sums are added in f32 and in a fixed order. In the output, the
        // order would be that of the blocks' arrival.
        let reduction = ReductionScheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(op, A::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)?;
        let [input, weight, out] = key.alignments;
        preference.set(op, A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, weight)?;
        preference.set(op, A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, input)?;
        preference.set(op, A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out)?;
        preference.set(op, A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out)?;
        if key.product.element == Element::F32 {
            preference.set(op, A::CUBLASLT_MATMUL_PREF_IMPL_MASK, !ROUNDS_INPUT)?;
        }
        Ok(preference)
    }
}

fn check(op: &'static str, call: &'static str, status: Status) -> Result<(), OpError> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(OpError::driver(op, format!("{call}: {status:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(element: Element, cols: usize, batch: usize) -> Multiply {
        Multiply {
            rows: 3,
            outputs: 5,
            inputs: cols,
            element,
            out_element: Element::F32,
            input_stride: cols,
            weight_stride: cols.next_multiple_of(8),
            out_stride: 5,
            add: false,
            batch,
            batch_strides: [cols, 64, 16],
        }
    }

    fn key(product: &Multiply, out: u64) -> Key {
        let out = DevicePtr(out);
        Key::new(product, Operands { input: DevicePtr(512), weight: DevicePtr(1024), out, to: out })
    }

    #[test]
    fn a_matrix_is_aligned_as_its_worst_row_is() {
        assert_eq!(key(&product(Element::BF16, 24, 1), 0x100).alignments, [16, 16, 4]);
        assert_eq!(key(&product(Element::BF16, 7, 1), 0x108).alignments, [2, 16, 4]);
        assert_eq!(key(&product(Element::BF16, 128, 2), 0x104).alignments, [256, 128, 4]);
        // Of one row, the distance to the next says nothing.
        let one = Multiply { rows: 1, ..product(Element::F16, 7, 1) };
        assert_eq!(key(&one, 0x120).alignments, [256, 16, 32]);
    }

    #[test]
    fn distances_between_products_matter_only_where_there_are_several() {
        let apart = |batch| Multiply { batch_strides: [1, 2, 3], ..product(Element::F32, 8, batch) };
        assert_eq!(key(&apart(1), 256), key(&product(Element::F32, 8, 1), 256));
        assert_ne!(key(&apart(2), 256), key(&product(Element::F32, 8, 2), 256));
    }

    /// Needs no GPU: what describes a product is host memory.
    #[test]
    fn the_library_understands_what_it_is_told_or_is_named_where_it_is_missing() {
        if let Err(error) = find("linear") {
            assert!(error.to_string().contains("libcublasLt.so.13"), "{error}");
            return;
        }
        for element in [Element::F32, Element::F16, Element::BF16] {
            for (cols, batch) in [(7, 1), (64, 3)] {
                let product = product(element, cols, batch);
                Shape::new("linear", &product).expect("a shape");
                Preference::new("linear", &key(&product, 256)).expect("a preference");
            }
        }
        assert!(Shape::new("linear", &product(Element::U32, 8, 1)).is_err());
    }
}
