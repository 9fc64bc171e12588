use std::ptr::{NonNull, copy_nonoverlapping, null_mut};

use cudarc::driver::sys::{self, CUDA_MEMCPY2D, CUmemorytype, CUstream};

use super::check;
use super::event::Event;
use crate::OpError;
use crate::cuda::driver::{DevicePtr, Rows};

/// A few, so that the uploads of some steps find room without waiting; each as long as the longest of a usual step.
const SLOTS: usize = 32;
const SLOT_BYTES: usize = 128 << 10;

/// Pinned memory that uploads go through. From memory that is not, the driver may only copy when the stream has come so
/// far, and the process would wait for it.
#[derive(Debug)]
pub(super) struct Staging {
    memory: NonNull<u8>,
    /// Whether a slot can be used again.
    free: Vec<Event>,
    next: usize,
}

// SAFETY: the memory is not of a thread.
unsafe impl Send for Staging {}

impl Staging {
    /// It stays as long as the process.
    pub(super) fn new(op: &'static str) -> Result<Self, OpError> {
        let free = (0..SLOTS).map(|_| Event::new(op)).collect::<Result<_, _>>()?;
        Ok(Self { memory: pin(op, SLOTS * SLOT_BYTES)?, free, next: 0 })
    }

    /// Copies to the device, in the order of the stream. `from` may change as soon as this returns.
    ///
    /// # Safety
    /// `to` has room for it.
    pub(super) unsafe fn upload(
        &mut self,
        op: &'static str,
        to: DevicePtr,
        from: &[u8],
        stream: CUstream,
    ) -> Result<(), OpError> {
        for (index, chunk) in from.chunks(SLOT_BYTES).enumerate() {
            let (slot, to) = (self.next, to.0 + (index * SLOT_BYTES) as u64);
            self.next = (slot + 1) % SLOTS;
            self.free[slot].wait(op)?;
            // SAFETY: a slot of that many, which nobody reads now; a chunk is not longer than a slot.
            let slot_memory = unsafe { self.memory.add(slot * SLOT_BYTES) };
            // SAFETY: the same.
            unsafe { copy_nonoverlapping(chunk.as_ptr(), slot_memory.as_ptr(), chunk.len()) };
            // SAFETY: there is room, as the caller vouches; the slot stays as it is until its event has been passed.
            check(op, unsafe {
                sys::cuMemcpyHtoDAsync_v2(to, slot_memory.as_ptr().cast(), chunk.len(), stream)
            })?;
            self.free[slot].record(op, stream)?;
        }
        Ok(())
    }
}

/// Copies rows to the device.
///
/// # Safety
/// Both sides have room for it; the pinned memory stays as it is until the stream has come so far.
pub(super) unsafe fn upload_rows(op: &'static str, rows: &Rows, stream: CUstream) -> Result<(), OpError> {
    let &Rows { from, to, rows, row_bytes, stride_bytes } = rows;
    if rows == 1 || stride_bytes == row_bytes {
        // SAFETY: as the caller vouches.
        return check(op, unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.cast(), rows * row_bytes, stream) });
    }
    let copy = CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
        srcHost: from.cast(),
        srcDevice: 0,
        srcArray: null_mut(),
        srcPitch: row_bytes,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: null_mut(),
        dstDevice: to.0,
        dstArray: null_mut(),
        dstPitch: stride_bytes,
        WidthInBytes: row_bytes,
        Height: rows,
    };
    // SAFETY: as the caller vouches. The description is read before this returns.
    check(op, unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream) })
}

/// Memory that the device reads and writes by itself.
pub(super) fn pin(op: &'static str, bytes: usize) -> Result<NonNull<u8>, OpError> {
    let mut memory = null_mut();
    // SAFETY: the context is current; no flags.
    check(op, unsafe { sys::cuMemHostAlloc(&mut memory, bytes, 0) })?;
    let memory: NonNull<u8> = NonNull::new(memory.cast()).expect("memory has an address");
    // SAFETY: there are as many bytes. From now on they are numbers, if not those of anything.
    unsafe { memory.write_bytes(0, bytes) };
    Ok(memory)
}
