//! GPT-2: learned positions, LayerNorms, fused projections that are stored the other way around. StarCoder 1 and SantaCoder
//! are GPT-2 with one key for all heads. Sources: Radford et al. 2019; Li et al. 2023.

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{LearnedPositions, MlpForm, NormSpec, Projections};

/// `gpt2`
pub(super) fn gpt2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::GPT2)?;
    let mut spec = base(&fields, &config)?;
    let by_layer = fields.flag("scale_attn_by_inverse_layer_idx")?.unwrap_or(false);
    for (index, attention) in spec.attentions().enumerate() {
        (attention.transposed, attention.projections) = (true, Projections::Stacked("c_attn"));
        if by_layer {
            attention.scale /= (index + 1) as f32;
        }
    }
    spec.mlps().for_each(|mlp| mlp.transposed = true);
    Ok(spec)
}

/// `gpt_bigcode`
pub(super) fn gpt_bigcode(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let mut config = ModelConfig::parse(&fields, &Names::GPT2)?;
    if fields.flag("multi_query")?.unwrap_or(true) {
        config.heads.kv_heads = 1;
    }
    let mut spec = base(&fields, &config)?;
    // One key for all heads makes one group of all of them.
    spec.attentions().for_each(|attention| attention.projections = Projections::Grouped("c_attn"));
    Ok(spec)
}

fn base(fields: &Fields<'_>, config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    let mut spec = DecoderSpec::llama(fields, config)?;
    spec.body = &["transformer", ""];
    spec.embedding.name = "wte";
    spec.embedding.positions = Some(LearnedPositions { name: "wpe", offset: 0, count: config.positions_max });
    spec.layers_name = "h";
    spec.last_norm = Some("ln_f");
    spec.norm = NormSpec::layer(config.norm_eps);
    spec.ropes.clear();
    let scaled = fields.flag("scale_attn_weights")?.unwrap_or(true);
    for attention in spec.attentions() {
        (attention.output, attention.qkv_bias, attention.output_bias) = ("c_proj", true, true);
        attention.rope = None;
        if !scaled {
            attention.scale = 1.0;
        }
    }
    for mlp in spec.mlps() {
        (mlp.form, mlp.down, mlp.bias) = (MlpForm::Plain("c_fc", config.activation), "c_proj", true);
    }
    for layer in &mut spec.layers {
        (layer.attention_name, layer.block) = ("attn", Block::sequential("ln_1", "ln_2"));
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}
