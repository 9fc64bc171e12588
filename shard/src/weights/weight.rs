use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use kernels::{DType, Matrix};

use super::MappedFile;

/// A weight matrix `[rows, cols]` that lies in a mapped file. A clone shares the bytes.
#[derive(Clone)]
pub struct Weight {
    file: Arc<MappedFile>,
    range: Range<usize>,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Weight {
    /// `range` is what `rows * cols` elements need, inside the file: its header was checked when it was opened, and the
    /// shape when the tensor was asked for.
    pub(super) fn new(
        file: Arc<MappedFile>,
        range: Range<usize>,
        dtype: DType,
        [rows, cols]: [usize; 2],
    ) -> Self {
        debug_assert_eq!(range.len(), rows * cols * dtype.size());
        Self { file, range, dtype, rows, cols }
    }

    /// As the operations take it.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.file.bytes()[self.range.clone()], self.dtype, self.rows, self.cols)
            .expect("the range was checked against the shape when the weight was made")
    }

    /// Stored element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} [{}, {}] in {:?}", self.dtype, self.rows, self.cols, self.file.path())
    }
}

/// Stored elements as f32.
pub(super) fn widen(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::F32 => elements(bytes).map(f32::from_le_bytes).collect(),
        DType::F16 => elements(bytes).map(|element| f16::from_le_bytes(element).to_f32()).collect(),
        DType::BF16 => elements(bytes).map(|element| bf16::from_le_bytes(element).to_f32()).collect(),
    }
}

fn elements<const SIZE: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; SIZE]> {
    bytes.as_chunks::<SIZE>().0.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_elements_widen_exactly() {
        let values = [0.0, -1.5, 0.25];
        let f32_bytes: Vec<u8> = values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
        let f16_bytes: Vec<u8> =
            values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> =
            values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        assert_eq!(widen(&f32_bytes, DType::F32), values);
        assert_eq!(widen(&f16_bytes, DType::F16), values);
        assert_eq!(widen(&bf16_bytes, DType::BF16), values);
    }
}
