//! A GPU, through the CUDA driver. Nothing is linked: without a driver there is an error that says so.

//!
//! - this file: memory, launches, and what is asked for of the files below
//! - `device.rs`: which GPU, and what it is
//! - `modules.rs`: the kernels' code
//! - `lt.rs`: dense products, by cuBLASLt
//! - `graph.rs`: work that is recorded and replayed
//! - `staging.rs`: how uploads are on their way while the process goes on
//! - `event.rs`: marks in a stream, to wait for and to measure with
//! - `result.rs`: the driver's answers as errors

mod device;
mod event;
mod graph;
mod lt;
mod modules;
mod result;
mod staging;

use std::ffi::{c_char, c_void};
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUipcMem_flags, CUipcMemHandle, CUresult,
    CUstream, CUstream_flags,
};

use self::device::{attribute, device, properties};
use self::event::{Event, Stopwatch};
use self::graph::Unrestricted;
use self::lt::{CublasLt, Operands};
use self::modules::Modules;
use self::result::check;
use self::staging::Staging;
use super::{DevicePtr, Driver, Grid, Kernel, Mark, Memory, Multiply, Properties, Queue, Recorded, Rows};
use crate::OpError;

const OPEN: &str = "open GPU";

/// Allocations begin at multiples of this.
const ALIGNMENT: usize = 256;

/// A GPU with its context, and the one stream that this process uses of it.
#[derive(Debug)]
pub(in crate::cuda) struct Nvidia {
    context: CUcontext,
    device: CUdevice,
    stream: CUstream,
    uploads: CUstream,
    /// Behind the work that uploads must not overtake.
    work: Event,
    properties: Properties,
    /// Second-level cache.
    cache_bytes: usize,
    // These are locked by the one thread that launches, so nobody waits.
    modules: Mutex<Modules>,
    staging: Mutex<Staging>,
    /// Opened by the first product.
    products: Mutex<Option<CublasLt>>,
}

// SAFETY: the driver's handles may be used from any thread; each call below makes the context current first.
unsafe impl Send for Nvidia {}
// SAFETY: the same; what is mutable is behind a lock.
unsafe impl Sync for Nvidia {}

impl Nvidia {
    pub(in crate::cuda) fn open(ordinal: u32) -> Result<Self, OpError> {
        init()?;
        let device = device(ordinal)?;
        let properties = properties(device)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device exists; the context is kept as long as the process lives.
        check(OPEN, unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        // SAFETY: a context of this process.
        check(OPEN, unsafe { sys::cuCtxSetCurrent(context) })?;
        let [stream, uploads] = [stream()?, stream()?];
        let cache_bytes = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
        Ok(Self {
            context,
            device,
            stream,
            uploads,
            work: Event::new(OPEN)?,
            properties,
            cache_bytes,
            modules: Mutex::default(),
            staging: Mutex::new(Staging::new(OPEN)?),
            products: Mutex::default(),
        })
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

/// How many GPUs this process may see.
pub(in crate::cuda) fn count() -> Result<u32, OpError> {
    init()?;
    device::count()
}

/// Loads the driver, unless that has been done.
fn init() -> Result<(), OpError> {
    // SAFETY: it only tries to load the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpError::driver(OPEN, "there is no CUDA driver on this machine (libcuda.so.1)"));
    }
    // SAFETY: the first call into the driver; it may be made again.
    check(OPEN, unsafe { sys::cuInit(0) })
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

/// A stream that does not wait for work outside of any, as some libraries may have. It stays as long as the process.
fn stream() -> Result<CUstream, OpError> {
    let mut stream = std::ptr::null_mut();
    let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the context is current.
    check(OPEN, unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
    Ok(stream)
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
        // The driver may wait for what uses it, or may not.
        let waited = self.enter(OP).and_then(|()| {
            // SAFETY: both streams live as long as the process.
            check(OP, unsafe { sys::cuStreamSynchronize(self.uploads) })?;
            self.synchronize(OP)
        });
        // SAFETY: allocated by `allocate` and freed once, as the caller vouches.
        let freed = check(OP, unsafe { sys::cuMemFree_v2(ptr.0) });
        // Where the device has failed, the process ends and its memory with it; the failure itself was reported.
        drop(waited.and(freed));
    }

    unsafe fn upload(&self, to: DevicePtr, from: &[u8]) -> Result<(), OpError> {
        const OP: &str = "upload";
        self.enter(OP)?;
        // SAFETY: there is room, as the caller vouches.
        unsafe { self.staging.lock().expect(LOCKED).upload(OP, to, from, self.stream) }
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

    fn load(&self, op: &'static str, kernel: Kernel, size: usize) -> Result<(), OpError> {
        self.enter(op)?;
        self.function(op, kernel, 0, size).map(drop)
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
        .map_err(|error| self.blame(error))
    }

    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, OpError> {
        const OP: &str = "pin";
        self.enter(OP)?;
        staging::pin(OP, bytes)
    }

    unsafe fn unpin(&self, memory: NonNull<u8>) {
        const OP: &str = "unpin";
        // SAFETY: from `pin`, and nothing is under way, as the caller vouches.
        let freed =
            self.enter(OP).and_then(|()| check(OP, unsafe { sys::cuMemFreeHost(memory.as_ptr().cast()) }));
        // Where the device has failed, the process ends and its memory with it; the failure itself was reported.
        drop(freed);
    }

    fn create_mark(&self) -> Result<Mark, OpError> {
        const OP: &str = "create event";
        self.enter(OP)?;
        Event::new(OP).map(Event::into_mark)
    }

    unsafe fn destroy_mark(&self, mark: Mark) {
        if self.enter("destroy event").is_ok() {
            // SAFETY: from `create_mark`, and it goes once, as the caller vouches.
            drop(ManuallyDrop::into_inner(unsafe { Event::of_mark(mark) }));
        }
    }

    fn put(&self, mark: Mark, queue: Queue) -> Result<(), OpError> {
        const OP: &str = "record event";
        self.enter(OP)?;
        let stream = match queue {
            Queue::Work => self.stream,
            Queue::Uploads => self.uploads,
        };
        // SAFETY: from `create_mark`; who has it has not destroyed it.
        unsafe { Event::of_mark(mark) }.record(OP, stream)
    }

    fn wait(&self, op: &'static str, mark: Mark) -> Result<(), OpError> {
        self.enter(op)?;
        // SAFETY: from `create_mark`; who has it has not destroyed it.
        unsafe { Event::of_mark(mark) }.wait(op)
    }

    fn uploads_follow_work(&self) -> Result<(), OpError> {
        const OP: &str = "upload";
        self.enter(OP)?;
        self.work.record(OP, self.stream)?;
        self.work.hold_back(OP, self.uploads)
    }

    unsafe fn upload_rows(&self, rows: &Rows) -> Result<(), OpError> {
        const OP: &str = "upload";
        self.enter(OP)?;
        // SAFETY: both sides have room for it, as the caller vouches.
        unsafe { staging::upload_rows(OP, rows, self.uploads) }
    }

    unsafe fn download_later(&self, from: DevicePtr, to: NonNull<u8>, bytes: usize) -> Result<(), OpError> {
        const OP: &str = "download";
        self.enter(OP)?;
        // SAFETY: both sides have as many bytes, as the caller vouches.
        check(OP, unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_ptr().cast(), from.0, bytes, self.stream) })
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

    fn identity(&self) -> u64 {
        self.device as u64
    }

    unsafe fn export(&self, ptr: DevicePtr) -> Result<[u8; 64], OpError> {
        const OP: &str = "export";
        self.enter(OP)?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: allocated by `allocate`, as the caller vouches.
        check(OP, unsafe { sys::cuIpcGetMemHandle(&mut handle, ptr.0) })?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    unsafe fn import(&self, handle: &[u8; 64]) -> Result<DevicePtr, OpError> {
        const OP: &str = "import";
        self.enter(OP)?;
        let handle = CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        // The memory may be another device's.
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut ptr = 0;
        // SAFETY: from another process, as the caller vouches.
        check(OP, unsafe { sys::cuIpcOpenMemHandle_v2(&mut ptr, handle, flags) })?;
        Ok(DevicePtr(ptr))
    }

    fn on_stream(
        &self,
        op: &'static str,
        run: &mut dyn FnMut(*mut c_void) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        self.enter(op)?;
        run(self.stream.cast()).map_err(|error| self.blame(error))
    }

    fn synchronize(&self, op: &'static str) -> Result<(), OpError> {
        self.enter(op)?;
        // SAFETY: the stream lives as long as the process.
        check(op, unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}
