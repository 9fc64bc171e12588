use kernels::OpError;

/// An f32 tensor on the device, `[rows, width]`. Further dimensions, such as heads, are folded into the width.
///
/// The number of rows changes from step to step. Memory follows the largest number seen and is kept, so that a steady
/// state allocates nothing.
#[derive(Debug)]
pub struct Tensor {
    storage: Storage,
    rows: usize,
    width: usize,
}

#[derive(Debug)]
enum Storage {
    /// At least `rows * width` elements; those beyond are left from steps with more rows.
    Host(Vec<f32>),
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

    /// The elements, row after row, in this process's memory.
    pub fn host(&self) -> &[f32] {
        let Storage::Host(elements) = &self.storage;
        &elements[..self.rows * self.width]
    }

    /// Changes the number of rows. What the rows hold afterwards is unspecified: they are to be written first.
    ///
    /// Errors when there is no memory for them; the tensor is then as it was.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        let Storage::Host(elements) = &mut self.storage;
        let length = element_count(rows, self.width)?;
        if length > elements.len() {
            let more = length - elements.len();
            elements.try_reserve_exact(more).map_err(|_| no_memory(rows, self.width))?;
            elements.resize(length, 0.0);
        }
        self.rows = rows;
        Ok(())
    }

    /// The elements, to be written.
    pub(crate) fn host_mut(&mut self) -> &mut [f32] {
        let Storage::Host(elements) = &mut self.storage;
        &mut elements[..self.rows * self.width]
    }

    pub(super) fn host_zeros(rows: usize, width: usize) -> Result<Self, OpError> {
        let length = element_count(rows, width)?;
        // `vec!` below gets zeroed pages from the system and touches none of them, but ends the process when it
        // cannot have them. So ask first whether the system would give as much.
        Vec::<f32>::new().try_reserve_exact(length).map_err(|_| no_memory(rows, width))?;
        Ok(Self { storage: Storage::Host(vec![0.0; length]), rows, width })
    }

    pub(super) fn from_host(elements: Vec<f32>, width: usize) -> Result<Self, OpError> {
        let rows = elements.len().checked_div(width).unwrap_or(0);
        if rows * width != elements.len() {
            let expected = rows * width;
            return Err(OpError::Length { op: "upload", what: "elements", expected, found: elements.len() });
        }
        Ok(Self { storage: Storage::Host(elements), rows, width })
    }
}

fn element_count(rows: usize, width: usize) -> Result<usize, OpError> {
    rows.checked_mul(width).ok_or_else(|| no_memory(rows, width))
}

fn no_memory(rows: usize, width: usize) -> OpError {
    OpError::Unsupported {
        op: "tensor",
        reason: format!("no memory for {rows} rows of {width} f32 elements"),
    }
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
