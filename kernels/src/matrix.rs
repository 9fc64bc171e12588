use half::{bf16, f16};

use crate::OpError;

const OP: &str = "matrix";

/// Element type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float, 5 bits of exponent.
    F16,
    /// 16-bit float, 8 bits of exponent.
    BF16,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

/// Where the rows of a matrix lie, in bytes: row `r` starts at `(r / group) * group_stride + (r % group) * stride`.
///
/// A slice of the columns of a wider matrix has a larger stride than its rows are long. A weight that is fused head by
/// head (`[q, k, v]` of the first head, then of the second) consists of groups of rows, one per head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    /// From a row to the next one of its group.
    pub stride: usize,
    /// Rows that follow each other at `stride`; not zero.
    pub group: usize,
    /// From the first row of a group to the first row of the next one.
    pub group_stride: usize,
}

impl RowLayout {
    /// All rows at the same distance.
    pub const fn strided(stride: usize) -> Self {
        Self { stride, group: usize::MAX, group_stride: 0 }
    }

    /// The first byte of a row. The rows of the first group cost no division.
    #[inline(always)]
    fn start(&self, row: usize) -> usize {
        if row < self.group {
            row * self.stride
        } else {
            (row / self.group) * self.group_stride + (row % self.group) * self.stride
        }
    }

    /// [`Self::start`] of the row that starts last among `rows`, or `None` when it overflows; `rows` is not zero.
    fn last_start(&self, rows: usize) -> Option<usize> {
        let start = |group: usize, row: usize| {
            group.checked_mul(self.group_stride)?.checked_add(row.checked_mul(self.stride)?)
        };
        let last = (rows - 1) / self.group;
        let in_last = start(last, (rows - 1) % self.group)?;
        match last.checked_sub(1) {
            // The last group may be short, so that a row of the group before it starts later.
            Some(before) => Some(in_last.max(start(before, self.group - 1)?)),
            None => Some(in_last),
        }
    }
}

/// A weight matrix `[rows, cols]` as it lies in the checkpoint: rows of little-endian elements, at any alignment.
///
/// A linear layer's weight is `[out, in]`: each output element is the product of one row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: DType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    layout: RowLayout,
}

impl<'a> Matrix<'a> {
    /// A whole matrix, row after row. Errors when `bytes` is not exactly `rows * cols` elements long.
    pub fn new(bytes: &'a [u8], dtype: DType, rows: usize, cols: usize) -> Result<Self, OpError> {
        let expected = rows.checked_mul(cols).and_then(|count| count.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            return Err(too_short(expected, bytes.len()));
        }
        // Without rows the product says nothing about the length of one.
        let row_bytes = if rows == 0 { 0 } else { cols * dtype.size() };
        Ok(Self { bytes, dtype, rows, cols, row_bytes, layout: RowLayout::strided(row_bytes) })
    }

    /// A view of rows that lie apart. Errors when a group has no rows, or a row does not end within `bytes`, which may
    /// be longer.
    pub fn with_layout(
        bytes: &'a [u8],
        dtype: DType,
        rows: usize,
        cols: usize,
        layout: RowLayout,
    ) -> Result<Self, OpError> {
        if layout.group == 0 {
            return Err(OpError::unsupported(OP, "groups without rows"));
        }
        let Some(row_bytes) = cols.checked_mul(dtype.size()) else {
            return Err(too_short(None, bytes.len()));
        };
        if rows > 0 {
            let expected = layout.last_start(rows).and_then(|start| start.checked_add(row_bytes));
            if expected.is_none_or(|expected| expected > bytes.len()) {
                return Err(too_short(expected, bytes.len()));
            }
        }
        Ok(Self { bytes, dtype, rows, cols, row_bytes, layout })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows: the output size of a linear layer, the vocabulary of an embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: the input size of a linear layer, the width of an embedding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes of one row. Panics when there is no such row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &self.bytes[self.layout.start(row)..][..self.row_bytes]
    }

    /// One element; every stored type fits into f32 exactly. Panics when there is no such element.
    pub fn element(&self, row: usize, col: usize) -> f32 {
        let row = self.row(row);
        match self.dtype {
            DType::F32 => f32::from_le_bytes(nth(row, col)),
            DType::F16 => f16::from_le_bytes(nth(row, col)).to_f32(),
            DType::BF16 => bf16::from_le_bytes(nth(row, col)).to_f32(),
        }
    }
}

/// The bytes of element `index` in a run of elements of `N` bytes.
fn nth<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
    bytes.as_chunks().0[index]
}

/// `expected` is `None` when it is more than can be counted.
fn too_short(expected: Option<usize>, found: usize) -> OpError {
    OpError::Length { op: OP, what: "bytes", expected: expected.unwrap_or(usize::MAX), found }
}

#[cfg(test)]
mod tests {
    use super::{DType, Matrix, RowLayout};

    /// A view of `rows` rows of two halves over the bytes `0, 1, 2, ...`; its rows' first bytes.
    fn starts(len: usize, rows: usize, layout: RowLayout) -> Option<Vec<u8>> {
        let bytes: Vec<u8> = (0..len as u8).collect();
        let matrix = Matrix::with_layout(&bytes, DType::F16, rows, 2, layout).ok()?;
        Some(
            (0..rows)
                .map(|row| matrix.row(row))
                .inspect(|row| assert_eq!(row.len(), 4))
                .map(|row| row[0])
                .collect(),
        )
    }

    #[test]
    fn a_view_finds_its_rows_where_the_layout_says() {
        assert_eq!(starts(24, 3, RowLayout::strided(10)), Some(vec![0, 10, 20]));
        let fused = RowLayout { stride: 4, group: 2, group_stride: 24 };
        assert_eq!(starts(56, 5, fused), Some(vec![0, 4, 24, 28, 48]));
        let every_second = RowLayout { stride: 0, group: 1, group_stride: 8 };
        assert_eq!(starts(20, 3, every_second), Some(vec![0, 8, 16]));
        // The last group is short, and a row of the one before it ends last.
        let wide = RowLayout { stride: 40, group: 2, group_stride: 5 };
        assert_eq!(starts(44, 3, wide), Some(vec![0, 40, 5]));
        assert_eq!(starts(0, 0, fused), Some(vec![]));
    }

    #[test]
    fn a_view_that_reaches_beyond_its_bytes_is_refused() {
        assert_eq!(starts(23, 3, RowLayout::strided(10)), None);
        assert_eq!(starts(51, 5, RowLayout { stride: 4, group: 2, group_stride: 24 }), None);
        assert_eq!(starts(43, 3, RowLayout { stride: 40, group: 2, group_stride: 5 }), None);
        assert_eq!(starts(64, 1, RowLayout { stride: 4, group: 0, group_stride: 4 }), None);
        assert_eq!(starts(64, 3, RowLayout::strided(usize::MAX)), None);
        assert_eq!(starts(64, 3, RowLayout { stride: 4, group: 1, group_stride: usize::MAX }), None);
    }
}
