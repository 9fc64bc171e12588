use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

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
    /// Nowhere: all that is known is how large it is.
    Absent,
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

    /// A matrix of its own, made row by row: `row` answers with what makes the elements of one. Each is rounded to the
    /// nearest that the type has.
    pub(super) fn from_rows<R: Fn(usize) -> f32>(
        dtype: DType,
        [rows, cols]: [usize; 2],
        row: impl Fn(usize) -> R + Sync,
    ) -> Self {
        /// Fewer elements are not worth a thread.
        const PER_THREAD_MIN: usize = 1 << 16;
        let width = cols * dtype.size();
        let mut bytes = vec![0; rows * width];
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = threads.min(rows * cols / PER_THREAD_MIN).max(1);
        let per_thread = rows.div_ceil(threads).max(1);
        thread::scope(|scope| {
            for (part, bytes) in bytes.chunks_mut((per_thread * width).max(1)).enumerate() {
                let row = &row;
                scope.spawn(move || {
                    for (index, bytes) in (part * per_thread..).zip(bytes.chunks_exact_mut(width.max(1))) {
                        let element = row(index);
                        (0..cols).for_each(|col| write(bytes, dtype, col, element(col)));
                    }
                });
            }
        });
        let layout = RowLayout { stride: width, group: rows.max(1), group_stride: bytes.len() };
        Self { storage: Storage::Owned(Arc::new(bytes)), dtype, shape: [rows, cols], layout }
    }

    /// The size of a weight, for plans: it has no elements.
    pub(super) fn absent(dtype: DType, shape: [usize; 2]) -> Self {
        let layout = RowLayout::strided(shape[1] * dtype.size());
        Self { storage: Storage::Absent, dtype, shape, layout }
    }

    /// Each of `parts` equal parts of the rows, turned: `[parts * rows, cols]` becomes `[parts * cols, rows]`.
    pub fn transpose_parts(&self, parts: usize) -> Self {
        let [rows, cols] = [self.shape[0] / parts, self.shape[1]];
        if let Storage::Absent = self.storage {
            return Self::absent(self.dtype, [parts * cols, rows]);
        }
        let matrix = self.matrix();
        // A row of the result is a column of a part.
        Self::from_rows(self.dtype, [parts * cols, rows], |row| {
            move |col| matrix.element(row / cols * rows + col, row % cols)
        })
    }

    /// Every row divided by its length, in the same type.
    pub fn normalize_rows(&self) -> Self {
        if let Storage::Absent = self.storage {
            return self.clone();
        }
        let matrix = self.matrix();
        let [rows, cols] = self.shape;
        let factor = |row: usize| {
            let squares = (0..cols).map(|col| f64::from(matrix.element(row, col)).powi(2));
            // As the reference does, so that a row of zeros stays one.
            1.0 / squares.sum::<f64>().sqrt().max(1e-12) as f32
        };
        let factors: Vec<f32> = (0..rows).map(factor).collect();
        Self::from_rows(self.dtype, self.shape, |row| {
            let factor = factors[row];
            move |col| matrix.element(row, col) * factor
        })
    }

    /// As the operations take it. Panics when it has no elements.
    pub fn matrix(&self) -> Matrix<'_> {
        let bytes = match &self.storage {
            Storage::Mapped(mapped) => mapped.bytes(),
            Storage::Owned(bytes) => bytes,
            Storage::Absent => panic!("a weight that was loaded for its size has no elements"),
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
            Storage::Owned(_) | Storage::Absent => None,
        }
    }

    /// Bytes of memory that belong to this process alone.
    #[cfg(test)]
    pub(super) fn private_bytes(&self) -> usize {
        match &self.storage {
            Storage::Mapped(_) | Storage::Absent => 0,
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
            Storage::Absent => formatter.write_str(" nowhere"),
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

/// Writes one element, rounded to the nearest that the type has.
fn write(bytes: &mut [u8], dtype: DType, index: usize, element: f32) {
    match dtype {
        DType::F32 => bytes.as_chunks_mut().0[index] = element.to_le_bytes(),
        DType::F16 => bytes.as_chunks_mut().0[index] = f16::from_f32(element).to_le_bytes(),
        DType::BF16 => bytes.as_chunks_mut().0[index] = bf16::from_f32(element).to_le_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(weight: &Weight) -> Vec<f32> {
        let [rows, cols] = weight.shape();
        (0..rows * cols).map(|at| weight.matrix().element(at / cols, at % cols)).collect()
    }

    #[test]
    fn elements_are_written_rounded_and_read_exactly() {
        let values = [0.0, -1.5, 0.25, 8.0];
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let weight = Weight::from_rows(dtype, [2, 2], |row| move |col| values[2 * row + col]);
            assert_eq!(elements(&weight), values, "{dtype:?}");
        }
        let weight = Weight::from_rows(DType::BF16, [1, 1], |_| |_| 1.000_001);
        assert_eq!(elements(&weight), [1.0]);
    }

    #[test]
    fn a_matrix_for_several_threads_is_made_in_the_right_order() {
        let weight = Weight::from_rows(DType::F32, [301, 700], |row| move |col| (row * 700 + col) as f32);
        assert!(elements(&weight).iter().enumerate().all(|(at, &element)| element == at as f32));
    }

    #[test]
    fn parts_are_turned_one_by_one() {
        // Two parts of [2, 3].
        let weight = Weight::from_rows(DType::F32, [4, 3], |row| move |col| (10 * row + col) as f32);
        let turned = weight.transpose_parts(2);
        assert_eq!(turned.shape(), [6, 2]);
        assert_eq!(elements(&turned), [0., 10., 1., 11., 2., 12., 20., 30., 21., 31., 22., 32.]);
    }

    #[test]
    fn rows_are_divided_by_their_length() {
        let rows = [[0.0, 0.0], [3.0, 4.0]];
        let weight = Weight::from_rows(DType::F32, [2, 2], |row| move |col| rows[row][col]);
        assert_eq!(elements(&weight.normalize_rows()), [0.0, 0.0, 0.6, 0.8]);
    }
}
