//! A model: a function of its input and the key/value cache.

use kernels::{OpError, Sequence};

use crate::backend::Tensor;
use crate::cache::PagedKv;

/// What the engine needs to know of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Width of a row of logits.
    pub vocabulary: usize,
    /// Decoder layers, each with its own cache.
    pub layers: usize,
    /// Key/value heads per layer on this device.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub positions_max: usize,
    /// Type of the stored weights.
    pub dtype: kernels::DType,
}

/// One step's flattened batch of `T` tokens.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// `[T]`, token ids, each below the vocabulary size.
    pub ids: &'a [u32],
    /// `[T]`, position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[T]`, cache slot that receives each token's key and value.
    pub slots: &'a [u32],
    /// The requests; their rows cover `0 .. T` without overlap.
    pub sequences: &'a [Sequence<'a>],
    /// `[R]`, the tokens whose logits are wanted, in ascending order.
    pub logits_at: &'a [u32],
}

/// A causal language model.
pub trait Model: Send {
    /// Sizes the engine plans with.
    fn shape(&self) -> &ModelShape;

    /// One pass over a flattened batch; keys and values go into `cache`. Returns logits of the `R` positions that
    /// `input` selects: `[R, vocabulary]`, f32. The result lives until the next pass, whose buffers it shares.
    fn forward(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<&Tensor, OpError>;
}
