//! GPT-NeoX and Pythia: parallel blocks with two norms, a share of each head rotated. Source: Black et al. 2022.

use kernels::{Activation, RopeLayout};

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{MlpForm, NormSpec, Projections, RopeSpec};

/// `gpt_neox`
pub(super) fn gpt_neox(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let names = Names {
        norm_eps: "layer_norm_eps",
        norm_eps_default: 1e-5,
        activation_default: Activation::Gelu,
        ..Names::LLAMA
    };
    let mut config = ModelConfig::parse(&fields, &names)?;
    if let Some(theta) = fields.number_from("rotary_emb_base", 1.0)? {
        config.rope.theta = theta;
    }
    let share = fields.number_from("rotary_pct", 0.0)?.or(config.rope.partial).unwrap_or(0.25);
    config.rope.partial = Some(share);
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let bias = fields.flag("attention_bias")?.unwrap_or(true);
    spec.body = &["gpt_neox"];
    spec.embedding.name = "embed_in";
    spec.last_norm = Some("final_layer_norm");
    spec.norm = NormSpec::layer(config.norm_eps);
    spec.ropes = vec![RopeSpec::of_heads(&fields, &config, RopeLayout::HalfSplit)?];
    for attention in spec.attentions() {
        attention.projections = Projections::Grouped("query_key_value");
        (attention.output, attention.qkv_bias, attention.output_bias) = ("dense", bias, bias);
    }
    for mlp in spec.mlps() {
        (mlp.form, mlp.down) = (MlpForm::Plain("dense_h_to_4h", config.activation), "dense_4h_to_h");
        mlp.bias = true;
    }
    let (attention, mlp) = ("input_layernorm", "post_attention_layernorm");
    let parallel = fields.flag("use_parallel_residual")?.unwrap_or(true);
    for layer in &mut spec.layers {
        layer.attention_name = "attention";
        layer.block = match parallel {
            true => Block::Parallel { attention, mlp: Some(mlp) },
            false => Block::sequential(attention, mlp),
        };
    }
    if spec.head.weight != HeadWeight::Tied {
        spec.head.weight = HeadWeight::Own { names: &["embed_out"], bias: false, normalized: false };
    }
    Ok(spec)
}
