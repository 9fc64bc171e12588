//! GLM 4: half of each head rotated in neighbouring pairs, a fused MLP; the newer one has norms behind its parts, too. Source:
//! GLM Team 2024, "ChatGLM".

use kernels::{Gating, RopeLayout};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec};
use crate::layers::{GatedNames, MlpForm, RopeSpec};

/// `glm`
pub(super) fn glm(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("partial_rotary_factor", json!(0.5))]);
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { norm_eps_default: 1.5625e-7, ..Names::LLAMA })?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    spec.ropes = vec![RopeSpec::of_heads(&fields, &config, RopeLayout::Interleaved)?];
    spec.attentions().for_each(|attention| attention.output_bias = false);
    let gating = Gating::Activation(config.activation);
    spec.mlps().for_each(|mlp| mlp.form = MlpForm::Gated(GatedNames::Stacked("gate_up_proj"), gating));
    Ok(spec)
}

/// `glm4`
pub(super) fn glm4(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let mut spec = glm(file)?;
    for layer in &mut spec.layers {
        layer.block = Block::Sequential {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_self_attn_layernorm"),
            before_mlp: Some("post_attention_layernorm"),
            after_mlp: Some("post_mlp_layernorm"),
        };
    }
    Ok(spec)
}
