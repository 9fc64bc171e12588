//! LoRA adapters: PEFT's files to what they add to the linear layers of a loaded model.
//!
//! - `config.rs`: `adapter_config.json`
//! - `load.rs`: the tensors, cut for this rank as the layers they belong to are
//!
//! What is absent: which request uses which adapter; the engine knows.

mod config;
mod load;

use std::path::PathBuf;

use kernels::OpError;
use thiserror::Error;

use crate::layers::LayerError;
use crate::model::ConfigError;
use crate::weights::WeightError;

pub use load::AdapterLayout;

/// Why an adapter cannot be loaded. Each names the file, and the field or the tensor.
#[derive(Debug, Error)]
pub enum AdapterError {
    /// Its configuration is missing, wrong, or asks for something that is not served.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor is missing, or does not fit the model.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The device does not take it.
    #[error(transparent)]
    Device(#[from] OpError),
    /// Its weights do not reach the device.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// It changes something that adapters cannot change here: leaving that out would change answers.
    #[error("{}: tensor `{tensor}` belongs to no linear layer of this model that adapters can change", directory.display())]
    Unused {
        /// The adapter.
        directory: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// It changes nothing.
    #[error("{}: no tensor of this adapter belongs to the model", directory.display())]
    Empty {
        /// The adapter.
        directory: PathBuf,
    },
}
