//! Cohere's Command models: parallel blocks, LayerNorms without a bias, interleaved rotary pairs, scaled logits. In the second
//! generation three layers slide and every fourth sees everything, without positions.

use kernels::{NormKind, RopeLayout};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{NormSpec, NormWeight, QkNorm, QkNormScope, RopeSpec};

/// `cohere`: Command-R, R+, Aya
pub(super) fn cohere(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let mut spec = base(&fields)?;
    if fields.flag("use_qk_norm")?.unwrap_or(false) {
        let (norm, scope) = (spec.norm, QkNormScope::EachHead);
        let qk_norm = QkNorm { norm, scope, query: "q_norm", key: "k_norm" };
        spec.attentions().for_each(|attention| attention.qk_norm = Some(qk_norm));
    }
    Ok(spec)
}

/// `cohere2`: Command-R7B, Command A
pub(super) fn cohere2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("sliding_window", json!(4096))]);
    let fields = file.fields();
    let mut spec = base(&fields)?;
    let pattern =
        fields.size("sliding_window_pattern")?.or(fields.size("_sliding_window_pattern")?).unwrap_or(4);
    let windows = config(&fields)?.windows(|layer| !(layer + 1).is_multiple_of(pattern));
    spec.set_windows(&windows);
    spec.attentions().for_each(|attention| attention.rope = attention.window.map(|_| 0));
    Ok(spec)
}

fn config(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let names = Names { norm_eps: "layer_norm_eps", norm_eps_default: 1e-5, ..Names::LLAMA };
    ModelConfig::parse(fields, &names)
}

fn base(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    let config = config(fields)?;
    let mut spec = DecoderSpec::llama(fields, &config)?;
    spec.norm =
        NormSpec { kind: NormKind::Layer, eps: config.norm_eps, weight: NormWeight::Plain, bias: false };
    spec.ropes = vec![RopeSpec::of_heads(fields, &config, RopeLayout::Interleaved)?];
    for layer in &mut spec.layers {
        layer.block = Block::Parallel { attention: "input_layernorm", mlp: None };
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    spec.head.scale = Some(fields.number_from("logit_scale", 0.0)?.unwrap_or(0.0625) as f32);
    Ok(spec)
}
