//! A GPU, through the CUDA driver. Nothing is linked: without a driver there is an error that says so.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::Mutex;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUfunction_attribute, CUmodule, CUresult,
    CUstream,
};

use super::{DevicePtr, Driver, Grid, Kernel, Memory, Multiply, Properties};
use crate::OpError;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// What the kernels in this binary were compiled for.
const ARCHITECTURES: &str = env!("KERNEL_ARCHITECTURES");

/// Bytes of dynamic shared memory that a kernel may use without being asked.
const SHARED_BYTES_DEFAULT: u32 = 48 << 10;

const OPEN: &str = "open GPU";

/// A GPU with its context, and the one stream that this process uses of it.
#[derive(Debug)]
pub(in crate::cuda) struct Nvidia {
    context: CUcontext,
    stream: CUstream,
    properties: Properties,
    /// Loaded when they are first used. Locked by the one thread that launches, so nobody waits.
    loaded: Mutex<Loaded>,
}

// SAFETY: the driver's handles may be used from any thread; each call below makes the context current first.
unsafe impl Send for Nvidia {}
// SAFETY: the same; what is mutable is behind a lock.
unsafe impl Sync for Nvidia {}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, CUmodule>,
    functions: HashMap<Kernel, Function>,
}

#[derive(Clone, Copy, Debug)]
struct Function {
    handle: CUfunction,
    /// Dynamic shared memory that it may use.
    shared_bytes: u32,
}

impl Nvidia {
    pub(in crate::cuda) fn open(ordinal: u32) -> Result<Self, OpError> {
        // SAFETY: it only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpError::device(OPEN, "there is no CUDA driver on this machine (libcuda.so.1)"));
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
        Ok(Self { context, stream, properties, loaded: Mutex::default() })
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
        let mut loaded = self.loaded.lock().expect("no thread panics while it holds the lock");
        let mut function = match loaded.functions.get(&kernel) {
            Some(function) => *function,
            None => {
                let module = match loaded.modules.get(kernel.module) {
                    Some(module) => *module,
                    None => self.module(op, kernel.module)?,
                };
                loaded.modules.insert(kernel.module, module);
                find(op, module, kernel, size)?
            }
        };
        if shared_bytes > function.shared_bytes {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            check(op, unsafe { sys::cuFuncSetAttribute(function.handle, attribute, shared_bytes as i32) })?;
            function.shared_bytes = shared_bytes;
        }
        loaded.functions.insert(kernel, function);
        Ok(function.handle)
    }

    fn module(&self, op: &'static str, name: &str) -> Result<CUmodule, OpError> {
        let bytes = MODULES.iter().find(|(module, _)| *module == name).map(|(_, bytes)| *bytes);
        let bytes = bytes.ok_or_else(|| OpError::device(op, format!("there is no kernel file `{name}`")))?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a whole fatbin, which says itself how long it is.
        let result = unsafe { sys::cuModuleLoadData(&mut module, bytes.as_ptr().cast()) };
        if result == CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
            let (major, minor) = self.properties.capability;
            let reason = format!(
                "{} has compute capability {major}.{minor}; the kernels were compiled for {ARCHITECTURES}",
                self.properties.name
            );
            return Err(OpError::device(op, reason));
        }
        check(op, result)?;
        Ok(module)
    }
}

/// The function of a kernel, whose one parameter must have `size` bytes.
fn find(op: &'static str, module: CUmodule, kernel: Kernel, size: usize) -> Result<Function, OpError> {
    let name = CString::new(kernel.name).expect("names have no zero byte");
    let mut handle = std::ptr::null_mut();
    // SAFETY: a loaded module and a zero-terminated name.
    check(op, unsafe { sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()) })
        .map_err(|error| OpError::device(op, format!("kernel {}: {error}", kernel.name)))?;
    let (mut offset, mut found) = (0, 0);
    // SAFETY: a function of a loaded module.
    check(op, unsafe { sys::cuFuncGetParamInfo(handle, 0, &mut offset, &mut found) })?;
    if found != size {
        let reason = format!("kernel {} takes {found} bytes of parameters, not {size}", kernel.name);
        return Err(OpError::device(op, reason));
    }
    Ok(Function { handle, shared_bytes: SHARED_BYTES_DEFAULT })
}

fn device(ordinal: u32) -> Result<CUdevice, OpError> {
    let mut count = 0;
    // SAFETY: the driver is initialised.
    check(OPEN, unsafe { sys::cuDeviceGetCount(&mut count) })?;
    if ordinal as i64 >= i64::from(count) {
        return Err(OpError::device(OPEN, format!("there are {count} GPUs, none has number {ordinal}")));
    }
    let mut device = 0;
    // SAFETY: there is a device of this number.
    check(OPEN, unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
    Ok(device)
}

fn properties(device: CUdevice) -> Result<Properties, OpError> {
    use CUdevice_attribute as A;
    let attribute = |attribute| -> Result<u32, OpError> {
        let mut value = 0;
        // SAFETY: the device exists.
        check(OPEN, unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok(value as u32)
    };
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
    Err(OpError::device(op, format!("{name}: {words}")))
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
        _product: &Multiply,
        _input: DevicePtr,
        _weight: DevicePtr,
        _out: DevicePtr,
    ) -> Result<(), OpError> {
        Err(OpError::device(op, "cuBLASLt is not bound yet"))
    }

    fn synchronize(&self, op: &'static str) -> Result<(), OpError> {
        self.enter(op)?;
        // SAFETY: the stream lives as long as the process.
        check(op, unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}
