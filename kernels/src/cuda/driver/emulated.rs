//! No device: kernels run as fibers on the calling thread (`kernels/emulation/`), each launch to its end. Every access of a
//! kernel to shared and device memory is checked.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

use half::{bf16, f16};

use super::{DevicePtr, Driver, Grid, Kernel, Memory, Multiply, Properties};
use crate::OpError;
use crate::cuda::Element;

/// In which order the threads of a block get their turn. A wrong kernel may well be right in one order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Each thread until it has to wait, the first one first.
    Forward,
    /// The same from the last.
    Reverse,
    /// A random one, also interrupted at random accesses, by this seed.
    Random(u64),
}

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
    fn emu_malloc(bytes: usize) -> *mut c_void;
    fn emu_free(address: *mut c_void);
    fn emu_schedule(order: c_int, seed: u64);
    fn emu_workers(count: c_uint);
    fn emu_counter(name: *const c_char) -> u64;
    fn emu_layout(index: usize) -> *const c_char;
}

/// The emulator of one thread of work.
#[derive(Debug)]
pub(in crate::cuda) struct Emulated {
    schedule: Schedule,
    properties: Properties,
}

impl Emulated {
    pub(in crate::cuda) fn new(schedule: Schedule) -> Self {
        let properties = Properties {
            name: "emulated".to_owned(),
            capability: (0, 0),
            multiprocessors: 4,
            shared_bytes_max: 227 << 10,
            driver_version: 0,
        };
        Self { schedule, properties }
    }
}

/// What has happened since the start of the process: `launches`, `blocks`, `threads`, `switches`, `accesses`, or
/// `matrix_bank_conflicts`. 0 for any other name.
pub fn counter(name: &str) -> u64 {
    let name = c_string(name);
    // SAFETY: a zero-terminated string.
    unsafe { emu_counter(name.as_ptr()) }
}

/// The structs of parameters as the kernels declare them: `name size field:offset:size …`, one per line.
pub fn layouts() -> Vec<String> {
    let text = |index| {
        // SAFETY: a zero-terminated string that lives as long as the process, or null behind the last.
        let text = unsafe { emu_layout(index) };
        // SAFETY: the same.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    (0..).map_while(text).collect()
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("names have no zero byte")
}

impl Driver for Emulated {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<Memory, OpError> {
        // As much as tests will ever need, and not so much that a cache sized by it takes time to fill.
        Ok(Memory { free: 64 << 20, total: 64 << 20 })
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, OpError> {
        if bytes > isize::MAX as usize / 2 {
            return Err(OpError::Memory { op: "allocate", bytes, free: self.memory()?.free });
        }
        // SAFETY: any size is allowed.
        let address = unsafe { emu_malloc(bytes) };
        if address.is_null() {
            return Err(OpError::Memory { op: "allocate", bytes, free: 0 });
        }
        Ok(DevicePtr(address.addr() as u64))
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        // SAFETY: allocated by `emu_malloc`, freed once, as the caller vouches.
        unsafe { emu_free(host(ptr)) }
    }

    unsafe fn upload(&self, to: DevicePtr, from: &[u8]) -> Result<(), OpError> {
        // SAFETY: device memory is this process's memory, and has room, as the caller vouches.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host(to).cast(), from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), OpError> {
        // SAFETY: device memory is this process's memory, and has as many bytes, as the caller vouches.
        unsafe { std::ptr::copy_nonoverlapping(host(from).cast(), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), OpError> {
        // SAFETY: both have as many bytes and do not overlap, as the caller vouches.
        unsafe { std::ptr::copy_nonoverlapping(host(from).cast::<u8>(), host(to).cast(), bytes) };
        Ok(())
    }

    unsafe fn fill(&self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), OpError> {
        // SAFETY: it has as many bytes, as the caller vouches.
        unsafe { std::ptr::write_bytes(host(to).cast::<u8>(), byte, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        op: &'static str,
        kernel: Kernel,
        grid: Grid,
        params: *const c_void,
        size: usize,
    ) -> Result<(), OpError> {
        let name = c_string(kernel.name);
        // SAFETY: a zero-terminated string.
        let expected = unsafe { emu_parameter_size(name.as_ptr()) };
        if expected != size {
            let reason = format!("kernel {} takes {expected} bytes of parameters, not {size}", kernel.name);
            return Err(OpError::device(op, reason));
        }
        let (order, seed) = match self.schedule {
            Schedule::Forward => (0, 0),
            Schedule::Reverse => (1, 0),
            Schedule::Random(seed) => (2, seed),
        };
        let [x, y, z] = grid.blocks;
        let (blocks, threads) = (Dim { x, y, z }, Dim { x: grid.threads, y: 1, z: 1 });
        let mut arguments = [params.cast_mut()];
        // SAFETY: plain values; both hold for this thread's launches alone.
        unsafe {
            emu_schedule(order, seed);
            emu_workers(1);
        }
        // SAFETY: one argument, of the size that the kernel takes; it is read only.
        let code =
            unsafe { emu_launch(name.as_ptr(), blocks, threads, grid.shared_bytes, arguments.as_mut_ptr()) };
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a zero-terminated text that stays until this thread's next launch.
        let reason = unsafe { CStr::from_ptr(emu_last_error()) }.to_string_lossy().into_owned();
        Err(OpError::device(op, reason))
    }

    /// Plain loops with f32 sums: what a library does on a GPU is not what is tested here.
    unsafe fn multiply(
        &self,
        _op: &'static str,
        product: &Multiply,
        input: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), OpError> {
        let read = |ptr, count| {
            // SAFETY: the caller vouches for the sizes.
            unsafe { read(ptr, product.element, count) }
        };
        for index in 0..product.batch {
            let at = |ptr: DevicePtr, which: usize, element: Element| {
                DevicePtr(ptr.0 + (index * product.batch_strides[which] * element.size()) as u64)
            };
            let input = read(
                at(input, 0, product.element),
                (product.rows - 1) * product.input_stride + product.inputs,
            );
            let weight = read(
                at(weight, 1, product.element),
                (product.outputs - 1) * product.weight_stride + product.inputs,
            );
            let out = at(out, 2, product.out_element);
            for row in 0..product.rows {
                let x = &input[row * product.input_stride..][..product.inputs];
                for output in 0..product.outputs {
                    let w = &weight[output * product.weight_stride..][..product.inputs];
                    let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                    let offset = (row * product.out_stride + output) * product.out_element.size();
                    // SAFETY: the caller vouches for the sizes.
                    unsafe {
                        write(DevicePtr(out.0 + offset as u64), product.out_element, sum, product.add);
                    }
                }
            }
        }
        Ok(())
    }

    fn synchronize(&self, _op: &'static str) -> Result<(), OpError> {
        Ok(())
    }
}

fn host(ptr: DevicePtr) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(ptr.0 as usize)
}

/// # Safety
/// There are as many elements.
unsafe fn read(ptr: DevicePtr, element: Element, count: usize) -> Vec<f32> {
    let at = host(ptr);
    match element {
        // SAFETY: the caller vouches for the size; device memory is aligned.
        Element::F32 => unsafe { std::slice::from_raw_parts(at.cast::<f32>(), count) }.to_vec(),
        // SAFETY: the same.
        Element::F16 => unsafe { std::slice::from_raw_parts(at.cast::<f16>(), count) }
            .iter()
            .map(|element| element.to_f32())
            .collect(),
        // SAFETY: the same.
        Element::BF16 => unsafe { std::slice::from_raw_parts(at.cast::<bf16>(), count) }
            .iter()
            .map(|element| element.to_f32())
            .collect(),
        Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
            unreachable!("products are of floats of 16 or 32 bits")
        }
    }
}

/// # Safety
/// There is such an element.
unsafe fn write(ptr: DevicePtr, element: Element, value: f32, add: bool) {
    let at = host(ptr);
    macro_rules! write_as {
        ($type:ty, $read:expr, $write:expr) => {{
            let at = at.cast::<$type>();
            // SAFETY: the caller vouches for the element; device memory is aligned.
            let before: f32 = if add { $read(unsafe { at.read() }) } else { 0.0 };
            // SAFETY: the same.
            unsafe { at.write($write(before + value)) }
        }};
    }
    match element {
        Element::F32 => write_as!(f32, |value| value, |value| value),
        Element::F16 => write_as!(f16, f16::to_f32, f16::from_f32),
        Element::BF16 => write_as!(bf16, bf16::to_f32, bf16::from_f32),
        Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
            unreachable!("products are of floats of 16 or 32 bits")
        }
    }
}
