//! StableLM: Llama with LayerNorms, a quarter of each head rotated, and perhaps parallel blocks. Source: Bellagente et al. 2024.

use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec};
use crate::layers::{NormSpec, QkNorm, QkNormScope};

/// `stablelm`
pub(super) fn stablelm(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("partial_rotary_factor", json!(0.25))]);
    let fields = file.fields();
    let names = Names { norm_eps: "layer_norm_eps", norm_eps_default: 1e-5, ..Names::LLAMA };
    let config = ModelConfig::parse(&fields, &names)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    spec.norm = NormSpec::layer(config.norm_eps);
    let qkv_bias = fields.flag("use_qkv_bias")?.unwrap_or(false);
    let qk_norm = fields.flag("qk_layernorm")?.unwrap_or(false).then_some(QkNorm {
        norm: NormSpec { bias: false, ..spec.norm },
        scope: QkNormScope::Modules,
        query: "q_layernorm",
        key: "k_layernorm",
    });
    for attention in spec.attentions() {
        (attention.qkv_bias, attention.output_bias, attention.qk_norm) = (qkv_bias, false, qk_norm);
    }
    if fields.flag("use_parallel_residual")?.unwrap_or(false) {
        for layer in &mut spec.layers {
            layer.block = Block::Parallel { attention: "input_layernorm", mlp: None };
        }
    }
    Ok(spec)
}
