use std::sync::Arc;

use super::{Element, Piece, Slice};
use crate::OpError;

/// A weight matrix `[rows, cols]` on the device, row after row at even distances.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// From its first element to its last.
    pub elements: Slice<'a>,
    /// Number of rows: the outputs of a linear layer, the vocabulary of an embedding.
    pub rows: usize,
    /// Number of columns: the inputs of a linear layer, the width of an embedding.
    pub cols: usize,
    /// Elements from a row to the next.
    pub stride: usize,
}

/// A [`Matrix`] that keeps its memory. A clone shares it.
#[derive(Clone, Debug)]
pub struct OwnedMatrix {
    /// What it lies in, from the beginning on.
    pub memory: Arc<Piece>,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from a row to the next.
    pub stride: usize,
}

impl OwnedMatrix {
    /// Elements from a row to the next, so that every row begins at a multiple of 16 bytes.
    pub fn stride_of(element: Element, cols: usize) -> usize {
        cols.next_multiple_of(16 / element.size())
    }

    /// As the operations take it.
    pub fn view(&self) -> Matrix<'_> {
        Matrix { elements: self.memory.all(), rows: self.rows, cols: self.cols, stride: self.stride }
    }
}

impl Matrix<'_> {
    /// Every row has to lie within the elements.
    pub(super) fn check(
        &self,
        op: &'static str,
        what: &'static str,
        element: Element,
    ) -> Result<(), OpError> {
        if self.elements.element() != element {
            let reason = format!("{what} is of {:?}, {element:?} expected", self.elements.element());
            return Err(OpError::unsupported(op, reason));
        }
        let end = match self.rows.checked_sub(1) {
            None => Some(0),
            Some(last) => last.checked_mul(self.stride).and_then(|start| start.checked_add(self.cols)),
        };
        let found = self.elements.len();
        if self.stride < self.cols || end.is_none_or(|end| end > found) {
            return Err(OpError::Length { op, what, expected: end.unwrap_or(usize::MAX), found });
        }
        Ok(())
    }
}
