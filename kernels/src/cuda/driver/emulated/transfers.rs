//! Copies between pinned memory and the device. Each happens as late as it may: when somebody waits for it. Who does not
//! wait finds what was there before, and who changes pinned memory too early sends the change.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::ptr::{NonNull, copy_nonoverlapping};

use super::host;
use crate::cuda::driver::{DevicePtr, Mark, Queue, Rows};

/// What a page is aligned to, which pinned memory consists of.
const PAGE: usize = 4096;

/// What was asked for and has not been waited for.
#[derive(Debug, Default)]
pub(super) struct Transfers {
    uploads: Line<Rows>,
    downloads: Line<Landing>,
    /// Which line a mark is in, and how many had been asked for before it.
    marks: HashMap<Mark, Option<(Queue, usize)>>,
    marks_created: u64,
    pinned: HashMap<usize, Layout>,
}

#[derive(Debug)]
struct Line<T> {
    waiting: Vec<T>,
    /// How many are done.
    done: usize,
}

/// What was on the device, and where it is to go.
#[derive(Debug)]
struct Landing {
    bytes: Vec<u8>,
    to: NonNull<u8>,
}

// SAFETY: the memory is not of a thread.
unsafe impl Send for Landing {}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self { waiting: Vec::new(), done: 0 }
    }
}

impl<T> Line<T> {
    fn end(&self) -> usize {
        self.done + self.waiting.len()
    }

    /// Takes out those before `end`.
    fn take_before(&mut self, end: usize) -> Vec<T> {
        let count = end.saturating_sub(self.done);
        self.done += count;
        self.waiting.drain(..count).collect()
    }
}

impl Transfers {
    pub(super) fn pin(&mut self, bytes: usize) -> NonNull<u8> {
        let layout = Layout::from_size_align(bytes.max(1), PAGE).expect("a size that exists");
        // SAFETY: the size is not zero.
        let memory = NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: there are as many bytes.
        unsafe { memory.write_bytes(0xff, layout.size()) };
        self.pinned.insert(memory.as_ptr().addr(), layout);
        memory
    }

    /// # Safety
    /// It comes from `pin`.
    pub(super) unsafe fn unpin(&mut self, memory: NonNull<u8>) {
        let layout = self.pinned.remove(&memory.as_ptr().addr()).expect("pinned memory");
        let range = memory.as_ptr().addr()..memory.as_ptr().addr() + layout.size();
        let reads = self.uploads.waiting.iter().any(|rows| range.contains(&rows.from.addr()));
        let writes = self.downloads.waiting.iter().any(|landing| range.contains(&landing.to.as_ptr().addr()));
        assert!(!reads && !writes, "pinned memory is given back while a copy is under way");
        // SAFETY: as the caller vouches, allocated with this layout.
        unsafe { dealloc(memory.as_ptr(), layout) }
    }

    pub(super) fn create_mark(&mut self) -> Mark {
        self.marks_created += 1;
        let mark = Mark(self.marks_created);
        self.marks.insert(mark, None);
        mark
    }

    pub(super) fn destroy_mark(&mut self, mark: Mark) {
        self.marks.remove(&mark).expect("a mark");
    }

    pub(super) fn put(&mut self, mark: Mark, queue: Queue) {
        let end = match queue {
            Queue::Work => self.downloads.end(),
            Queue::Uploads => self.uploads.end(),
        };
        *self.marks.get_mut(&mark).expect("a mark") = Some((queue, end));
    }

    pub(super) fn wait(&mut self, mark: Mark) {
        match self.marks[&mark] {
            None => {}
            Some((Queue::Work, end)) => self.land(end),
            Some((Queue::Uploads, end)) => self.upload(end),
        }
    }

    /// Waits for the work.
    pub(super) fn land_all(&mut self) {
        self.land(self.downloads.end());
    }

    /// Waits for the uploads.
    pub(super) fn upload_all(&mut self) {
        self.upload(self.uploads.end());
    }

    /// # Safety
    /// Both sides have room for it, until it has been waited for.
    pub(super) unsafe fn upload_rows(&mut self, rows: Rows) {
        self.uploads.waiting.push(rows);
    }

    /// # Safety
    /// Both sides have room for it; the target until it has been waited for.
    pub(super) unsafe fn download_later(&mut self, from: DevicePtr, to: NonNull<u8>, bytes: usize) {
        // Work that comes later may change it, so this is what will arrive.
        // SAFETY: as the caller vouches; device memory is this process's memory.
        let bytes = unsafe { std::slice::from_raw_parts(host(from).cast::<u8>(), bytes) }.to_vec();
        self.downloads.waiting.push(Landing { bytes, to });
    }

    fn land(&mut self, end: usize) {
        for Landing { bytes, to } in self.downloads.take_before(end) {
            // SAFETY: `download_later` was promised so.
            unsafe { copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) }
        }
    }

    fn upload(&mut self, end: usize) {
        for Rows { from, to, rows, row_bytes, stride_bytes } in self.uploads.take_before(end) {
            for row in 0..rows {
                let to = DevicePtr(to.0 + (row * stride_bytes) as u64);
                // SAFETY: `upload_rows` was promised so.
                unsafe { copy_nonoverlapping(from.add(row * row_bytes), host(to).cast(), row_bytes) }
            }
        }
    }
}
