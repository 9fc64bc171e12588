use kernels::{DType, OpError};

use super::{LayerError, Linear};
use crate::backend::{Device, Tensor};
use crate::weights::{Weight, WeightPath};

/// A vector per token id.
#[derive(Debug)]
pub struct Embedding {
    table: Weight,
}

impl Embedding {
    /// Takes `weight`, `[vocabulary, width]`, from `path`.
    pub fn load(path: &WeightPath<'_>, vocabulary: usize, width: usize) -> Result<Self, LayerError> {
        Ok(Self { table: path.at("weight").matrix(vocabulary, width)? })
    }

    /// `out[t]` is the vector of `ids[t]`.
    pub fn forward(&self, device: &Device, ids: &[u32], out: &mut Tensor) -> Result<(), OpError> {
        device.embedding(&self.table, ids, out)
    }

    /// The output head of a model that ties it to the embedding: the same weight, shared.
    pub fn tied_head(&self) -> Linear {
        Linear::sharing(self.table.clone())
    }

    /// Stored element type.
    pub fn dtype(&self) -> DType {
        self.table.dtype()
    }
}
