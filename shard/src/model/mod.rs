//! A model: a function of its input and the key/value cache.
//!
//! - `config_file.rs`: `config.json` as typed fields, each error naming the field
//! - `config.rs`: what the fields mean
//! - `decoder.rs`: the decoder that families share, described by a spec
//! - `input.rs`: what is checked of a step before anything is computed
//! - `llama.rs`: one family per file, which says only what that family is
//!
//! To add a family: its file, and its row in [`FAMILIES`].

mod config;
mod config_file;
mod decoder;
mod input;
mod llama;

use std::path::Path;

use kernels::{OpError, Sequence};
use thiserror::Error;

use crate::backend::{Device, Tensor};
use crate::cache::PagedKv;
use crate::layers::LayerError;
use crate::weights::{Checkpoint, WeightError, WeightPath};

pub use config::{Activation, ModelConfig};
pub use config_file::{ConfigError, ConfigFile};
pub use decoder::{Decoder, DecoderSpec, Head};

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

    /// Makes the buffers of a pass over `tokens` tokens of which `logits` are wanted, so that later passes up to this size
    /// find their activations allocated. Errors when that much cannot be had.
    fn reserve(&mut self, tokens: usize, logits: usize) -> Result<(), OpError>;

    /// One pass over a flattened batch; keys and values go into `cache`. Returns logits of the `R` positions that
    /// `input` selects: `[R, vocabulary]`, f32. The result lives until the next pass, whose buffers it shares.
    fn forward(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<&Tensor, OpError>;
}

/// Why a model cannot be loaded. Each names the file, and the field or the tensor.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The configuration is missing, wrong, or of a model that is not served.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are missing, or do not fit the configuration.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The device refuses.
    #[error(transparent)]
    Device(#[from] OpError),
}

impl From<LayerError> for LoadError {
    fn from(error: LayerError) -> Self {
        match error {
            LayerError::Weight(error) => Self::Weight(error),
            LayerError::Device(error) => Self::Device(error),
        }
    }
}

/// Makes a model of one family from its configuration and its weights.
type Family = fn(&ConfigFile, &WeightPath<'_>, Device) -> Result<Box<dyn Model>, LoadError>;

/// `model_type` in `config.json` to family.
const FAMILIES: &[(&str, Family)] = &[("llama", llama::load)];

/// Loads the checkpoint in `directory`: `config.json` and safetensors files. Weights stay in the mapped files.
///
/// Errors when the family is not served, and when a field or a tensor is missing or wrong.
pub fn load(directory: &Path, device: Device) -> Result<Box<dyn Model>, LoadError> {
    let file = ConfigFile::read(directory)?;
    let family = family(&file)?;
    let checkpoint = Checkpoint::open(directory)?;
    family(&file, &WeightPath::root(&checkpoint), device)
}

fn family(file: &ConfigFile) -> Result<Family, ConfigError> {
    let model_type = file.fields().required("model_type", config_file::Fields::text)?;
    let served = FAMILIES.iter().find(|(name, _)| *name == model_type);
    served.map(|&(_, family)| family).ok_or_else(|| {
        let names: Vec<&str> = FAMILIES.iter().map(|&(name, _)| name).collect();
        file.fields().unserved("model_type", model_type, &names)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: &str, expected: &str) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), config).unwrap();
        let device = Device::cpu(std::num::NonZeroUsize::MIN).unwrap();
        let message = match load(directory.path(), device) {
            Ok(_) => panic!("a model was loaded from {config}"),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn an_unknown_model_type_is_one_line_that_lists_what_is_served() {
        check(
            r#"{"model_type":"bert","hidden_size":"nonsense"}"#,
            "config.json: model_type `bert` is not served; served: llama",
        );
    }

    #[test]
    fn a_configuration_without_model_type_is_an_error() {
        check("{}", "config.json: `model_type` is missing");
    }

    #[test]
    fn a_configuration_without_weights_is_an_error() {
        check(r#"{"model_type":"llama"}"#, "no .safetensors file");
    }
}
