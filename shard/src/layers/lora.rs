use std::ops::Range;

use kernels::OpError;

use super::{Linear, Pass};
use crate::backend::{LowRank, Tensor};
use crate::weights::Weight;

/// What an adapter adds to the linear layers of a model, cut for this rank. Source: Hu et al. 2021 (LoRA).
#[derive(Debug, Default)]
pub struct Adapter {
    /// By the layer's number.
    pub additions: Vec<Option<Addition>>,
}

/// `scale * (x * a^T) * b^T + bias`
#[derive(Debug)]
pub struct Addition {
    /// `[rank, inputs]`
    pub a: Weight,
    /// `[outputs, rank]`
    pub b: Weight,
    /// `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f32,
    /// `[outputs]`
    pub bias: Option<Tensor>,
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
            let Some(Some(Addition { a, b, scale, bias })) = adapter.additions.get(number) else {
                continue;
            };
            let (rows, scale, bias) = (rows.clone(), *scale, bias.as_ref());
            self.device.add_low_rank(LowRank { rows, a, b, scale, bias, input, out })?;
        }
        Ok(())
    }
}
