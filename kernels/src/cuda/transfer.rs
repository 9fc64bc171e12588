use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::buffer::wrong_element;
use super::driver::{DevicePtr, Mark, Queue, Rows};
use super::{Element, Gpu, HostElement, Slice, SliceMut};
use crate::{DType, Matrix, OpError};

const UPLOAD: &str = "upload";
const DOWNLOAD: &str = "download";

/// Rows in a chunk begin at multiples of this.
const CHUNK_ALIGNMENT: usize = 64;

/// From how many bytes on several threads fill a chunk: below, it takes about as long as to wake them.
const PARALLEL_BYTES: usize = 256 << 10;

/// Uploads weights: fills chunks of pinned memory in turn, while those filled before are being copied. So the disk that a
/// mapped file is read from, the conversion of its elements and the bus to the device work at the same time.
///
/// The last uploads have arrived when [`finish`](Self::finish) returns; before that, nothing may be expected of what a
/// buffer holds.
#[derive(Debug)]
pub struct Uploader {
    gpu: Arc<Gpu>,
    chunks: Vec<Chunk>,
    chunk_bytes: usize,
    /// The chunk that is being filled, and how much of it is.
    current: usize,
    used: usize,
}

/// Pinned memory, and whether what is in it has been copied.
#[derive(Debug)]
struct Chunk {
    memory: Pinned,
    copied: Marked,
}

impl Uploader {
    /// With `chunks` chunks of `chunk_bytes`, at least two of at least 4 KiB. A few of some MiB keep any bus busy.
    ///
    /// Errors when the system has no memory to pin.
    pub fn new(gpu: &Arc<Gpu>, chunk_bytes: usize, chunks: usize) -> Result<Self, OpError> {
        let chunk_bytes = chunk_bytes.max(4096).next_multiple_of(CHUNK_ALIGNMENT);
        let chunk = |_| Ok(Chunk { memory: Pinned::new(gpu, chunk_bytes)?, copied: Marked::new(gpu)? });
        let chunks = (0..chunks.max(2)).map(chunk).collect::<Result<_, OpError>>()?;
        Ok(Self { gpu: gpu.clone(), chunks, chunk_bytes, current: 0, used: 0 })
    }

    /// Puts the rows of a matrix into a buffer, `stride` elements from one to the next, the first of them at `offset`; what
    /// lies between stays. Elements become those of the buffer, rounded to the nearest where it holds fewer bits.
    ///
    /// All work on the device before this is done before the first row arrives.
    ///
    /// Errors when the buffer is not of floats of 16 or 32 bits, or the rows do not fit.
    pub fn rows(
        &mut self,
        to: SliceMut<'_>,
        offset: usize,
        stride: usize,
        from: Matrix<'_>,
    ) -> Result<(), OpError> {
        self.gpu.outside_capture(UPLOAD)?;
        let convert = Convert::new(from.dtype(), to.element())?;
        let (rows, cols) = (from.rows(), from.cols());
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let last = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(offset));
        let end = last.and_then(|start| start.checked_add(cols)).unwrap_or(usize::MAX);
        if stride < cols || end > to.len() {
            return Err(OpError::Length { op: UPLOAD, what: "buffer", expected: end, found: to.len() });
        }
        self.gpu.driver().uploads_follow_work()?;
        let size = to.element().size();
        let target = Target { at: to.ptr, offset, stride, size };
        if cols * size <= self.chunk_bytes {
            self.whole_rows(from, convert, target)
        } else {
            let cols_max = self.chunk_bytes / size;
            for row in 0..rows {
                for start in (0..cols).step_by(cols_max) {
                    let cols = start..cols.min(start + cols_max);
                    self.piece(from, convert, row..row + 1, cols, target)?;
                }
            }
            Ok(())
        }
    }

    /// As many rows at once as there is room for.
    fn whole_rows(&mut self, from: Matrix<'_>, convert: Convert, target: Target) -> Result<(), OpError> {
        let row_bytes = from.cols() * target.size;
        let mut next = 0;
        while next < from.rows() {
            let room = (self.chunk_bytes - self.used) / row_bytes;
            let count = if room == 0 { self.chunk_bytes / row_bytes } else { room };
            let rows = next..from.rows().min(next + count);
            next = rows.end;
            self.piece(from, convert, rows, 0..from.cols(), target)?;
        }
        Ok(())
    }

    /// Part of a matrix that fits into a chunk.
    fn piece(
        &mut self,
        from: Matrix<'_>,
        convert: Convert,
        rows: Range<usize>,
        cols: Range<usize>,
        target: Target,
    ) -> Result<(), OpError> {
        let row_bytes = cols.len() * target.size;
        let bytes = rows.len() * row_bytes;
        let room = self.room(bytes)?;
        let source = cols.start * from.dtype().size()..cols.end * from.dtype().size();
        let fill =
            |(row, to): (usize, &mut [u8])| convert.run(&from.row(rows.start + row)[source.clone()], to);
        if bytes < PARALLEL_BYTES {
            room.chunks_exact_mut(row_bytes).enumerate().for_each(fill);
        } else {
            room.par_chunks_exact_mut(row_bytes).enumerate().for_each(fill);
        }
        let rows = Rows {
            from: room.as_ptr(),
            to: target.element(rows.start, cols.start),
            rows: rows.len(),
            row_bytes,
            stride_bytes: target.stride * target.size,
        };
        // SAFETY: the rows end within the buffer, as `rows` has checked; a chunk is written again when it has been copied,
        // and memory is not freed before uploads to it are done.
        unsafe { self.gpu.driver().upload_rows(&rows) }
    }

    /// Room for as many bytes, which are not more than a chunk has, in memory that is not being copied.
    fn room(&mut self, bytes: usize) -> Result<&mut [u8], OpError> {
        if bytes > self.chunk_bytes - self.used {
            self.chunks[self.current].copied.put(Queue::Uploads)?;
            self.current = (self.current + 1) % self.chunks.len();
            self.chunks[self.current].copied.wait(UPLOAD)?;
            self.used = 0;
        }
        let start = self.used;
        self.used = (start + bytes).next_multiple_of(CHUNK_ALIGNMENT).min(self.chunk_bytes);
        // SAFETY: what was copied from this part of the chunk has been waited for, and no other slice of it exists.
        Ok(unsafe { self.chunks[self.current].memory.slice_mut(start..start + bytes) })
    }

    /// Waits until all that was uploaded is there.
    pub fn finish(&mut self) -> Result<(), OpError> {
        let current = &mut self.chunks[self.current];
        current.copied.put(Queue::Uploads)?;
        // Uploads are done in order.
        current.copied.wait(UPLOAD)
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // Where that fails the device has failed, and copies nothing any more.
        let _ = self.finish();
    }
}

/// Where rows go.
#[derive(Clone, Copy)]
struct Target {
    at: DevicePtr,
    offset: usize,
    stride: usize,
    /// Bytes of an element.
    size: usize,
}

impl Target {
    fn element(self, row: usize, col: usize) -> DevicePtr {
        DevicePtr(self.at.0 + ((self.offset + row * self.stride + col) * self.size) as u64)
    }
}

/// From one type of element to another.
#[derive(Clone, Copy)]
struct Convert {
    from: DType,
    to: DType,
}

impl Convert {
    fn new(from: DType, to: Element) -> Result<Self, OpError> {
        let to = match to {
            Element::F32 => DType::F32,
            Element::F16 => DType::F16,
            Element::BF16 => DType::BF16,
            Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
                return Err(wrong_element(UPLOAD, to));
            }
        };
        Ok(Self { from, to })
    }

    /// Little-endian elements on both sides, as many on one as on the other, at any alignment.
    fn run(self, from: &[u8], to: &mut [u8]) {
        if self.from == self.to {
            to.copy_from_slice(from);
            return;
        }
        match self.from {
            DType::F32 => self.write(from.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)), to),
            DType::F16 => {
                let floats = from.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32());
                self.write(floats, to);
            }
            DType::BF16 => {
                let floats = from.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32());
                self.write(floats, to);
            }
        }
    }

    fn write(self, from: impl Iterator<Item = f32>, to: &mut [u8]) {
        match self.to {
            DType::F32 => to.as_chunks_mut().0.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_le_bytes()),
            DType::F16 => {
                let to = to.as_chunks_mut().0.iter_mut();
                to.zip(from).for_each(|(to, x)| *to = f16::from_f32(x).to_le_bytes());
            }
            DType::BF16 => {
                let to = to.as_chunks_mut().0.iter_mut();
                to.zip(from).for_each(|(to, x)| *to = bf16::from_f32(x).to_le_bytes());
            }
        }
    }
}

/// Elements that come from the device while both go on: what a step has computed, when the next one has begun.
#[derive(Debug)]
pub struct Download<T> {
    memory: Pinned,
    arrived: Marked,
    capacity: usize,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: HostElement> Download<T> {
    /// Room for `capacity` elements.
    ///
    /// Errors when the system has no memory to pin.
    pub fn new(gpu: &Arc<Gpu>, capacity: usize) -> Result<Self, OpError> {
        let memory = Pinned::new(gpu, capacity * size_of::<T>())?;
        Ok(Self { memory, arrived: Marked::new(gpu)?, capacity, len: 0, elements: PhantomData })
    }

    /// Sends for these elements, as they are when all work before is done. Waits for those sent for before.
    ///
    /// Errors when there is no room for them, or they are of another type.
    pub fn start(&mut self, from: Slice<'_>) -> Result<(), OpError> {
        let gpu = &self.memory.gpu;
        gpu.outside_capture(DOWNLOAD)?;
        if from.element() != T::ELEMENT {
            return Err(wrong_element(DOWNLOAD, from.element()));
        }
        if from.len() > self.capacity {
            let (expected, found) = (self.capacity, from.len());
            return Err(OpError::Length { op: DOWNLOAD, what: "from", expected, found });
        }
        self.arrived.wait(DOWNLOAD)?;
        self.len = 0;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: there is room, and `finish` waits before it looks. The memory they come from stays allocated until work
        // before is done.
        unsafe { gpu.driver().download_later(from.ptr, self.memory.ptr, from.len() * size_of::<T>()) }?;
        self.arrived.put(Queue::Work)?;
        self.len = from.len();
        Ok(())
    }

    /// The elements sent for last, when they have arrived; none if none were.
    pub fn finish(&mut self) -> Result<&[T], OpError> {
        self.arrived.wait(DOWNLOAD)?;
        // SAFETY: as many elements have arrived; of a type for which every pattern of bytes is one (`HostElement` is sealed);
        // pinned memory is aligned to pages.
        Ok(unsafe { std::slice::from_raw_parts(self.memory.ptr.as_ptr().cast(), self.len) })
    }
}

impl<T> Drop for Download<T> {
    fn drop(&mut self) {
        // Where that fails the device has failed, and copies nothing any more.
        let _ = self.arrived.wait(DOWNLOAD);
    }
}

/// Memory of this process that the device reads and writes by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    gpu: Arc<Gpu>,
    ptr: NonNull<u8>,
}

// SAFETY: the memory is not of a thread; all access is through references to this.
unsafe impl Send for Pinned {}
// SAFETY: the same.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, OpError> {
        gpu.outside_capture("pin")?;
        Ok(Self { gpu: gpu.clone(), ptr: gpu.driver().pin(bytes.max(1))? })
    }

    /// At a multiple of a page's size.
    pub(super) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// # Safety
    /// The range lies within the memory, has been written, and nothing is being copied from or to it.
    unsafe fn slice_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        // SAFETY: as the caller vouches.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().add(range.start), range.len()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: from `pin`; who copies waits for it when dropped, before this is.
        unsafe { self.gpu.driver().unpin(self.ptr) }
    }
}

/// A mark between the things that a device was asked to do.
#[derive(Debug)]
struct Marked {
    gpu: Arc<Gpu>,
    mark: Mark,
}

impl Marked {
    fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        Ok(Self { gpu: gpu.clone(), mark: gpu.driver().create_mark()? })
    }

    fn put(&self, queue: Queue) -> Result<(), OpError> {
        self.gpu.driver().put(self.mark, queue)
    }

    fn wait(&self, op: &'static str) -> Result<(), OpError> {
        self.gpu.driver().wait(op, self.mark)
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        // SAFETY: from `create_mark`, and it goes once.
        unsafe { self.gpu.driver().destroy_mark(self.mark) }
    }
}
