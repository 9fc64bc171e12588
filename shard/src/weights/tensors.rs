//! The tensors of one file, by name: what the reader of each format gives.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use safetensors::tensor::Dtype;

use super::{MappedFile, WeightError, pytorch, safetensors as safetensors_file};

/// Most dimensions of a tensor. Those of models have up to five.
pub(super) const DIMENSIONS_MAX: usize = 8;

/// How a file says what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `.safetensors`
    Safetensors,
    /// `.bin` and `.pt`, as `torch.save` writes them
    PyTorch,
}

/// The tensors of a file, all of them known to lie inside it.
#[derive(Debug, Default)]
pub struct Tensors {
    by_name: HashMap<String, FileTensor>,
}

/// Where a tensor lies in its file.
#[derive(Debug)]
pub(super) struct FileTensor {
    /// Element type.
    pub(super) dtype: Dtype,
    /// Shape.
    pub(super) shape: Vec<usize>,
    /// From its first element to behind its last.
    pub(super) bytes: Range<usize>,
    /// Present when its elements do not lie one after the other.
    strided: Option<Strided>,
}

#[derive(Debug)]
struct Strided {
    /// Elements between neighbours, by dimension.
    strides: Vec<usize>,
    /// The elements in order, once somebody has asked.
    copy: OnceLock<Arc<MappedFile>>,
}

/// A tensor whose elements lie in a storage at regular distances. Offset, strides and shape count elements.
#[derive(Debug)]
pub(super) struct StridedView {
    pub(super) dtype: Dtype,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// As many as there are sizes in the shape.
    pub(super) strides: Vec<usize>,
    /// The storage, in the file.
    pub(super) bytes: Range<usize>,
}

impl Tensors {
    /// What a file of this format holds, whose contents are `bytes`. `path` is for errors: nothing is opened.
    ///
    /// Errors when the bytes contradict themselves, or are not in this format; each names the file, and the tensor where
    /// there is one. Memory stays in proportion to the part that describes the tensors.
    pub fn parse(format: Format, path: &Path, bytes: &[u8]) -> Result<Self, WeightError> {
        match format {
            Format::Safetensors => safetensors_file::parse(path, bytes),
            Format::PyTorch => pytorch::parse(bytes)
                .map_err(|source| WeightError::Torch { file: path.to_owned(), source: Box::new(source) }),
        }
    }

    /// Their names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The part of the file that a tensor lies in.
    pub fn bytes(&self, name: &str) -> Option<Range<usize>> {
        self.by_name.get(name).map(|tensor| tensor.bytes.clone())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    pub(super) fn get(&self, name: &str) -> Option<&FileTensor> {
        self.by_name.get(name)
    }

    /// False when the name was there already.
    pub(super) fn insert(&mut self, name: &str, tensor: FileTensor) -> bool {
        self.by_name.insert(name.to_owned(), tensor).is_none()
    }
}

impl FileTensor {
    /// A tensor whose elements lie one after the other.
    pub(super) fn new(dtype: Dtype, shape: Vec<usize>, bytes: Range<usize>) -> Self {
        Self { dtype, shape, bytes, strided: None }
    }

    /// Where its elements lie one after the other: in its own file, or else in a copy, which is made once and kept.
    pub(super) fn contiguous<'a>(&'a self, file: &'a Arc<MappedFile>) -> (&'a Arc<MappedFile>, Range<usize>) {
        match &self.strided {
            None => (file, self.bytes.clone()),
            Some(Strided { strides, copy }) => {
                let copy = copy.get_or_init(|| {
                    let stored = &file.bytes()[self.bytes.clone()];
                    let elements = gather(stored, self.dtype.bitsize() / 8, &self.shape, strides);
                    Arc::new(MappedFile::copied(file.path(), elements))
                });
                (copy, 0..copy.bytes().len())
            }
        }
    }
}

impl StridedView {
    /// How many elements the storage holds.
    pub(super) fn stored(&self) -> usize {
        self.bytes.len() / self.size()
    }

    /// Whether every element lies inside of the storage.
    pub(super) fn fits(&self) -> bool {
        match self.elements() {
            None => false,
            Some(0) => self.offset <= self.stored(),
            Some(_) => self.last().is_some_and(|last| last < self.stored()),
        }
    }

    /// Whether there are more elements than the storage holds.
    pub(super) fn repeats(&self) -> bool {
        self.elements().is_none_or(|elements| elements > self.stored())
    }

    fn size(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    fn elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size))
    }

    /// The last element, of a view that has any.
    fn last(&self) -> Option<usize> {
        self.shape
            .iter()
            .zip(&self.strides)
            .try_fold(self.offset, |at, (&size, &stride)| at.checked_add((size - 1).checked_mul(stride)?))
    }

    /// Whether the last dimension's elements are neighbours, and each dimension's rows follow each other.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let follows = size == 1 || stride == expected;
            expected *= size;
            follows
        })
    }
}

/// Of a view that [`StridedView::fits`].
impl From<StridedView> for FileTensor {
    fn from(view: StridedView) -> Self {
        let start = view.bytes.start + view.offset * view.size();
        if view.elements() == Some(0) {
            return Self::new(view.dtype, view.shape, start..start);
        }
        let end = view.last().map_or(start, |last| view.bytes.start + (last + 1) * view.size());
        let contiguous = view.is_contiguous();
        let strided = || Strided { strides: view.strides, copy: OnceLock::new() };
        let strided = (!contiguous).then(strided);
        Self { dtype: view.dtype, shape: view.shape, bytes: start..end, strided }
    }
}

/// The elements in the order of their indexes. None of the sizes is zero.
fn gather(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let elements: usize = shape.iter().product();
    let mut gathered = Vec::with_capacity(elements * size);
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    for _ in 0..elements {
        gathered.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        for dimension in (0..shape.len()).rev() {
            index[dimension] += 1;
            at += strides[dimension];
            if index[dimension] < shape[dimension] {
                break;
            }
            at -= strides[dimension] * shape[dimension];
            index[dimension] = 0;
        }
    }
    gathered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(offset: usize, shape: &[usize], strides: &[usize]) -> StridedView {
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        StridedView { dtype: Dtype::U8, offset, shape, strides, bytes: 100..106 }
    }

    #[test]
    fn neighbours_stay_where_they_are_whatever_the_stride_of_a_single_row() {
        for (offset, shape, strides) in [
            (0, &[2usize, 3] as &[usize], &[3usize, 1] as &[usize]),
            (3, &[3], &[1]),
            (2, &[1, 4], &[77, 1]),
            (5, &[], &[]),
        ] {
            let view = view(offset, shape, strides);
            assert!(view.fits() && !view.repeats());
            let elements: usize = shape.iter().product();
            let tensor = FileTensor::from(view);
            assert!(tensor.strided.is_none(), "{shape:?}");
            assert_eq!(tensor.bytes, 100 + offset..100 + offset + elements);
        }
    }

    #[test]
    fn a_tensor_without_elements_takes_no_bytes() {
        let view = view(6, &[0, 4], &[4, 1]);
        assert!(view.fits());
        assert!(FileTensor::from(view).bytes.is_empty());
    }

    #[test]
    fn elements_are_gathered_in_the_order_of_their_indexes() {
        let bytes: Vec<u8> = (0..12).collect();
        assert_eq!(gather(&bytes[..6], 1, &[3, 2], &[1, 3]), [0, 3, 1, 4, 2, 5]);
        assert_eq!(gather(&bytes[..6], 1, &[2, 2], &[3, 1]), [0, 1, 3, 4]);
        assert_eq!(gather(&bytes, 2, &[2, 3], &[1, 2]), [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]);
    }

    #[test]
    fn a_view_that_leaves_its_storage_does_not_fit() {
        for (offset, shape, strides) in [
            (0, &[7usize] as &[usize], &[1usize] as &[usize]),
            (1, &[2, 3], &[3, 1]),
            (7, &[0], &[1]),
            (usize::MAX, &[1], &[1]),
            (1, &[2], &[usize::MAX]),
            (0, &[usize::MAX, usize::MAX], &[0, 0]),
        ] {
            assert!(!view(offset, shape, strides).fits(), "{offset} {shape:?} {strides:?}");
        }
        assert!(view(0, &[7], &[0]).repeats());
    }
}
