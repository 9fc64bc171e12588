//! MPT: linear biases, clipped projections, LayerNorms without biases. Source: MosaicML 2023.

use kernels::Activation;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{Alibi, LearnedPositions, MlpForm, NormSpec, Projections, QkNorm, QkNormScope};

/// `mpt`
pub(super) fn mpt(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let names = Names {
        hidden: "d_model",
        layers: "n_layers",
        heads: "n_heads",
        positions_max: "max_seq_len",
        intermediate: "",
        widening: Some(fields.size("expansion_ratio")?.unwrap_or(4)),
        norm_eps: "layer_norm_epsilon",
        norm_eps_default: 1e-5,
        activation: "",
        activation_default: Activation::Gelu,
        ..Names::LLAMA
    };
    let mut config = ModelConfig::parse(&fields, &names)?;
    let attention = fields.object("attn_config")?;
    let attention = attention.as_ref();
    if let Some(heads) = attention.map(|fields| fields.size("kv_n_heads")).transpose()?.flatten() {
        config.heads.kv_heads = heads;
    }
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let bias = !fields.flag("no_bias")?.unwrap_or(true);
    spec.body = &["transformer"];
    spec.embedding.name = "wte";
    spec.layers_name = "blocks";
    spec.last_norm = Some("norm_f");
    spec.norm = NormSpec { bias, ..NormSpec::layer(config.norm_eps) };
    spec.ropes.clear();
    set_attention(attention, &mut spec, &config, bias)?;
    for mlp in spec.mlps() {
        (mlp.form, mlp.down, mlp.bias) = (MlpForm::Plain("up_proj", config.activation), "down_proj", bias);
    }
    for layer in &mut spec.layers {
        (layer.attention_name, layer.mlp_name) = ("attn", "ffn");
        layer.block = Block::sequential("norm_1", "norm_2");
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    spec.head.scale = match fields.text_or_number("logit_scale")? {
        Some(Err("inv_sqrt_d_model")) => Some((config.hidden as f32).sqrt().recip()),
        Some(Err(other)) => return Err(fields.unserved("logit_scale", other, &["inv_sqrt_d_model"])),
        Some(Ok(scale)) => Some(scale as f32),
        None => None,
    };
    Ok(spec)
}

fn set_attention(
    fields: Option<&Fields<'_>>,
    spec: &mut DecoderSpec,
    config: &ModelConfig,
    bias: bool,
) -> Result<(), ConfigError> {
    let flag = |name| Ok(fields.map(|fields| fields.flag(name)).transpose()?.flatten());
    let number = |name| {
        let number = fields.map(|fields| fields.number_from(name, f64::MIN_POSITIVE)).transpose()?;
        Ok(number.flatten().map(|number| number as f32))
    };
    let alibi = match flag("alibi")?.unwrap_or(true) {
        true => Some(Alibi { exponent_max: number("alibi_bias_max")?.unwrap_or(8.0), factor: 1.0 }),
        false => None,
    };
    if alibi.is_none() {
        let count = config.positions_max;
        spec.embedding.positions = Some(LearnedPositions { name: "wpe", offset: 0, count });
    }
    let (clip, scale) = (number("clip_qkv")?, number("softmax_scale")?);
    let (norm, scope) = (spec.norm, QkNormScope::Width);
    let qk_norm =
        flag("qk_ln")?.unwrap_or(false).then_some(QkNorm { norm, scope, query: "q_ln", key: "k_ln" });
    for attention in spec.attentions() {
        attention.projections = Projections::Stacked("Wqkv");
        (attention.output, attention.qkv_bias, attention.output_bias) = ("out_proj", bias, bias);
        (attention.rope, attention.alibi, attention.clip, attention.qk_norm) = (None, alibi, clip, qk_norm);
        attention.scale = scale.unwrap_or(attention.scale);
    }
    Ok(())
}
