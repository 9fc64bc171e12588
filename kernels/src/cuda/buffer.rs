use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::driver::DevicePtr;
use super::{Element, Gpu, HostElement};
use crate::OpError;
use crate::error::check_length;

/// Elements in the device's memory, which is given back when this is dropped.
#[derive(Debug)]
pub struct Buffer {
    gpu: Arc<Gpu>,
    ptr: DevicePtr,
    element: Element,
    len: usize,
    /// When it was allocated, by [`Gpu::birth`].
    birth: u64,
}

/// Some elements of a [`Buffer`].
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    pub(super) ptr: DevicePtr,
    element: Element,
    len: usize,
    buffer: PhantomData<&'a Buffer>,
}

/// Some elements of a [`Buffer`], to be written.
#[derive(Debug)]
pub struct SliceMut<'a> {
    pub(super) ptr: DevicePtr,
    element: Element,
    len: usize,
    buffer: PhantomData<&'a mut Buffer>,
}

impl Buffer {
    pub(super) fn new(gpu: Arc<Gpu>, element: Element, len: usize) -> Result<Self, OpError> {
        const OP: &str = "allocate";
        let bytes = len.checked_mul(element.size());
        let bytes = bytes.ok_or(OpError::Memory { op: OP, bytes: usize::MAX, free: 0 })?;
        gpu.outside_capture(OP)?;
        // The driver has no memory of no bytes.
        let ptr = if bytes == 0 { DevicePtr::NULL } else { gpu.driver().allocate(bytes)? };
        let birth = gpu.birth();
        gpu.buffers.fetch_add(usize::from(bytes > 0), Ordering::Relaxed);
        Ok(Self { gpu, ptr, element, len, birth })
    }

    /// Type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Number of its elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of its elements.
    pub fn all(&self) -> Slice<'_> {
        Slice { ptr: self.ptr, element: self.element, len: self.len, buffer: PhantomData }
    }

    /// All of its elements, to be written.
    pub fn all_mut(&mut self) -> SliceMut<'_> {
        SliceMut { ptr: self.ptr, element: self.element, len: self.len, buffer: PhantomData }
    }

    /// Some of its elements. Panics when it does not have them.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_> {
        let ptr = self.at(&range);
        Slice { ptr, element: self.element, len: range.len(), buffer: PhantomData }
    }

    /// Some of its elements, to be written. Panics when it does not have them.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        let ptr = self.at(&range);
        SliceMut { ptr, element: self.element, len: range.len(), buffer: PhantomData }
    }

    /// Writes elements from `start` on. Errors when they are of another type, or reach beyond its end.
    pub fn write<T: HostElement>(&mut self, start: usize, elements: &[T]) -> Result<(), OpError> {
        const OP: &str = "write";
        self.check::<T>(OP)?;
        let end = start + elements.len();
        if end > self.len {
            return Err(OpError::Index { op: OP, what: "element", index: end, limit: self.len });
        }
        self.gpu.outside_capture(OP)?;
        if elements.is_empty() {
            return Ok(());
        }
        // SAFETY: elements of this type may be looked at as bytes (`HostElement` is sealed).
        let bytes =
            unsafe { std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements)) };
        // SAFETY: the range was checked.
        unsafe { self.gpu.driver().upload(self.at(&(start..end)), bytes) }
    }

    /// Its elements, when all work before is done. Errors when they are of another type.
    pub fn read<T: HostElement>(&self) -> Result<Vec<T>, OpError> {
        let mut elements = vec![T::default(); self.len];
        self.read_into(0, &mut elements)?;
        Ok(elements)
    }

    /// Elements from `start` on, when all work before is done. Errors when they are of another type, or it has fewer.
    pub fn read_into<T: HostElement>(&self, start: usize, elements: &mut [T]) -> Result<(), OpError> {
        const OP: &str = "read";
        self.check::<T>(OP)?;
        let end = start + elements.len();
        if end > self.len {
            return Err(OpError::Index { op: OP, what: "element", index: end, limit: self.len });
        }
        self.gpu.outside_capture(OP)?;
        if elements.is_empty() {
            return Ok(());
        }
        // SAFETY: every pattern of bytes is an element of this type (`HostElement` is sealed).
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast::<u8>(), size_of_val(elements))
        };
        // SAFETY: the range was checked.
        unsafe { self.gpu.driver().download(self.at(&(start..end)), bytes) }
    }

    /// Sets every byte of every element.
    pub fn fill(&mut self, byte: u8) -> Result<(), OpError> {
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: the buffer has as many bytes.
        unsafe { self.gpu.driver().fill(self.ptr, byte, self.len * self.element.size()) }
    }

    /// Copies the elements of another buffer to its beginning. Errors when they are of another type, or do not fit.
    pub fn copy_from(&mut self, from: Slice<'_>) -> Result<(), OpError> {
        const OP: &str = "copy";
        if from.element != self.element {
            return Err(wrong_element(OP, from.element));
        }
        if from.len > self.len {
            return Err(OpError::Length { op: OP, what: "from", expected: self.len, found: from.len });
        }
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: both have as many bytes, and this buffer is borrowed alone, so they are not the same.
        unsafe { self.gpu.driver().copy(from.ptr, self.ptr, from.len * self.element.size()) }
    }

    fn check<T: HostElement>(&self, op: &'static str) -> Result<(), OpError> {
        if T::ELEMENT == self.element { Ok(()) } else { Err(wrong_element(op, self.element)) }
    }

    /// Some of its elements, to be written. Panics when it does not have them.
    ///
    /// # Safety
    /// Nobody else has them.
    pub(super) unsafe fn carve(&self, range: &Range<usize>) -> SliceMut<'_> {
        SliceMut { ptr: self.at(range), element: self.element, len: range.len(), buffer: PhantomData }
    }

    /// Sets every byte of some elements. Panics when it does not have them.
    ///
    /// # Safety
    /// Nobody else has them.
    pub(super) unsafe fn fill_part(&self, range: &Range<usize>, byte: u8) -> Result<(), OpError> {
        if range.is_empty() {
            return Ok(());
        }
        // SAFETY: the buffer has the range.
        unsafe { self.gpu.driver().fill(self.at(range), byte, range.len() * self.element.size()) }
    }

    fn at(&self, range: &Range<usize>) -> DevicePtr {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        DevicePtr(self.ptr.0 + (range.start * self.element.size()) as u64)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.ptr != DevicePtr::NULL {
            self.gpu.buffers.fetch_sub(1, Ordering::Relaxed);
            // Slices of it cannot outlive it, but graphs can.
            self.gpu.give_back(self.ptr, self.birth);
        }
    }
}

impl<'a> Slice<'a> {
    /// Type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Number of its elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of its elements. Panics when it does not have them.
    pub fn slice(&self, range: Range<usize>) -> Slice<'a> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        let ptr = DevicePtr(self.ptr.0 + (range.start * self.element.size()) as u64);
        Slice { ptr, len: range.len(), ..*self }
    }
}

impl<'a> Slice<'a> {
    /// What is to be read while it is written, by the same threads.
    pub(super) fn of(slice: &SliceMut<'a>) -> Self {
        Slice { ptr: slice.ptr, element: slice.element, len: slice.len, buffer: PhantomData }
    }

    pub(super) fn ptr_or_null(slice: Option<Self>) -> DevicePtr {
        slice.map_or(DevicePtr::NULL, |slice| slice.ptr)
    }

    /// The argument `what` of `op` must have `len` elements of this type.
    pub(super) fn check(
        &self,
        op: &'static str,
        what: &'static str,
        element: Element,
        len: usize,
    ) -> Result<(), OpError> {
        Self::check_element(op, what, self.element, element)?;
        check_length(op, what, len, self.len)
    }

    /// The argument `what` of `op` must be of the expected type.
    pub(super) fn check_element(
        op: &'static str,
        what: &'static str,
        found: Element,
        expected: Element,
    ) -> Result<(), OpError> {
        if found == expected {
            return Ok(());
        }
        Err(OpError::unsupported(op, format!("{what} is of {found:?}, {expected:?} expected")))
    }
}

impl SliceMut<'_> {
    pub(super) fn check(
        &self,
        op: &'static str,
        what: &'static str,
        element: Element,
        len: usize,
    ) -> Result<(), OpError> {
        self.as_slice().check(op, what, element, len)
    }

    /// Type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Number of its elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// To be read.
    pub fn as_slice(&self) -> Slice<'_> {
        Slice { ptr: self.ptr, element: self.element, len: self.len, buffer: PhantomData }
    }

    /// The same elements, for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut { ptr: self.ptr, element: self.element, len: self.len, buffer: PhantomData }
    }

    /// Some of its elements. Panics when it does not have them.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        let ptr = self.as_slice().slice(range.clone()).ptr;
        SliceMut { ptr, element: self.element, len: range.len(), buffer: PhantomData }
    }
}

pub(super) fn wrong_element(op: &'static str, element: Element) -> OpError {
    OpError::unsupported(op, format!("not for elements of type {element:?}"))
}
