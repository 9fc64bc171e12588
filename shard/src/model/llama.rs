//! Llama 2 and 3, and the many models with the same configuration.
//!
//! Source: Touvron et al. 2023; Llama 3.1 for the rotary scaling.

use kernels::RopeLayout;

use super::{Activation, ConfigFile, Decoder, DecoderSpec, Head, LoadError, Model, ModelConfig};
use crate::backend::Device;
use crate::layers::{AttentionSpec, MlpSpec, RopeSpec};
use crate::weights::WeightPath;

/// The model of a checkpoint whose `model_type` is `llama`.
pub(super) fn load(
    file: &ConfigFile,
    weights: &WeightPath<'_>,
    device: Device,
) -> Result<Box<dyn Model>, LoadError> {
    let spec = DecoderSpec::llama(&ModelConfig::parse(file)?);
    Ok(Box::new(Decoder::load(spec, weights, device)?))
}

impl DecoderSpec {
    /// The plain decoder: grouped attention over all earlier tokens, rotary positions in two halves, SwiGLU.
    pub fn llama(config: &ModelConfig) -> Self {
        let ModelConfig { hidden, intermediate, heads, positions_max, .. } = *config;
        Self {
            vocabulary: config.vocabulary,
            hidden,
            layers: config.layers,
            norm_eps: config.norm_eps,
            attention: AttentionSpec {
                hidden,
                heads,
                scale: (heads.head_dim as f32).sqrt().recip(),
                qkv_bias: config.attention_bias,
                output_bias: config.attention_bias,
            },
            rope: RopeSpec {
                rotary_dim: heads.head_dim,
                layout: RopeLayout::HalfSplit,
                theta: config.rope_theta,
                scaling: config.rope_scaling,
                positions_max,
            },
            mlp: match config.activation {
                Activation::Silu => MlpSpec { hidden, intermediate, bias: config.mlp_bias },
            },
            head: match config.tie_word_embeddings {
                Some(true) => Head::Tied,
                Some(false) | None => Head::Own,
            },
        }
    }
}
