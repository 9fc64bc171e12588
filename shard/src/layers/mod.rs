//! The parts of a decoder. Each has a spec (its sizes), loads itself from a path in the checkpoint, and runs on
//! whatever device it is given. None knows which family it serves.
//!
//! Layers are immutable once loaded; what changes from step to step lives in buffers that the decoder owns.

mod attention;
mod embedding;
mod linear;
mod mlp;
mod norm;
mod rope;

pub use attention::{Attention, AttentionBuffers, AttentionIo, AttentionSpec, AttentionStep};
pub use embedding::Embedding;
pub use linear::{Linear, LinearSpec};
pub use mlp::{Mlp, MlpBuffers, MlpSpec};
pub use norm::Norm;
pub use rope::{Rope, RopeScaling, RopeSpec};

use kernels::OpError;
use thiserror::Error;

use crate::weights::WeightError;

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
