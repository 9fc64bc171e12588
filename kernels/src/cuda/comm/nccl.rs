//! NVIDIA's library for several GPUs. It is looked for when ranks connect, and only the functions used here are bound.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::patrol::Patrol;
use super::{Comm, agree, check_float, columns, failed};
use crate::OpError;
use crate::collective::LocalGroup;
use crate::cuda::driver::DevicePtr;
use crate::cuda::{Buffer, CopyParts, Element, Gpu, Slice, SliceMut, copy_parts};

const ALL_REDUCE: &str = "all_reduce";
const ALL_GATHER: &str = "all_gather_columns";
const CONNECT: &str = "connect ranks";

/// Names of the library: as installed for programs, and for those who build them.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Oldest version that has bf16: 2.10.
const VERSION_MIN: c_int = 21_000;

// `ncclResult_t`
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
// `ncclRedOp_t`
const SUM: c_int = 0;
// `ncclDataType_t`
const FLOAT16: c_int = 6;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclComm_t`
type Handle = *mut c_void;
/// `cudaStream_t`
type Stream = *mut c_void;

/// The functions, as `nccl.h` declares them. The library is never unloaded.
struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Handle) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
}

impl Library {
    /// The library of this machine, loaded once. Errors, with its name, when it is not there.
    fn get(op: &'static str) -> Result<&'static Self, OpError> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref().map_err(|reason| OpError::driver(op, reason.clone()))
    }

    fn load() -> Result<Self, String> {
        // SAFETY: NVIDIA's library, whose initialisation expects nothing.
        let open = |name: &&str| unsafe { libloading::Library::new(*name) }.ok();
        let library = NAMES.iter().find_map(open);
        let library = library.ok_or_else(|| format!("NCCL is not on this machine ({})", NAMES[0]))?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the function has the type of the field that it goes to.
                *unsafe { library.get($name) }.map_err(|error| format!("{}: {error}", NAMES[0]))?
            };
        }
        let functions = Self {
            get_version: function!(b"ncclGetVersion\0"),
            get_unique_id: function!(b"ncclGetUniqueId\0"),
            comm_init_rank: function!(b"ncclCommInitRank\0"),
            comm_abort: function!(b"ncclCommAbort\0"),
            comm_get_async_error: function!(b"ncclCommGetAsyncError\0"),
            get_error_string: function!(b"ncclGetErrorString\0"),
            all_reduce: function!(b"ncclAllReduce\0"),
            broadcast: function!(b"ncclBroadcast\0"),
            group_start: function!(b"ncclGroupStart\0"),
            group_end: function!(b"ncclGroupEnd\0"),
        };
        // The functions stay where they are.
        std::mem::forget(library);
        let version = functions.version();
        if version < VERSION_MIN {
            return Err(format!("NCCL is of version {version}, too old ({})", NAMES[0]));
        }
        Ok(functions)
    }

    fn version(&self) -> c_int {
        let mut version = 0;
        // SAFETY: it stores a number. It cannot fail; if it did, the version would be too old.
        unsafe { (self.get_version)(&mut version) };
        version
    }

    fn check(&self, op: &'static str, result: c_int) -> Result<(), OpError> {
        if result == SUCCESS {
            return Ok(());
        }
        // SAFETY: any number has a text, which lives as long as the library.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(result)) };
        Err(OpError::driver(op, format!("NCCL: {}", text.to_string_lossy())))
    }
}

/// Ranks that exchange numbers through NCCL. Sums are taken in an order of its own, the same for all ranks.
#[derive(Debug)]
pub struct Nccl {
    gpu: Arc<Gpu>,
    group: Arc<LocalGroup>,
    link: Arc<Link>,
    /// The parts of all ranks one after the other, before they are put side by side.
    parts: Mutex<Option<Buffer>>,
    /// Stopped when the device is done.
    patrol: Option<Patrol>,
}

/// The library's communicator; null when it has been given up. Recorded launches use it, so it is never taken down
/// otherwise.
#[derive(Debug)]
struct Link(Mutex<Communicator>);

#[derive(Debug)]
struct Communicator(Handle);

// SAFETY: the library's handles may be used from any thread, one at a time.
unsafe impl Send for Communicator {}

impl Link {
    /// Once given up, errors.
    fn lock(&self, op: &'static str) -> Result<MutexGuard<'_, Communicator>, OpError> {
        let link = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if link.0.is_null() { Err(OpError::driver(op, "the ranks have given up")) } else { Ok(link) }
    }

    /// Ends what waits on the device.
    fn abort(&self, library: &Library) {
        let mut link = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = std::mem::replace(&mut link.0, null_mut());
        if !handle.is_null() {
            // SAFETY: a communicator that nobody uses any more. Whether it works, nothing else can be done.
            let _ = unsafe { (library.comm_abort)(handle) };
        }
    }
}

impl Nccl {
    /// Connects all ranks. None when some of them do not have the library, or it does not connect their devices.
    ///
    /// Errors when the group or the device fails.
    pub fn new(gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> Result<Option<Self>, OpError> {
        let library = Library::get(CONNECT);
        if !agree(CONNECT, group, library.is_ok())? {
            return Ok(None);
        }
        let library = library?;
        let mut id = UniqueId([0; 128]);
        let mut made = Ok(());
        if group.rank() == 0 {
            // SAFETY: it stores an id.
            made = library.check(CONNECT, unsafe { (library.get_unique_id)(&mut id) });
        }
        group.broadcast_bytes(0, &mut id.0).map_err(|error| failed(CONNECT, &error))?;
        if !agree(CONNECT, group, made.is_ok())? {
            return Ok(None);
        }
        let handle = init(gpu, library, group, id);
        if !agree(CONNECT, group, handle.is_ok())? {
            return Ok(None);
        }
        let link = Arc::new(Link(Mutex::new(Communicator(handle?))));
        let theirs = link.clone();
        let patrol = Patrol::start(group, move || theirs.abort(library));
        let (gpu, group) = (gpu.clone(), group.clone());
        let nccl = Self { gpu, group, link, parts: Mutex::default(), patrol: Some(patrol) };
        let well = nccl.try_out();
        Ok(agree(CONNECT, &nccl.group, well.is_ok())?.then_some(nccl))
    }

    /// Connections are made by the first sum, and it shows whether they work.
    fn try_out(&self) -> Result<(), OpError> {
        let mut ones = self.gpu.upload(&[1f32; 32])?;
        self.all_reduce(ones.all_mut())?;
        let sums = ones.read::<f32>()?;
        if sums.iter().any(|sum| *sum != self.world() as f32) {
            return Err(OpError::driver(CONNECT, "NCCL: wrong sums"));
        }
        self.check()
    }

    fn library(&self, op: &'static str) -> Result<&'static Library, OpError> {
        Library::get(op)
    }

    /// `sums[r]` of rank r's elements, all ranks' one after the other.
    fn gather(&self, own: Slice<'_>, lens: &[usize], out: DevicePtr) -> Result<(), OpError> {
        let (library, link) = (self.library(ALL_GATHER)?, self.link.lock(ALL_GATHER)?);
        let (element, size) = (data_type(ALL_GATHER, own.element())?, own.element().size());
        self.gpu.driver().on_stream(ALL_GATHER, &mut |stream| {
            // SAFETY: between this and its end, calls are only collected.
            library.check(ALL_GATHER, unsafe { (library.group_start)() })?;
            let mut at = out.0;
            let mut collected = Ok(());
            for (rank, &len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
                // SAFETY: `out` has room for all; of `own`, this rank's length is read by this rank.
                let result = unsafe {
                    (library.broadcast)(
                        address(own.ptr),
                        address(DevicePtr(at)),
                        len,
                        element,
                        rank as c_int,
                        link.0,
                        stream,
                    )
                };
                collected = collected.and(library.check(ALL_GATHER, result));
                at += (len * size) as u64;
            }
            // SAFETY: as begun above, whatever became of it.
            let ended = library.check(ALL_GATHER, unsafe { (library.group_end)() });
            collected.and(ended)
        })
    }
}

fn init(gpu: &Gpu, library: &Library, group: &LocalGroup, id: UniqueId) -> Result<Handle, OpError> {
    let mut handle = null_mut();
    gpu.driver().on_stream(CONNECT, &mut |_| {
        let (world, rank) = (group.world() as c_int, group.rank() as c_int);
        // SAFETY: the device's context is current; the id is that of rank 0, and all ranks are here.
        library.check(CONNECT, unsafe { (library.comm_init_rank)(&mut handle, world, id, rank) })
    })?;
    Ok(handle)
}

fn data_type(op: &'static str, element: Element) -> Result<c_int, OpError> {
    check_float(op, element)?;
    Ok(match element {
        Element::F16 => FLOAT16,
        Element::BF16 => BFLOAT16,
        _ => FLOAT32,
    })
}

fn address(ptr: DevicePtr) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(ptr.0 as usize)
}

impl Comm for Nccl {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world(&self) -> usize {
        self.group.world()
    }

    fn all_reduce(&self, data: SliceMut<'_>) -> Result<(), OpError> {
        let element = data_type(ALL_REDUCE, data.element())?;
        if data.is_empty() {
            return Ok(());
        }
        let (library, link) = (self.library(ALL_REDUCE)?, self.link.lock(ALL_REDUCE)?);
        self.gpu.driver().on_stream(ALL_REDUCE, &mut |stream| {
            let at = address(data.ptr);
            // SAFETY: in place, of as many elements as the slice has, on the stream that its users run on.
            let result = unsafe { (library.all_reduce)(at, at, data.len(), element, SUM, link.0, stream) };
            library.check(ALL_REDUCE, result)
        })
    }

    fn all_gather_columns(
        &self,
        own: Slice<'_>,
        rows: usize,
        cols: &[usize],
        mut out: SliceMut<'_>,
    ) -> Result<(), OpError> {
        let begins = columns(ALL_GATHER, self.rank(), own, rows, cols, &out, self.world())?;
        let lens: Vec<usize> = cols.iter().map(|cols| rows * cols).collect();
        let total = rows * begins[self.world()];
        if total == 0 {
            return Ok(());
        }
        if rows == 1 {
            return self.gather(own, &lens, out.ptr);
        }
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.as_ref().is_none_or(|parts| parts.element() != own.element() || parts.len() < total) {
            *parts = Some(self.gpu.buffer(own.element(), total)?);
        }
        let parts = parts.as_ref().expect("made above");
        self.gather(own, &lens, parts.all().ptr)?;
        let mut start = 0;
        for (rank, &width) in cols.iter().enumerate().filter(|(_, width)| **width > 0) {
            let from = parts.slice(start..start + rows * width);
            let (to, into) = (out.reborrow(), begins[rank]);
            copy_parts(&self.gpu, CopyParts { rows, parts: 1, from, out_of: 0, to, into, width })?;
            start += rows * width;
        }
        Ok(())
    }

    fn barrier(&self) -> Result<(), OpError> {
        self.gpu.synchronize()?;
        self.group.barrier().map_err(|error| failed("barrier", &error))
    }

    fn check(&self) -> Result<(), OpError> {
        const OP: &str = "check";
        self.group.check().map_err(|error| failed(OP, &error))?;
        let (library, link) = (self.library(OP)?, self.link.lock(OP)?);
        let mut state = SUCCESS;
        // SAFETY: a communicator; it stores a number.
        library.check(OP, unsafe { (library.comm_get_async_error)(link.0, &mut state) })?;
        drop(link);
        if state == SUCCESS || state == IN_PROGRESS {
            return Ok(());
        }
        self.abort();
        library.check(OP, state)
    }

    fn abort(&self) {
        self.group.abort();
        if let Ok(library) = self.library("abort") {
            self.link.abort(library);
        }
    }

    fn description(&self) -> String {
        let version = self.library("description").map_or(0, Library::version);
        // As in 22809: 2.28.9.
        format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // The device may still be waiting for the others. While it does, the patrol goes on. What fails was reported.
        let _ = self.gpu.synchronize();
        drop(self.patrol.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs no GPU.
    #[test]
    fn the_library_has_every_function_or_is_named_where_it_is_missing() {
        match Library::get(CONNECT) {
            Ok(library) => {
                assert!(library.version() >= VERSION_MIN);
                let error = library.check("all_reduce", 4).expect_err("an error");
                assert_eq!(error.to_string(), "all_reduce: NCCL: invalid argument");
            }
            Err(error) => {
                assert_eq!(error.to_string(), "connect ranks: NCCL is not on this machine (libnccl.so.2)");
            }
        }
    }
}
