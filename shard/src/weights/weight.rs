use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use kernels::{DType, Matrix, RowLayout};

use super::MappedFile;
use super::region::Region;

/// A weight matrix `[rows, cols]`. A clone shares the bytes.
#[derive(Clone)]
pub struct Weight {
    storage: Storage,
    dtype: DType,
    shape: [usize; 2],
    layout: RowLayout,
}

#[derive(Clone)]
enum Storage {
    /// Where the checkpoint's file is mapped: never copied, and shared by all processes that map it.
    Mapped(FileRange),
    /// Elements that no file holds in this form. Not a slice: making one would copy them once more.
    Owned(Arc<Vec<u8>>),
}

/// Bytes of a mapped file.
#[derive(Clone, Debug)]
pub struct FileRange {
    /// The file.
    pub file: Arc<MappedFile>,
    /// Where they lie; inside the file.
    pub range: Range<usize>,
}

impl FileRange {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }
}

impl Weight {
    /// The region of a stored tensor, left where it lies; `None` where it does not lie row by row, at even distances.
    ///
    /// `tensor` is the whole tensor, of the size that the region says: its header was checked when the file was opened, and
    /// the shape when the tensor was asked for.
    pub(super) fn mapped(tensor: &FileRange, dtype: DType, region: &Region) -> Option<Self> {
        if region.transposed {
            return None;
        }
        let (group, group_stride) = region.rows.layout()?;
        let stride = region.whole[1] * dtype.size();
        let layout = RowLayout { stride, group: group.max(1), group_stride: group_stride * stride };
        let range = match region.rows.len() {
            0 => 0..0,
            count => {
                let place =
                    |row, col| (region.offset() + col) * dtype.size() + region.rows.stored(row) * stride;
                place(0, region.cols.start)..place(count - 1, region.cols.end)
            }
        };
        let range = tensor.range.start + range.start..tensor.range.start + range.end;
        let storage = Storage::Mapped(FileRange { file: tensor.file.clone(), range });
        Some(Self { storage, dtype, shape: region.shape(), layout })
    }

    /// A matrix of its own, row by row. `bytes` are as many as its elements need.
    pub(super) fn owned(bytes: Vec<u8>, dtype: DType, shape: [usize; 2]) -> Self {
        let stride = shape[1] * dtype.size();
        debug_assert_eq!(bytes.len(), shape[0] * stride);
        let layout = RowLayout { stride, group: shape[0].max(1), group_stride: bytes.len() };
        Self { storage: Storage::Owned(Arc::new(bytes)), dtype, shape, layout }
    }

    /// Each of `parts` equal parts of the rows, turned: `[parts * rows, cols]` becomes `[parts * cols, rows]`.
    pub fn transpose_parts(&self, parts: usize) -> Self {
        let matrix = self.matrix();
        let [rows, cols] = [self.shape[0] / parts, self.shape[1]];
        let mut bytes = Vec::with_capacity(parts * rows * cols * self.dtype.size());
        for part in 0..parts {
            for col in 0..cols {
                for row in part * rows..(part + 1) * rows {
                    append(&mut bytes, self.dtype, matrix.element(row, col));
                }
            }
        }
        Self::owned(bytes, self.dtype, [parts * cols, rows])
    }

    /// Every row divided by its length, in the same type.
    pub fn normalize_rows(&self) -> Self {
        let matrix = self.matrix();
        let [rows, cols] = self.shape;
        let mut bytes = Vec::with_capacity(rows * cols * self.dtype.size());
        for row in 0..rows {
            let elements = (0..cols).map(|col| matrix.element(row, col));
            let length = elements.clone().map(|element| f64::from(element).powi(2)).sum::<f64>().sqrt();
            // As the reference does, so that a row of zeros stays one.
            let factor = 1.0 / length.max(1e-12) as f32;
            elements.for_each(|element| append(&mut bytes, self.dtype, element * factor));
        }
        Self::owned(bytes, self.dtype, self.shape)
    }

    /// As the operations take it.
    pub fn matrix(&self) -> Matrix<'_> {
        let bytes = match &self.storage {
            Storage::Mapped(mapped) => mapped.bytes(),
            Storage::Owned(bytes) => bytes,
        };
        let [rows, cols] = self.shape;
        Matrix::with_layout(bytes, self.dtype, rows, cols, self.layout)
            .expect("the range was made from the shape and the layout")
    }

    /// Stored element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Where it lies, if in a file.
    pub(super) fn file_range(&self) -> Option<FileRange> {
        match &self.storage {
            Storage::Mapped(mapped) => Some(mapped.clone()),
            Storage::Owned(_) => None,
        }
    }

    /// Bytes of memory that belong to this process alone.
    pub fn private_bytes(&self) -> usize {
        match &self.storage {
            Storage::Mapped(_) => 0,
            Storage::Owned(bytes) => bytes.len(),
        }
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} {:?}", self.dtype, self.shape)?;
        match &self.storage {
            Storage::Mapped(mapped) => write!(formatter, " in {:?}", mapped.file.path()),
            Storage::Owned(_) => formatter.write_str(" in memory"),
        }
    }
}

/// One element as f32, which every stored type fits into exactly.
pub(super) fn read(bytes: &[u8], dtype: DType, index: usize) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes(bytes.as_chunks().0[index]),
        DType::F16 => f16::from_le_bytes(bytes.as_chunks().0[index]).to_f32(),
        DType::BF16 => bf16::from_le_bytes(bytes.as_chunks().0[index]).to_f32(),
    }
}

/// Appends one element, rounded to the nearest that the type has.
pub(super) fn append(bytes: &mut Vec<u8>, dtype: DType, element: f32) {
    match dtype {
        DType::F32 => bytes.extend(element.to_le_bytes()),
        DType::F16 => bytes.extend(f16::from_f32(element).to_le_bytes()),
        DType::BF16 => bytes.extend(bf16::from_f32(element).to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_exactly_and_written_rounded() {
        let values = [0.0, -1.5, 0.25];
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut bytes = Vec::new();
            values.iter().for_each(|&value| append(&mut bytes, dtype, value));
            let found: Vec<f32> = (0..3).map(|index| read(&bytes, dtype, index)).collect();
            assert_eq!(found, values, "{dtype:?}");
        }
        let mut bytes = Vec::new();
        append(&mut bytes, DType::BF16, 1.000_001);
        assert_eq!(read(&bytes, DType::BF16, 0), 1.0);
    }
}
