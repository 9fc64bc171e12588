//! What a device has to be able to do.

#[cfg(feature = "emulation")]
pub(super) mod emulated;
pub(super) mod journal;
pub(super) mod ledger;
#[cfg(feature = "cuda")]
pub(super) mod nvidia;

use std::ffi::c_void;
use std::fmt::Debug;
use std::ptr::NonNull;

use super::Element;
use super::params::fit;
use crate::OpError;

/// An address in the device's memory. Zero is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct DevicePtr(pub(super) u64);

impl DevicePtr {
    pub(super) const NULL: Self = Self(0);
}

/// Work that a driver has recorded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recorded {
    /// The driver's name for it.
    pub(super) handle: u64,
    /// Launches, products, copies and fills.
    pub(super) operations: usize,
}

/// A mark between the things that a device was asked to do. The driver's name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Mark(pub(super) u64);

/// What runs in order. Between the two there is no order, unless it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// All that computes, and copies that are part of it.
    Work,
    /// Uploads from pinned memory.
    Uploads,
}

/// Rows that lie one after the other in pinned memory, and apart on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) from: *const u8,
    pub(super) to: DevicePtr,
    pub(super) rows: usize,
    pub(super) row_bytes: usize,
    /// From a row on the device to the next.
    pub(super) stride_bytes: usize,
}

// SAFETY: the memory is not of a thread.
unsafe impl Send for Rows {}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor; `(0, 0)` where kernels are emulated.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory of a block.
    pub shared_bytes_max: u32,
    /// Version of the driver, as in `13000`.
    pub driver_version: u32,
}

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Not taken by anybody.
    pub free: usize,
    /// All there is.
    pub total: usize,
}

/// A kernel by name. A table of them is one per element type or head size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The source file, without its ending.
    pub module: &'static str,
    /// The function.
    pub name: &'static str,
}

/// Most blocks of a grid along y.
const PIECES_MAX: usize = 65_535;

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x, y and z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Grid {
    /// Most blocks along y, and along z.
    pub const ACROSS_MAX: u32 = 65535;

    /// Blocks along x alone, without dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads, shared_bytes: 0 }
    }

    /// As many threads as there are items, in blocks.
    pub fn covering(items: usize, threads: u32) -> Self {
        let blocks = items.div_ceil(threads as usize).clamp(1, i32::MAX as usize);
        Self::linear(blocks as u32, threads)
    }

    /// A thread for each item, in blocks along x. Errors when there cannot be so many.
    pub(super) fn of(op: &'static str, items: usize, threads: usize) -> Result<Self, OpError> {
        Ok(Self::linear(fit(op, "work", items.div_ceil(threads))?, threads as u32))
    }

    /// Blocks along x for the rows, and along y for pieces of a row, so that each of its items has a thread. Errors when
    /// there cannot be so many.
    pub(super) fn rows(
        op: &'static str,
        rows: usize,
        items: usize,
        threads_max: usize,
    ) -> Result<Self, OpError> {
        let threads = items.next_multiple_of(32).clamp(32, threads_max);
        let pieces = items.div_ceil(threads).max(1);
        if pieces > PIECES_MAX {
            return Err(OpError::Index { op, what: "piece of a row", index: pieces, limit: PIECES_MAX + 1 });
        }
        let blocks = [fit(op, "rows", rows)?, pieces as u32, 1];
        Ok(Self { blocks, threads: threads as u32, shared_bytes: 0 })
    }
}

/// A dense product `out = input * weight^T + add * out`, for each of `batch` at even distances. All matrices are row-major;
/// strides count elements, from a row to the next. Sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Multiply {
    /// Rows of `input` and `out`.
    pub rows: usize,
    /// Columns of `out`, rows of `weight`.
    pub outputs: usize,
    /// Columns of `input` and `weight`.
    pub inputs: usize,
    /// Type of `input` and `weight`.
    pub element: Element,
    /// Type of `out`: the same, or f32.
    pub out_element: Element,
    /// From a row of `input` to the next.
    pub input_stride: usize,
    /// From a row of `weight` to the next.
    pub weight_stride: usize,
    /// From a row of `out` to the next.
    pub out_stride: usize,
    /// Whether the product is added to what `out` holds.
    pub add: bool,
    /// Products of this shape.
    pub batch: usize,
    /// From one to the next, in `input`, `weight` and `out`.
    pub batch_strides: [usize; 3],
}

impl Multiply {
    /// Elements from the first to the last, of input, weight and output. None for what overlaps itself, or cannot be counted.
    pub(super) fn extents(&self) -> [Option<usize>; 3] {
        let Self { rows, outputs, inputs, batch, batch_strides, .. } = *self;
        let extent = |rows: usize, cols: usize, stride: usize, between: usize| {
            let start = (batch.checked_sub(1)?.checked_mul(between)?)
                .checked_add(rows.checked_sub(1)?.checked_mul(stride)?)?;
            start.checked_add(cols).filter(|_| stride >= cols)
        };
        [
            extent(rows, inputs, self.input_stride, batch_strides[0]),
            extent(outputs, inputs, self.weight_stride, batch_strides[1]),
            extent(rows, outputs, self.out_stride, batch_strides[2]),
        ]
    }
}

/// A device, driven from one thread at a time, with one stream of work that runs in order, and one of uploads beside it.
///
/// Pointers are to memory of this device, and must stay allocated until the stream is done with them: [`free`](Self::free)
/// is behind all work before it.
pub(super) trait Driver: Send + Sync + Debug {
    /// What the device is.
    fn properties(&self) -> &Properties;

    /// Whether its memory holds what is written there. One that only counts does not.
    fn stores(&self) -> bool {
        true
    }

    /// How much memory there is.
    fn memory(&self) -> Result<Memory, OpError>;

    /// Memory that nobody else has, at an address that is a multiple of 256.
    fn allocate(&self, bytes: usize) -> Result<DevicePtr, OpError>;

    /// Gives memory back.
    ///
    /// # Safety
    /// It comes from `allocate` and is not used by anything that is launched later.
    unsafe fn free(&self, ptr: DevicePtr);

    /// Copies to the device. `from` may change as soon as this returns.
    ///
    /// # Safety
    /// `to` has room for it.
    unsafe fn upload(&self, to: DevicePtr, from: &[u8]) -> Result<(), OpError>;

    /// Copies from the device, when all work before is done.
    ///
    /// # Safety
    /// `from` has as many bytes.
    unsafe fn download(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), OpError>;

    /// Copies within the device.
    ///
    /// # Safety
    /// Both have as many bytes and do not overlap.
    unsafe fn copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), OpError>;

    /// Sets every byte.
    ///
    /// # Safety
    /// `to` has as many bytes.
    unsafe fn fill(&self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), OpError>;

    /// Runs a kernel, whose only parameter is a struct of `size` bytes at `params`.
    ///
    /// # Safety
    /// The struct is the kernel's, and what it points to is as the kernel expects.
    unsafe fn launch(
        &self,
        op: &'static str,
        kernel: Kernel,
        grid: Grid,
        params: *const c_void,
        size: usize,
    ) -> Result<(), OpError>;

    /// Runs a dense product.
    ///
    /// # Safety
    /// The matrices lie in memory as `product` says.
    unsafe fn multiply(
        &self,
        op: &'static str,
        product: &Multiply,
        input: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), OpError>;

    /// Finds out how to run products like this one fastest, by trying. `out` stays as it is. Waits for all work.
    ///
    /// Products that have run before go on as they did.
    ///
    /// # Safety
    /// As for [`multiply`](Self::multiply).
    unsafe fn tune(
        &self,
        _op: &'static str,
        _product: &Multiply,
        _input: DevicePtr,
        _weight: DevicePtr,
        _out: DevicePtr,
    ) -> Result<(), OpError> {
        Ok(())
    }

    /// Memory of this process that the device reads and writes by itself, while the process goes on. Its bytes are set to
    /// something.
    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, OpError>;

    /// Gives it back.
    ///
    /// # Safety
    /// It comes from `pin`, and no copy from or to it is under way.
    unsafe fn unpin(&self, memory: NonNull<u8>);

    /// A mark that has been passed.
    fn create_mark(&self) -> Result<Mark, OpError>;

    /// It is not used any more.
    ///
    /// # Safety
    /// It comes from `create_mark`, and goes once.
    unsafe fn destroy_mark(&self, mark: Mark);

    /// Puts the mark behind what was asked for so far.
    fn put(&self, mark: Mark, queue: Queue) -> Result<(), OpError>;

    /// Waits until the mark has been passed.
    fn wait(&self, op: &'static str, mark: Mark) -> Result<(), OpError>;

    /// Uploads asked for from now on begin when all work asked for so far is done.
    fn uploads_follow_work(&self) -> Result<(), OpError>;

    /// Copies to the device, at some time between now and when a mark behind it has been passed.
    ///
    /// # Safety
    /// Both sides have room for it. What is in pinned memory stays so long.
    unsafe fn upload_rows(&self, rows: &Rows) -> Result<(), OpError>;

    /// Copies to pinned memory, behind all work before; it has arrived when a mark behind it has been passed.
    ///
    /// # Safety
    /// Both sides have room for it, and nobody looks at `to` before.
    unsafe fn download_later(&self, from: DevicePtr, to: NonNull<u8>, bytes: usize) -> Result<(), OpError>;

    /// From here on, what this thread starts is recorded and not done: launches, products, copies within the device and
    /// fills. Nothing else may be asked for until one of the next two ends it.
    fn begin_capture(&self) -> Result<(), OpError>;

    /// What has been recorded, for [`replay`](Self::replay). An error ends the capture as well.
    fn end_capture(&self) -> Result<Recorded, OpError>;

    /// Forgets what has been recorded.
    fn abandon_capture(&self);

    /// Does what was recorded.
    ///
    /// # Safety
    /// It has not been forgotten, and the memory that it uses is still allocated.
    unsafe fn replay(&self, recorded: Recorded) -> Result<(), OpError>;

    /// It will not be replayed any more.
    ///
    /// # Safety
    /// It has not been forgotten before.
    unsafe fn forget(&self, recorded: Recorded);

    /// Which device this is, among those of this process.
    fn identity(&self) -> u64;

    /// What lets another process use this memory.
    ///
    /// # Safety
    /// It comes from `allocate`, and stays allocated while others use it.
    unsafe fn export(&self, ptr: DevicePtr) -> Result<[u8; 64], OpError>;

    /// The memory of another process, for as long as this one lives. Errors when it cannot be reached.
    ///
    /// # Safety
    /// The handle comes from `export` in another process, which keeps the memory.
    unsafe fn import(&self, handle: &[u8; 64]) -> Result<DevicePtr, OpError>;

    /// Has a library start something on the stream of work, in whose context this thread is then.
    #[cfg(feature = "cuda")]
    fn on_stream(
        &self,
        op: &'static str,
        run: &mut dyn FnMut(*mut c_void) -> Result<(), OpError>,
    ) -> Result<(), OpError>;

    /// Waits until all work is done; the errors of what ran come here at the latest.
    fn synchronize(&self, op: &'static str) -> Result<(), OpError>;
}
