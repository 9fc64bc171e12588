//! A GPU, through the CUDA driver. Nothing is linked: without a driver there is an error that says so.

//!
//! - this file: the device, its memory, launches
//! - `modules.rs`: the kernels' code
//! - `lt.rs`: dense products, by cuBLASLt
//! - `graph.rs`: work that is recorded and replayed
//! - `event.rs`: marks in a stream, to wait for and to measure with

mod event;
mod graph;
mod lt;
mod modules;

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, MutexGuard};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUresult, CUstream};

use self::event::Stopwatch;
use self::graph::Unrestricted;
use self::lt::{CublasLt, Operands};
use self::modules::Modules;
use super::{DevicePtr, Driver, Grid, Kernel, Memory, Multiply, Properties, Recorded};
use crate::OpError;

const OPEN: &str = "open GPU";

/// Allocations begin at multiples of this.
const ALIGNMENT: usize = 256;

/// A GPU with its context, and the one stream that this process uses of it.
#[derive(Debug)]
pub(in crate::cuda) struct Nvidia {
    context: CUcontext,
    stream: CUstream,
    properties: Properties,
    /// Second-level cache.
    cache_bytes: usize,
    // Both are locked by the one thread that launches, so nobody waits.
    modules: Mutex<Modules>,
    /// Opened by the first product.
    products: Mutex<Option<CublasLt>>,
}

// SAFETY: the driver's handles may be used from any thread; each call below makes the context current first.
unsafe impl Send for Nvidia {}
// SAFETY: the same; what is mutable is behind a lock.
unsafe impl Sync for Nvidia {}

impl Nvidia {
    pub(in crate::cuda) fn open(ordinal: u32) -> Result<Self, OpError> {
        // SAFETY: it only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpError::driver(OPEN, "there is no CUDA driver on this machine (libcuda.so.1)"));
        }
        // SAFETY: the first call into the driver.
        check(OPEN, unsafe { sys::cuInit(0) })?;
        let device = device(ordinal)?;
        let properties = properties(device)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device exists; the context is kept as long as the process lives.
        check(OPEN, unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        // SAFETY: a context of this process.
        check(OPEN, unsafe { sys::cuCtxSetCurrent(context) })?;
        let mut stream = std::ptr::null_mut();
        const NON_BLOCKING: u32 = 1;
        // SAFETY: the context is current.
        check(OPEN, unsafe { sys::cuStreamCreate(&mut stream, NON_BLOCKING) })?;
        let cache_bytes = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
        let (modules, products) = (Mutex::default(), Mutex::default());
        Ok(Self { context, stream, properties, cache_bytes, modules, products })
    }

    /// Makes the context current in this thread, which costs nothing where it is already.
    fn enter(&self, op: &'static str) -> Result<(), OpError> {
        // SAFETY: the context lives as long as the process.
        check(op, unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    fn function(
        &self,
        op: &'static str,
        kernel: Kernel,
        shared_bytes: u32,
        size: usize,
    ) -> Result<CUfunction, OpError> {
        let mut modules = self.modules.lock().expect(LOCKED);
        if let Some(function) = modules.loaded(kernel, shared_bytes) {
            return Ok(function);
        }
        let _loading = Unrestricted::enter(op)?;
        modules.load(op, kernel, shared_bytes, size, &self.properties)
    }

    /// A library says that it could not do something, not that the device has failed before: then that is the error.
    fn blame(&self, error: OpError) -> OpError {
        match self.memory() {
            Err(failure @ OpError::Device { .. }) => failure,
            _ => error,
        }
    }

    /// What runs products; it is there when this answers.
    fn products(&self, op: &'static str) -> Result<MutexGuard<'_, Option<CublasLt>>, OpError> {
        let mut products = self.products.lock().expect(LOCKED);
        if products.is_none() {
            let workspace = Spare::allocate(self, lt::WORKSPACE_BYTES)?;
            *products = Some(CublasLt::open(op, workspace.ptr, self.stream.cast())?);
            // From here on it is the library's, as long as the process lives.
            std::mem::forget(workspace);
        }
        Ok(products)
    }
}

const LOCKED: &str = "no thread panics while it holds the lock";

/// Memory for a while.
struct Spare<'a> {
    driver: &'a Nvidia,
    ptr: DevicePtr,
}

impl<'a> Spare<'a> {
    fn allocate(driver: &'a Nvidia, bytes: usize) -> Result<Self, OpError> {
        Ok(Self { driver, ptr: driver.allocate(bytes)? })
    }
}

impl Drop for Spare<'_> {
    fn drop(&mut self) {
        // SAFETY: from `allocate`; freeing waits for what uses it.
        unsafe { self.driver.free(self.ptr) }
    }
}

fn device(ordinal: u32) -> Result<CUdevice, OpError> {
    let mut count = 0;
    // SAFETY: the driver is initialised.
    check(OPEN, unsafe { sys::cuDeviceGetCount(&mut count) })?;
    if ordinal as i64 >= i64::from(count) {
        return Err(OpError::driver(OPEN, format!("there are {count} GPUs, none has number {ordinal}")));
    }
    let mut device = 0;
    // SAFETY: there is a device of this number.
    check(OPEN, unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
    Ok(device)
}

fn attribute(device: CUdevice, attribute: CUdevice_attribute) -> Result<u32, OpError> {
    let mut value = 0;
    // SAFETY: the device exists.
    check(OPEN, unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
    Ok(value as u32)
}

fn properties(device: CUdevice) -> Result<Properties, OpError> {
    use CUdevice_attribute as A;
    let attribute = |which| attribute(device, which);
    let mut name = [0 as c_char; 128];
    // SAFETY: as many bytes as are said, and the last stays zero.
    check(OPEN, unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device) })?;
    let mut driver_version = 0;
    // SAFETY: a plain question.
    check(OPEN, unsafe { sys::cuDriverGetVersion(&mut driver_version) })?;
    Ok(Properties {
        // SAFETY: zero-terminated, by the call above or by its last byte.
        name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_max: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver_version: driver_version as u32,
    })
}

/// What the driver says, in words.
fn check(op: &'static str, result: CUresult) -> Result<(), OpError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |ask: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: it stores a pointer to a string that lives for ever, or null.
        unsafe { ask(result, &mut text) };
        // SAFETY: the same.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", result as u32));
    let words = text(sys::cuGetErrorString).unwrap_or_default();
    let reason = format!("{name}: {words}");
    Err(if is_final(result) { OpError::device(op, reason) } else { OpError::driver(op, reason) })
}

/// Whether everything from now on will fail. All but the first few are found some time after what caused them.
fn is_final(result: CUresult) -> bool {
    use CUresult::*;
    matches!(
        result,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_MPS_CLIENT_TERMINATED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_UNKNOWN
    )
}

impl Driver for Nvidia {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<Memory, OpError> {
        const OP: &str = "memory";
        self.enter(OP)?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current.
        check(OP, unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(Memory { free, total })
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, OpError> {
        const OP: &str = "allocate";
        self.enter(OP)?;
        let mut ptr = 0;
        // SAFETY: the context is current.
        let result = unsafe { sys::cuMemAlloc_v2(&mut ptr, bytes) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(OpError::Memory { op: OP, bytes, free: self.memory()?.free });
        }
        check(OP, result)?;
        Ok(DevicePtr(ptr))
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        const OP: &str = "free";
        // SAFETY: allocated by `allocate`, freed once, as the caller vouches; the driver waits for what uses it.
        let freed = self.enter(OP).and_then(|()| check(OP, unsafe { sys::cuMemFree_v2(ptr.0) }));
        // Where the device has failed, the process ends and its memory with it; the failure itself was reported.
        drop(freed);
    }

    unsafe fn upload(&self, to: DevicePtr, from: &[u8]) -> Result<(), OpError> {
        const OP: &str = "upload";
        self.enter(OP)?;
        // SAFETY: there is room, as the caller vouches. From pageable memory the driver copies before it returns.
        check(OP, unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), self.stream) })
    }

    unsafe fn download(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), OpError> {
        const OP: &str = "download";
        self.enter(OP)?;
        // SAFETY: there are as many bytes, as the caller vouches; this waits until they have arrived.
        check(OP, unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), self.stream)
        })?;
        self.synchronize(OP)
    }

    unsafe fn copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), OpError> {
        const OP: &str = "copy";
        self.enter(OP)?;
        // SAFETY: both have as many bytes, as the caller vouches.
        check(OP, unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.stream) })
    }

    unsafe fn fill(&self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), OpError> {
        const OP: &str = "fill";
        self.enter(OP)?;
        // SAFETY: there are as many bytes, as the caller vouches.
        check(OP, unsafe { sys::cuMemsetD8Async(to.0, byte, bytes, self.stream) })
    }

    unsafe fn launch(
        &self,
        op: &'static str,
        kernel: Kernel,
        grid: Grid,
        params: *const c_void,
        size: usize,
    ) -> Result<(), OpError> {
        self.enter(op)?;
        let function = self.function(op, kernel, grid.shared_bytes, size)?;
        let [x, y, z] = grid.blocks;
        let mut arguments = [params.cast_mut()];
        // SAFETY: the one parameter has the size that the kernel takes; the driver copies it before it returns.
        check(op, unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                grid.threads,
                1,
                1,
                grid.shared_bytes,
                self.stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }

    unsafe fn multiply(
        &self,
        op: &'static str,
        product: &Multiply,
        input: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), OpError> {
        self.enter(op)?;
        // The library may be opened here, and loads kernels of its own.
        let _loading = Unrestricted::enter(op)?;
        let mut products = self.products(op)?;
        let products = products.as_mut().expect("`products` has opened it");
        // SAFETY: the matrices are as the caller says.
        unsafe { products.multiply(op, product, Operands { input, weight, out, to: out }) }
            .map_err(|error| self.blame(error))
    }

    unsafe fn tune(
        &self,
        op: &'static str,
        product: &Multiply,
        input: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), OpError> {
        self.enter(op)?;
        let mut products = self.products(op)?;
        let products = products.as_mut().expect("`products` has opened it");
        if products.has_plan(product, Operands { input, weight, out, to: out }) {
            return Ok(());
        }
        // Between two runs all of it is written, so that each finds its weight where a step would: not in the cache.
        let [_, _, out_elements] = product.extents();
        let out_bytes = out_elements.expect("the output lies in memory") * product.out_element.size();
        let bytes = usize::max(ALIGNMENT + out_bytes, 2 * self.cache_bytes);
        let spare = match Spare::allocate(self, bytes) {
            Ok(spare) => spare,
            // Without room to try, the library's first proposal will do.
            Err(OpError::Memory { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let to = DevicePtr(spare.ptr.0 + out.0 % ALIGNMENT as u64);
        let stopwatch = Stopwatch::new(op, self.stream)?;
        // SAFETY: the spare memory has as many bytes.
        let flush = || unsafe { self.fill(spare.ptr, 0, bytes) };
        // SAFETY: the matrices are as the caller says; behind `to` there is room for the output.
        unsafe {
            products
                .tune(op, product, Operands { input, weight, out, to }, |run| stopwatch.time(op, flush, run))
        }
    }

    fn begin_capture(&self) -> Result<(), OpError> {
        const OP: &str = "capture";
        self.enter(OP)?;
        graph::begin(OP, self.stream)
    }

    fn end_capture(&self) -> Result<Recorded, OpError> {
        const OP: &str = "capture";
        self.enter(OP)?;
        graph::end(OP, self.stream)
    }

    fn abandon_capture(&self) {
        if self.enter("capture").is_ok() {
            graph::abandon(self.stream);
        }
    }

    unsafe fn replay(&self, recorded: Recorded) -> Result<(), OpError> {
        const OP: &str = "replay";
        self.enter(OP)?;
        // SAFETY: it has not been forgotten, as the caller vouches.
        unsafe { graph::launch(OP, recorded, self.stream) }
    }

    unsafe fn forget(&self, recorded: Recorded) {
        if self.enter("forget").is_ok() {
            // SAFETY: it has not been forgotten, as the caller vouches.
            unsafe { graph::destroy(recorded) }
        }
    }

    fn synchronize(&self, op: &'static str) -> Result<(), OpError> {
        self.enter(op)?;
        // SAFETY: the stream lives as long as the process.
        check(op, unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}
