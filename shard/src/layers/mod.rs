//! The parts of a decoder. Each has a spec (its sizes over all ranks), loads this rank's part of itself from a path in the
//! checkpoint, and runs on whatever device it is given. None knows which family it serves.
//!
//! Layers are immutable once loaded; what changes from step to step lives in buffers that the decoder owns.

mod attention;
mod embedding;
mod latent;
mod linear;
mod lora;
mod mlp;
mod moe;
mod norm;
mod rope;

pub use attention::{
    Alibi, Attention, AttentionBuffers, AttentionIo, AttentionSpec, AttentionStep, Projections, QkNorm,
    QkNormScope,
};
pub use embedding::{Embedding, EmbeddingSpec, LearnedPositions};
pub use latent::{LatentAttention, LatentBuffers, LatentSpec, Queries};
pub use linear::{Linear, project};
pub use lora::{Adapter, AdapterRows, Addition, LowRankPair};
pub use mlp::{GatedNames, Mlp, MlpBuffers, MlpForm, MlpSpec};
pub use moe::{ExpertNames, Moe, MoeBuffers, MoeSpec, RoutingSpec, SharedExpert};
pub use norm::{Norm, NormSpec, NormWeight};
pub use rope::{Rope, RopeScaling, RopeSpec, TokenPlaces};

use kernels::OpError;
use thiserror::Error;

use crate::backend::Device;
use crate::collective::Ranks;
use crate::weights::WeightError;

/// What every layer of a pass needs besides its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Where it runs.
    pub device: &'a Device,
    /// Who runs it together.
    pub ranks: &'a Ranks,
    /// Which rows are changed by adapters.
    pub adapters: &'a [AdapterRows<'a>],
}

/// Why a layer cannot be loaded.
#[derive(Debug, Error)]
pub enum LayerError {
    /// Its weights are missing or wrong.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The device does not take them.
    #[error(transparent)]
    Device(#[from] OpError),
}
