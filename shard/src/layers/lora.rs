use std::ops::Range;

use kernels::OpError;

use super::{Linear, Pass};
use crate::backend::{LowRank, Matrix, Tensor};

/// What an adapter adds to the linear layers of a model, cut for this rank. Source: Hu et al. 2021 (LoRA).
#[derive(Debug, Default)]
pub struct Adapter {
    /// By the layer's number.
    pub additions: Vec<Option<Addition>>,
}

/// `scale * (x * a^T) * b^T + bias`, as far as the adapter has it.
#[derive(Debug)]
pub struct Addition {
    /// The product.
    pub pair: Option<LowRankPair>,
    /// `[outputs]`, not scaled.
    pub bias: Option<Tensor>,
}

/// Two matrices of low rank.
#[derive(Debug)]
pub struct LowRankPair {
    /// `[rank, inputs]`
    pub a: Matrix,
    /// `[outputs, rank]`
    pub b: Matrix,
    /// Multiplies the product: `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f32,
}

/// The rows of a pass that one adapter changes.
#[derive(Clone, Debug)]
pub struct AdapterRows<'a> {
    /// Rows of the flattened batch.
    pub rows: Range<usize>,
    /// What changes them.
    pub adapter: &'a Adapter,
}

impl Pass<'_> {
    /// Adds what the adapters of the pass add to this layer's output.
    pub(super) fn add_adapters(
        &self,
        layer: &Linear,
        input: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        let Some(number) = layer.number() else {
            return Ok(());
        };
        for AdapterRows { rows, adapter } in self.adapters {
            let Some(Some(Addition { pair, bias })) = adapter.additions.get(number) else {
                continue;
            };
            if let Some(LowRankPair { a, b, scale }) = pair {
                let args = LowRank { rows: rows.clone(), a, b, scale: *scale, input, out };
                self.device.add_low_rank(args)?;
            }
            if let Some(bias) = bias {
                self.device.add_bias(rows.clone(), bias, out)?;
            }
        }
        Ok(())
    }
}
