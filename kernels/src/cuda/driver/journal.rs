//! A device fails some time after the work that it fails in was started, and stays that way. So what was started is noted,
//! and the failure names it, at once and in whatever is asked for later.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

use super::{DevicePtr, Driver, Grid, Kernel, Mark, Memory, Multiply, Properties, Queue, Recorded, Rows};
use crate::OpError;

/// How many operations a failure names.
const NAMED: usize = 8;

/// A driver, and what has been started.
#[derive(Debug)]
pub(in crate::cuda) struct Journaled<D> {
    driver: D,
    journal: Mutex<Journal>,
}

#[derive(Debug, Default)]
struct Journal {
    failure: Option<OpError>,
    /// What is started is recorded, and not done.
    capturing: bool,
    /// Operations since all were known to be done, and the latest of them.
    started: usize,
    latest: VecDeque<Entry>,
}

#[derive(Debug)]
struct Entry {
    op: &'static str,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Kernel(Kernel, [u32; 3]),
    Product([usize; 3]),
    Bytes(usize),
    Graph(usize),
    #[cfg(feature = "cuda")]
    Library,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let op = self.op;
        match &self.work {
            Work::Kernel(kernel, [x, y, z]) => write!(f, "{op} ({}, {x} x {y} x {z} blocks)", kernel.name),
            Work::Product([rows, outputs, inputs]) => {
                write!(f, "{op} (product of {rows} x {outputs} x {inputs})")
            }
            Work::Bytes(bytes) => write!(f, "{op} ({bytes} bytes)"),
            Work::Graph(operations) => write!(f, "{op} (graph of {operations})"),
            #[cfg(feature = "cuda")]
            Work::Library => write!(f, "{op} (by a library)"),
        }
    }
}

impl Journal {
    fn check(&self) -> Result<(), OpError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn note(&mut self, op: &'static str, work: Work) {
        if self.capturing {
            return;
        }
        self.started += 1;
        if self.latest.len() == NAMED {
            self.latest.pop_front();
        }
        self.latest.push_back(Entry { op, work });
    }

    /// What was noted last has not been started after all.
    fn strike(&mut self) {
        if !self.capturing && self.latest.pop_back().is_some() {
            self.started -= 1;
        }
    }

    /// All that was started has been done.
    fn settle(&mut self) {
        self.started = 0;
        self.latest.clear();
    }

    /// The device has failed: adds in what, and keeps it.
    fn fail(&mut self, op: &'static str, reason: &str) -> OpError {
        let earlier = if self.started > self.latest.len() { "…, " } else { "" };
        let latest: Vec<String> = self.latest.iter().map(Entry::to_string).collect();
        let (count, s) = (self.started, if self.started == 1 { "" } else { "s" });
        let under_way = if count == 0 { String::new() } else { format!("{earlier}{}; ", latest.join(", ")) };
        let text =
            format!("{reason}; under way: {under_way}{count} operation{s} since the last synchronisation");
        self.failure.insert(OpError::device(op, text)).clone()
    }
}

impl<D: Driver> Journaled<D> {
    pub(in crate::cuda) fn new(driver: D) -> Self {
        Self { driver, journal: Mutex::default() }
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().expect("no thread panics while it holds the lock")
    }

    /// Asks the driver for something, unless the device has failed.
    fn ask<R>(&self, run: impl FnOnce(&D) -> Result<R, OpError>) -> Result<R, OpError> {
        self.journal().check()?;
        run(&self.driver).map_err(|error| self.judge(error))
    }

    /// Has the driver start something, which is noted first.
    fn start(
        &self,
        op: &'static str,
        work: Work,
        run: impl FnOnce(&D) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let mut journal = self.journal();
        journal.check()?;
        journal.note(op, work);
        drop(journal);
        run(&self.driver).map_err(|error| {
            let error = self.judge(error);
            self.journal().strike();
            error
        })
    }

    /// Waits for the driver to be done with everything.
    fn settle<R>(&self, run: impl FnOnce(&D) -> Result<R, OpError>) -> Result<R, OpError> {
        let result = self.ask(run)?;
        self.journal().settle();
        Ok(result)
    }

    fn judge(&self, error: OpError) -> OpError {
        match error {
            OpError::Device { op, reason } => self.journal().fail(op, &reason),
            error => error,
        }
    }
}

impl<D: Driver> Driver for Journaled<D> {
    fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    fn stores(&self) -> bool {
        self.driver.stores()
    }

    fn memory(&self) -> Result<Memory, OpError> {
        self.ask(D::memory)
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, OpError> {
        self.ask(|driver| driver.allocate(bytes))
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        // SAFETY: as the caller vouches.
        unsafe { self.driver.free(ptr) }
    }

    unsafe fn upload(&self, to: DevicePtr, from: &[u8]) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        self.start("upload", Work::Bytes(from.len()), |driver| unsafe { driver.upload(to, from) })
    }

    unsafe fn download(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        self.settle(|driver| unsafe { driver.download(from, to) })
    }

    unsafe fn copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        self.start("copy", Work::Bytes(bytes), |driver| unsafe { driver.copy(from, to, bytes) })
    }

    unsafe fn fill(&self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        self.start("fill", Work::Bytes(bytes), |driver| unsafe { driver.fill(to, byte, bytes) })
    }

    unsafe fn launch(
        &self,
        op: &'static str,
        kernel: Kernel,
        grid: Grid,
        params: *const c_void,
        size: usize,
    ) -> Result<(), OpError> {
        self.start(op, Work::Kernel(kernel, grid.blocks), |driver| {
            // SAFETY: as the caller vouches.
            unsafe { driver.launch(op, kernel, grid, params, size) }
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
        let Multiply { rows, outputs, inputs, .. } = *product;
        self.start(op, Work::Product([rows, outputs, inputs]), |driver| {
            // SAFETY: as the caller vouches.
            unsafe { driver.multiply(op, product, input, weight, out) }
        })
    }

    unsafe fn tune(
        &self,
        op: &'static str,
        product: &Multiply,
        input: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        self.ask(|driver| unsafe { driver.tune(op, product, input, weight, out) })
    }

    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, OpError> {
        self.ask(|driver| driver.pin(bytes))
    }

    unsafe fn unpin(&self, memory: NonNull<u8>) {
        // SAFETY: as the caller vouches.
        unsafe { self.driver.unpin(memory) }
    }

    fn create_mark(&self) -> Result<Mark, OpError> {
        self.ask(D::create_mark)
    }

    unsafe fn destroy_mark(&self, mark: Mark) {
        // SAFETY: as the caller vouches.
        unsafe { self.driver.destroy_mark(mark) }
    }

    fn put(&self, mark: Mark, queue: Queue) -> Result<(), OpError> {
        self.ask(|driver| driver.put(mark, queue))
    }

    fn wait(&self, op: &'static str, mark: Mark) -> Result<(), OpError> {
        self.ask(|driver| driver.wait(op, mark))
    }

    fn uploads_follow_work(&self) -> Result<(), OpError> {
        self.ask(D::uploads_follow_work)
    }

    unsafe fn upload_rows(&self, rows: &Rows) -> Result<(), OpError> {
        let bytes = rows.rows * rows.row_bytes;
        // SAFETY: as the caller vouches.
        self.start("upload", Work::Bytes(bytes), |driver| unsafe { driver.upload_rows(rows) })
    }

    unsafe fn download_later(&self, from: DevicePtr, to: NonNull<u8>, bytes: usize) -> Result<(), OpError> {
        self.start("download", Work::Bytes(bytes), |driver| {
            // SAFETY: as the caller vouches.
            unsafe { driver.download_later(from, to, bytes) }
        })
    }

    fn begin_capture(&self) -> Result<(), OpError> {
        self.ask(D::begin_capture)?;
        self.journal().capturing = true;
        Ok(())
    }

    fn end_capture(&self) -> Result<Recorded, OpError> {
        self.journal().capturing = false;
        self.ask(D::end_capture)
    }

    fn abandon_capture(&self) {
        self.journal().capturing = false;
        self.driver.abandon_capture();
    }

    unsafe fn replay(&self, recorded: Recorded) -> Result<(), OpError> {
        // SAFETY: as the caller vouches.
        self.start("replay", Work::Graph(recorded.operations), |driver| unsafe { driver.replay(recorded) })
    }

    unsafe fn forget(&self, recorded: Recorded) {
        // SAFETY: as the caller vouches.
        unsafe { self.driver.forget(recorded) }
    }

    fn identity(&self) -> u64 {
        self.driver.identity()
    }

    unsafe fn export(&self, ptr: DevicePtr) -> Result<[u8; 64], OpError> {
        // SAFETY: as the caller vouches.
        self.ask(|driver| unsafe { driver.export(ptr) })
    }

    unsafe fn import(&self, handle: &[u8; 64]) -> Result<DevicePtr, OpError> {
        // SAFETY: as the caller vouches.
        self.ask(|driver| unsafe { driver.import(handle) })
    }

    #[cfg(feature = "cuda")]
    fn on_stream(
        &self,
        op: &'static str,
        run: &mut dyn FnMut(*mut c_void) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        self.start(op, Work::Library, |driver| driver.on_stream(op, run))
    }

    fn synchronize(&self, op: &'static str) -> Result<(), OpError> {
        self.settle(|driver| driver.synchronize(op))
    }
}
