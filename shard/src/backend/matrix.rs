use std::fmt;

#[cfg(feature = "gpu")]
use kernels::cuda::OwnedMatrix;

use super::Tensor;
use crate::weights::Weight;

/// A weight matrix `[rows, cols]` where the operations find it. A clone shares it.
#[derive(Clone)]
pub struct Matrix(pub(super) MatrixStorage);

#[derive(Clone)]
pub(super) enum MatrixStorage {
    /// In this process's memory, as the checkpoint has it.
    Host(Weight),
    /// In a GPU's memory, in the model's type.
    #[cfg(feature = "gpu")]
    Device(OwnedMatrix),
}

impl Matrix {
    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        match &self.0 {
            MatrixStorage::Host(weight) => weight.shape(),
            #[cfg(feature = "gpu")]
            MatrixStorage::Device(matrix) => [matrix.rows, matrix.cols],
        }
    }

    /// As operations of the CPU take it.
    pub(super) fn host(&self) -> kernels::Matrix<'_> {
        match &self.0 {
            MatrixStorage::Host(weight) => weight.matrix(),
            #[cfg(feature = "gpu")]
            MatrixStorage::Device(_) => unreachable!("a weight on a GPU reached an operation of the CPU"),
        }
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            MatrixStorage::Host(weight) => weight.fmt(formatter),
            #[cfg(feature = "gpu")]
            MatrixStorage::Device(matrix) => matrix.fmt(formatter),
        }
    }
}

/// A weight with its bias.
#[derive(Debug)]
pub struct Projection {
    /// `[outputs, inputs]`
    pub weight: Matrix,
    /// `[outputs]`
    pub bias: Option<Tensor>,
}
