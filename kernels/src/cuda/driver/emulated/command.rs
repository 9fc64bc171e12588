use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::copy_nonoverlapping;

use super::{Schedule, c_string, host, products};
use crate::OpError;
use crate::cuda::driver::{DevicePtr, Grid, Kernel, Multiply};

#[repr(C)]
#[derive(Clone, Copy)]
struct Dim {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

unsafe extern "C" {
    fn emu_launch(
        name: *const c_char,
        grid: Dim,
        block: Dim,
        shared_bytes: c_uint,
        arguments: *mut *mut c_void,
    ) -> c_int;
    fn emu_parameter_size(name: *const c_char) -> usize;
    fn emu_last_error() -> *const c_char;
    fn emu_schedule(order: c_int, seed: u64);
    fn emu_workers(count: c_uint);
}

/// What the driver says when a kernel has done what it must not.
const LAUNCH_FAILED: c_int = 719;

/// A piece of work that can be recorded.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Copy { from: DevicePtr, to: DevicePtr, bytes: usize },
    Fill { to: DevicePtr, byte: u8, bytes: usize },
    Launch { op: &'static str, kernel: Kernel, grid: Grid, params: Params },
    Multiply { product: Multiply, input: DevicePtr, weight: DevicePtr, out: DevicePtr },
}

/// The bytes of a kernel's parameters, aligned as any of them could be.
#[derive(Clone, Debug)]
pub(super) struct Params(Box<[u128]>);

impl Params {
    /// # Safety
    /// There are as many bytes.
    pub(super) unsafe fn copy(from: *const c_void, size: usize) -> Self {
        let mut words = vec![0u128; size.div_ceil(size_of::<u128>())];
        // SAFETY: there are as many bytes, as the caller vouches, and room for them.
        unsafe { copy_nonoverlapping(from.cast::<u8>(), words.as_mut_ptr().cast(), size) };
        Self(words.into())
    }
}

impl Command {
    /// # Safety
    /// What it refers to has the sizes that it expects; copies do not overlap.
    pub(super) unsafe fn run(&self, schedule: Schedule) -> Result<(), OpError> {
        match self {
            // Device memory is this process's memory.
            &Self::Copy { from, to, bytes } => {
                // SAFETY: as the caller vouches.
                unsafe { copy_nonoverlapping(host(from).cast::<u8>(), host(to).cast(), bytes) }
                Ok(())
            }
            &Self::Fill { to, byte, bytes } => {
                // SAFETY: as the caller vouches.
                unsafe { host(to).cast::<u8>().write_bytes(byte, bytes) }
                Ok(())
            }
            // SAFETY: as the caller vouches.
            Self::Launch { op, kernel, grid, params } => unsafe {
                launch(op, *kernel, *grid, params, schedule)
            },
            &Self::Multiply { ref product, input, weight, out } => {
                // SAFETY: as the caller vouches.
                unsafe { products::multiply(product, input, weight, out) }
                Ok(())
            }
        }
    }
}

/// The kernel must be there and take a parameter of this size.
pub(super) fn check_size(op: &'static str, kernel: Kernel, size: usize) -> Result<(), OpError> {
    let name = c_string(kernel.name);
    // SAFETY: a zero-terminated string.
    let expected = unsafe { emu_parameter_size(name.as_ptr()) };
    if expected != size {
        let reason = format!("kernel {} takes {expected} bytes of parameters, not {size}", kernel.name);
        return Err(OpError::driver(op, reason));
    }
    Ok(())
}

/// Runs a kernel to its end.
///
/// # Safety
/// The parameters are the kernel's, and what they point to is as the kernel expects.
unsafe fn launch(
    op: &'static str,
    kernel: Kernel,
    grid: Grid,
    params: &Params,
    schedule: Schedule,
) -> Result<(), OpError> {
    let (order, seed) = match schedule {
        Schedule::Forward => (0, 0),
        Schedule::Reverse => (1, 0),
        Schedule::Random(seed) => (2, seed),
    };
    let name = c_string(kernel.name);
    let [x, y, z] = grid.blocks;
    let (blocks, threads) = (Dim { x, y, z }, Dim { x: grid.threads, y: 1, z: 1 });
    let mut arguments = [params.0.as_ptr().cast_mut().cast::<c_void>()];
    // SAFETY: plain values; both hold for this thread's launches alone.
    unsafe {
        emu_schedule(order, seed);
        emu_workers(1);
    }
    // SAFETY: one argument, of the size that the kernel takes; it is read only.
    let code =
        unsafe { emu_launch(name.as_ptr(), blocks, threads, grid.shared_bytes, arguments.as_mut_ptr()) };
    // SAFETY: a zero-terminated text that stays until this thread's next launch.
    let reason = || unsafe { CStr::from_ptr(emu_last_error()) }.to_string_lossy().into_owned();
    match code {
        0 => Ok(()),
        LAUNCH_FAILED => Err(OpError::device(op, reason())),
        _ => Err(OpError::driver(op, reason())),
    }
}
