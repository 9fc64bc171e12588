//! No device: kernels run as fibers on the calling thread (`kernels/emulation/`), each launch to its end. Every access of a
//! kernel to shared and device memory is checked.
//!
//! - this file: memory, and what is done when
//! - `command.rs`: one piece of work, done now or recorded
//! - `products.rs`: dense products
//! - `transfers.rs`: copies beside the work

mod command;
mod products;
mod transfers;

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

use self::command::Command;
use self::transfers::Transfers;
use super::{DevicePtr, Driver, Grid, Kernel, Mark, Memory, Multiply, Properties, Queue, Recorded, Rows};
use crate::OpError;

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

unsafe extern "C" {
    fn emu_malloc(bytes: usize) -> *mut c_void;
    fn emu_free(address: *mut c_void);
    fn emu_counter(name: *const c_char) -> u64;
    fn emu_layout(index: usize) -> *const c_char;
}

/// The emulator of one thread of work.
#[derive(Debug)]
pub(in crate::cuda) struct Emulated {
    schedule: Schedule,
    properties: Properties,
    captures: Mutex<Captures>,
    transfers: Mutex<Transfers>,
    /// Bytes of what was allocated, by address.
    allocated: Mutex<HashMap<u64, usize>>,
}

/// What is free, however much is taken: as much as tests will ever need, and not so much that a cache sized by it takes time
/// to fill.
const FREE_BYTES: usize = 64 << 20;

/// What is and was recorded.
#[derive(Debug, Default)]
struct Captures {
    recording: Option<Vec<Command>>,
    recorded: HashMap<u64, Arc<[Command]>>,
    count: u64,
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
        Self {
            schedule,
            properties,
            captures: Mutex::default(),
            transfers: Mutex::default(),
            allocated: Mutex::default(),
        }
    }

    fn captures(&self) -> MutexGuard<'_, Captures> {
        self.captures.lock().expect("no thread panics while it holds the lock")
    }

    fn allocated(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.allocated.lock().expect("no thread panics while it holds the lock")
    }

    fn transfers(&self) -> MutexGuard<'_, Transfers> {
        self.transfers.lock().expect("no thread panics while it holds the lock")
    }

    /// Does it, or records it.
    ///
    /// # Safety
    /// What the command refers to is as it expects.
    unsafe fn start(&self, command: Command) -> Result<(), OpError> {
        if let Some(commands) = &mut self.captures().recording {
            commands.push(command);
            return Ok(());
        }
        // SAFETY: as the caller vouches.
        unsafe { command.run(self.schedule) }
    }
}

/// What has happened since the start of the process: `launches`, `blocks`, `threads`, `switches`, `accesses`; and in
/// launches of this thread: `matrix_bank_conflicts`. 0 for any other name.
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
        let taken: usize = self.allocated().values().sum();
        Ok(Memory { free: FREE_BYTES, total: FREE_BYTES + taken })
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, OpError> {
        if bytes > isize::MAX as usize / 2 {
            return Err(OpError::Memory { op: "allocate", bytes, free: FREE_BYTES });
        }
        // SAFETY: any size is allowed.
        let address = unsafe { emu_malloc(bytes) };
        if address.is_null() {
            return Err(OpError::Memory { op: "allocate", bytes, free: 0 });
        }
        let address = address.addr() as u64;
        self.allocated().insert(address, bytes);
        Ok(DevicePtr(address))
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        // As a driver does: it could be the target of one.
        self.transfers().upload_all();
        self.allocated().remove(&ptr.0);
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
        unsafe { self.start(Command::Copy { from, to, bytes }) }
    }

    unsafe fn fill(&self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), OpError> {
        // SAFETY: it has as many bytes, as the caller vouches.
        unsafe { self.start(Command::Fill { to, byte, bytes }) }
    }

    fn load(&self, op: &'static str, kernel: Kernel, size: usize) -> Result<(), OpError> {
        command::check_size(op, kernel, size)
    }

    unsafe fn launch(
        &self,
        op: &'static str,
        kernel: Kernel,
        grid: Grid,
        params: *const c_void,
        size: usize,
    ) -> Result<(), OpError> {
        // SAFETY: there are as many bytes, as the caller vouches.
        let params = unsafe { command::Params::copy(params, size) };
        command::check_size(op, kernel, size)?;
        // SAFETY: the parameters are the kernel's, as the caller vouches.
        unsafe { self.start(Command::Launch { op, kernel, grid, params }) }
    }

    unsafe fn multiply(
        &self,
        _op: &'static str,
        product: &Multiply,
        input: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), OpError> {
        // SAFETY: the matrices are as the caller says.
        unsafe { self.start(Command::Multiply { product: *product, input, weight, out }) }
    }

    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, OpError> {
        Ok(self.transfers().pin(bytes))
    }

    unsafe fn unpin(&self, memory: NonNull<u8>) {
        // SAFETY: as the caller vouches.
        unsafe { self.transfers().unpin(memory) }
    }

    fn create_mark(&self) -> Result<Mark, OpError> {
        Ok(self.transfers().create_mark())
    }

    unsafe fn destroy_mark(&self, mark: Mark) {
        self.transfers().destroy_mark(mark);
    }

    fn put(&self, mark: Mark, queue: Queue) -> Result<(), OpError> {
        self.transfers().put(mark, queue);
        Ok(())
    }

    fn wait(&self, _op: &'static str, mark: Mark) -> Result<(), OpError> {
        self.transfers().wait(mark);
        Ok(())
    }

    fn uploads_follow_work(&self) -> Result<(), OpError> {
        // Work is done at once.
        Ok(())
    }

    unsafe fn upload_rows(&self, rows: &Rows) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        unsafe { self.transfers().upload_rows(*rows) }
        Ok(())
    }

    unsafe fn download_later(&self, from: DevicePtr, to: NonNull<u8>, bytes: usize) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        unsafe { self.transfers().download_later(from, to, bytes) }
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), OpError> {
        self.captures().recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Recorded, OpError> {
        let mut captures = self.captures();
        let commands: Arc<[Command]> = captures.recording.take().expect("a capture has begun").into();
        captures.count += 1;
        let recorded = Recorded { handle: captures.count, operations: commands.len() };
        captures.recorded.insert(recorded.handle, commands);
        Ok(recorded)
    }

    fn abandon_capture(&self) {
        self.captures().recording = None;
    }

    unsafe fn replay(&self, recorded: Recorded) -> Result<(), OpError> {
        let commands = self.captures().recorded[&recorded.handle].clone();
        // SAFETY: what the commands refer to is as it was when they were recorded.
        commands.iter().try_for_each(|command| unsafe { command.run(self.schedule) })
    }

    unsafe fn forget(&self, recorded: Recorded) {
        self.captures().recorded.remove(&recorded.handle);
    }

    fn identity(&self) -> u64 {
        // All of them share the memory of this process.
        0
    }

    unsafe fn export(&self, _ptr: DevicePtr) -> Result<[u8; 64], OpError> {
        Ok([0; 64])
    }

    unsafe fn import(&self, _handle: &[u8; 64]) -> Result<DevicePtr, OpError> {
        Err(OpError::driver("import", "the emulator's memory is that of one process"))
    }

    #[cfg(feature = "cuda")]
    fn on_stream(
        &self,
        op: &'static str,
        _run: &mut dyn FnMut(*mut c_void) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        Err(OpError::driver(op, "no library runs in the emulator"))
    }

    fn synchronize(&self, _op: &'static str) -> Result<(), OpError> {
        self.transfers().land_all();
        Ok(())
    }
}

fn host(ptr: DevicePtr) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(ptr.0 as usize)
}
