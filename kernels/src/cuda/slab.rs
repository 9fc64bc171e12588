use std::ops::Range;
use std::sync::Arc;

use super::{Buffer, Element, Gpu, Slice, SliceMut};
use crate::OpError;

/// Every piece begins at a multiple of so many bytes.
const ALIGNMENT: usize = 256;

/// One large piece of the device's memory, from which weights take theirs one after the other. A driver hands memory out in
/// pages of 2 MiB, which would be half empty where a model has thousands of matrices.
#[derive(Debug)]
pub struct Slab {
    buffer: Arc<Buffer>,
    used: usize,
}

/// Elements of a slab that belong to one owner, who writes them before sharing them.
#[derive(Debug)]
pub struct Piece {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl Slab {
    /// Room for `len` elements.
    ///
    /// Errors when the device has none.
    pub fn new(gpu: &Arc<Gpu>, element: Element, len: usize) -> Result<Self, OpError> {
        Ok(Self { buffer: Arc::new(gpu.buffer(element, len)?), used: 0 })
    }

    /// The next `len` elements; none if they do not fit.
    pub fn take(&mut self, len: usize) -> Option<Piece> {
        let start = self.used;
        let end = start.checked_add(len).filter(|end| *end <= self.buffer.len())?;
        self.used = end.next_multiple_of(ALIGNMENT / self.buffer.element().size());
        Some(Piece { buffer: self.buffer.clone(), range: start..end })
    }
}

impl From<Buffer> for Piece {
    fn from(buffer: Buffer) -> Self {
        let range = 0..buffer.len();
        Self { buffer: Arc::new(buffer), range }
    }
}

impl Piece {
    /// Type of its elements.
    pub fn element(&self) -> Element {
        self.buffer.element()
    }

    /// Number of its elements.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// To be written.
    pub fn all_mut(&mut self) -> SliceMut<'_> {
        // SAFETY: a slab hands each of its elements out once, and this is the one owner.
        unsafe { self.buffer.carve(&self.range) }
    }

    /// To be read.
    pub fn all(&self) -> Slice<'_> {
        self.buffer.slice(self.range.clone())
    }

    /// Sets every byte of every element.
    pub fn fill(&mut self, byte: u8) -> Result<(), OpError> {
        // SAFETY: a slab hands each of its elements out once, and this is the one owner.
        unsafe { self.buffer.fill_part(&self.range, byte) }
    }
}
