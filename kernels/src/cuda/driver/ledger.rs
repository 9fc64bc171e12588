//! No device at all: memory is counted and never taken, and nothing is computed. What a model will need is found out by
//! loading it here and running its largest step.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Mutex;

use super::{DevicePtr, Driver, Grid, Kernel, Mark, Memory, Multiply, Properties, Queue, Recorded, Rows};
use crate::OpError;

/// The first address that is given out. None of them is ever used.
const FIRST: u64 = 1 << 40;

/// What a driver takes is a multiple of this.
const GRANULE: usize = 256;

#[derive(Debug)]
pub(in crate::cuda) struct Ledger {
    properties: Properties,
    total: usize,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    next: u64,
    sizes: HashMap<u64, usize>,
    taken: usize,
}

impl Ledger {
    /// A device with as much memory as is said, and nothing else.
    pub(in crate::cuda) fn new(total: usize) -> Self {
        let properties = Properties {
            name: "ledger".to_owned(),
            capability: (0, 0),
            multiprocessors: 1,
            shared_bytes_max: 227 << 10,
            driver_version: 0,
        };
        let book = Book { next: FIRST, sizes: HashMap::new(), taken: 0 };
        Self { properties, total, book: Mutex::new(book) }
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().expect("no thread panics while it holds the lock")
    }
}

impl Driver for Ledger {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn stores(&self) -> bool {
        false
    }

    fn memory(&self) -> Result<Memory, OpError> {
        Ok(Memory { free: self.total.saturating_sub(self.book().taken), total: self.total })
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, OpError> {
        let mut book = self.book();
        let free = self.total.saturating_sub(book.taken);
        let size = bytes.checked_next_multiple_of(GRANULE).filter(|size| *size <= free);
        let size = size.ok_or(OpError::Memory { op: "allocate", bytes, free })?;
        let address = book.next;
        book.next += size as u64;
        book.taken += size;
        book.sizes.insert(address, size);
        Ok(DevicePtr(address))
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        let mut book = self.book();
        if let Some(size) = book.sizes.remove(&ptr.0) {
            book.taken -= size;
        }
    }

    unsafe fn upload(&self, _: DevicePtr, _: &[u8]) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn download(&self, _: DevicePtr, to: &mut [u8]) -> Result<(), OpError> {
        to.fill(0);
        Ok(())
    }

    unsafe fn copy(&self, _: DevicePtr, _: DevicePtr, _: usize) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn fill(&self, _: DevicePtr, _: u8, _: usize) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn launch(
        &self,
        _: &'static str,
        _: Kernel,
        _: Grid,
        _: *const c_void,
        _: usize,
    ) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn multiply(
        &self,
        _: &'static str,
        _: &Multiply,
        _: DevicePtr,
        _: DevicePtr,
        _: DevicePtr,
    ) -> Result<(), OpError> {
        Ok(())
    }

    fn pin(&self, _: usize) -> Result<NonNull<u8>, OpError> {
        Err(OpError::unsupported("pin", "a ledger has nothing to upload from"))
    }

    unsafe fn unpin(&self, _: NonNull<u8>) {}

    fn create_mark(&self) -> Result<Mark, OpError> {
        Err(OpError::unsupported("mark", "a ledger has nothing to wait for"))
    }

    unsafe fn destroy_mark(&self, _: Mark) {}

    fn put(&self, _: Mark, _: Queue) -> Result<(), OpError> {
        Ok(())
    }

    fn wait(&self, _: &'static str, _: Mark) -> Result<(), OpError> {
        Ok(())
    }

    fn uploads_follow_work(&self) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn upload_rows(&self, _: &Rows) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn download_later(&self, _: DevicePtr, _: NonNull<u8>, _: usize) -> Result<(), OpError> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), OpError> {
        Err(OpError::unsupported("capture", "a ledger records nothing"))
    }

    fn end_capture(&self) -> Result<Recorded, OpError> {
        Err(OpError::unsupported("capture", "a ledger records nothing"))
    }

    fn abandon_capture(&self) {}

    unsafe fn replay(&self, _: Recorded) -> Result<(), OpError> {
        Ok(())
    }

    unsafe fn forget(&self, _: Recorded) {}

    fn identity(&self) -> u64 {
        0
    }

    unsafe fn export(&self, _: DevicePtr) -> Result<[u8; 64], OpError> {
        Err(OpError::unsupported("export", "a ledger has no memory"))
    }

    unsafe fn import(&self, _: &[u8; 64]) -> Result<DevicePtr, OpError> {
        Err(OpError::unsupported("import", "a ledger has no memory"))
    }

    #[cfg(feature = "cuda")]
    fn on_stream(
        &self,
        _: &'static str,
        _: &mut dyn FnMut(*mut c_void) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        Ok(())
    }

    fn synchronize(&self, _: &'static str) -> Result<(), OpError> {
        Ok(())
    }
}
