use half::{bf16, f16};

use crate::OpError;

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

/// A weight matrix `[rows, cols]` as it lies in the checkpoint: row-major, little-endian, at any alignment.
///
/// A linear layer's weight is `[out, in]`: each output element is the product of one row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// Errors when `bytes` is not exactly `rows * cols` elements long.
    pub fn new(bytes: &'a [u8], dtype: DType, rows: usize, cols: usize) -> Result<Self, OpError> {
        let expected = rows.checked_mul(cols).and_then(|count| count.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            return Err(OpError::Length {
                op: "matrix",
                what: "bytes",
                expected: expected.unwrap_or(usize::MAX),
                found: bytes.len(),
            });
        }
        Ok(Self { bytes, dtype, rows, cols })
    }

    /// All elements, row after row.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
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
    pub fn row(&self, row: usize) -> &'a [u8] {
        let stride = self.cols * self.dtype.size();
        &self.bytes[row * stride..(row + 1) * stride]
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
