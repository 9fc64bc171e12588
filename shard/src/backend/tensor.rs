use std::borrow::Cow;

use kernels::OpError;

#[cfg(feature = "gpu")]
use super::cuda::DeviceTensor;

/// A tensor on the device, `[rows, width]`. Further dimensions, such as heads, are folded into the width. On CPUs elements
/// are f32; on GPUs those that flow through the layers have the model's type, and all others are f32.
///
/// The number of rows changes from step to step. Memory follows the largest number seen and is kept, so that a steady
/// state allocates nothing.
#[derive(Debug)]
pub struct Tensor {
    pub(super) storage: Storage,
    pub(super) rows: usize,
    pub(super) width: usize,
}

#[derive(Debug)]
pub(super) enum Storage {
    /// At least `rows * width` elements; those beyond are left from steps with more rows.
    Host(Vec<f32>),
    /// The same in a GPU's memory.
    #[cfg(feature = "gpu")]
    Device(DeviceTensor),
}

impl Tensor {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.width
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements, row after row. Where they are not in this process's memory, they are copied there, when all that was
    /// asked of the device before is done. Errors when the device has failed.
    pub fn read(&self) -> Result<Cow<'_, [f32]>, OpError> {
        match &self.storage {
            Storage::Host(_) => Ok(Cow::Borrowed(self.host())),
            #[cfg(feature = "gpu")]
            Storage::Device(tensor) => Ok(Cow::Owned(tensor.read(self.len())?)),
        }
    }

    /// Changes the number of rows. What the rows hold afterwards is unspecified: they are to be written first.
    ///
    /// Errors when there is no memory for them; the tensor is then as it was.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        let length = element_count(rows, self.width)?;
        match &mut self.storage {
            Storage::Host(elements) => {
                if length > elements.len() {
                    let more = length - elements.len();
                    elements.try_reserve_exact(more).map_err(|_| no_memory(rows, self.width))?;
                    elements.resize(length, 0.0);
                }
            }
            #[cfg(feature = "gpu")]
            Storage::Device(tensor) => tensor.grow(length)?,
        }
        self.rows = rows;
        Ok(())
    }

    /// The elements, of a tensor of the CPU.
    pub(crate) fn host(&self) -> &[f32] {
        match &self.storage {
            Storage::Host(elements) => &elements[..self.rows * self.width],
            #[cfg(feature = "gpu")]
            Storage::Device(_) => unreachable!("a tensor of a GPU reached an operation of the CPU"),
        }
    }

    /// One row, of a tensor of the CPU. Panics when there is none.
    pub(super) fn host_row(&self, row: usize) -> &[f32] {
        &self.host()[row * self.width..(row + 1) * self.width]
    }

    /// The elements, of a tensor of the CPU, to be written.
    pub(crate) fn host_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::Host(elements) => &mut elements[..self.rows * self.width],
            #[cfg(feature = "gpu")]
            Storage::Device(_) => unreachable!("a tensor of a GPU reached an operation of the CPU"),
        }
    }

    pub(super) fn host_zeros(rows: usize, width: usize) -> Result<Self, OpError> {
        let length = element_count(rows, width)?;
        // `vec!` below gets zeroed pages from the system and touches none of them, but ends the process when it
        // cannot have them. So ask first whether the system would give as much.
        Vec::<f32>::new().try_reserve_exact(length).map_err(|_| no_memory(rows, width))?;
        Ok(Self { storage: Storage::Host(vec![0.0; length]), rows, width })
    }

    pub(super) fn from_host(elements: Vec<f32>, width: usize) -> Result<Self, OpError> {
        let rows = rows_of(elements.len(), width)?;
        Ok(Self { storage: Storage::Host(elements), rows, width })
    }
}

/// Errors when `width` does not divide the number of elements.
pub(super) fn rows_of(elements: usize, width: usize) -> Result<usize, OpError> {
    let rows = elements.checked_div(width).unwrap_or(0);
    if rows * width != elements {
        let expected = rows * width;
        return Err(OpError::Length { op: "upload", what: "elements", expected, found: elements });
    }
    Ok(rows)
}

pub(super) fn element_count(rows: usize, width: usize) -> Result<usize, OpError> {
    rows.checked_mul(width).ok_or_else(|| no_memory(rows, width))
}

fn no_memory(rows: usize, width: usize) -> OpError {
    OpError::Unsupported { op: "tensor", reason: format!("no memory for {rows} rows of {width} elements") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_rows_and_then_more_again_keep_the_memory() {
        let mut tensor = Tensor::host_zeros(8, 3).unwrap();
        let address = tensor.host().as_ptr();
        tensor.set_rows(2).unwrap();
        assert_eq!(tensor.host().len(), 6);
        tensor.set_rows(8).unwrap();
        assert_eq!((tensor.rows(), tensor.host().len(), tensor.host().as_ptr()), (8, 24, address));
    }

    #[test]
    fn a_tensor_that_cannot_be_is_an_error_and_changes_nothing() {
        assert!(Tensor::host_zeros(usize::MAX, 2).is_err());
        assert!(Tensor::host_zeros(usize::MAX / 4, 1).is_err());
        let mut tensor = Tensor::host_zeros(2, 3).unwrap();
        assert!(tensor.set_rows(usize::MAX / 2).is_err());
        assert_eq!(tensor.rows(), 2);
    }

    #[test]
    fn elements_fill_whole_rows() {
        let tensor = Tensor::from_host(vec![1.0, 2.0, 3.0, 4.0], 2).unwrap();
        assert_eq!((tensor.rows(), tensor.width()), (2, 2));
        assert!(Tensor::from_host(vec![1.0, 2.0, 3.0], 2).is_err());
        assert!(Tensor::from_host(vec![1.0], 0).is_err());
    }
}
