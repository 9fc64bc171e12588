//! Falcon, old and new: parallel blocks with one norm or two, fused projections with one key for all heads, one per group, or
//! one per head; the smallest ones with linear biases instead of rotations. Source: Almazrouei et al. 2023.

use kernels::Activation;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{Alibi, MlpForm, NormSpec, Projections};

/// `falcon`, `RefinedWeb`, `RefinedWebModel`
pub(super) fn falcon(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let grouped = fields.flag("new_decoder_architecture")?.unwrap_or(false);
    let config = config(&fields, grouped)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let bias = fields.flag("bias")?.unwrap_or(false);
    let alibi = fields.flag("alibi")?.unwrap_or(false);
    spec.body = &["transformer"];
    spec.embedding.name = "word_embeddings";
    spec.layers_name = "h";
    spec.last_norm = Some("ln_f");
    spec.norm = NormSpec::layer(config.norm_eps);
    for attention in spec.attentions() {
        attention.projections = Projections::Grouped("query_key_value");
        (attention.output, attention.qkv_bias, attention.output_bias) = ("dense", bias, bias);
        if alibi {
            attention.rope = None;
            // Scores are scaled after the biases are added.
            attention.alibi = Some(Alibi { exponent_max: 8.0, factor: attention.scale });
        }
    }
    for mlp in spec.mlps() {
        (mlp.form, mlp.down) = (MlpForm::Plain("dense_h_to_4h", config.activation), "dense_4h_to_h");
        mlp.bias = bias;
    }
    let block = block(&fields, grouped)?;
    for layer in &mut spec.layers {
        (layer.attention_name, layer.block) = ("self_attention", block);
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}

/// Names changed with the architecture's.
fn config(fields: &Fields<'_>, grouped: bool) -> Result<ModelConfig, ConfigError> {
    let either = |newer: &'static str, older| if fields.has(newer) { newer } else { older };
    let names = Names {
        layers: either("num_hidden_layers", "n_layer"),
        heads: either("num_attention_heads", "n_head"),
        kv_heads: if grouped { either("num_kv_heads", "n_head_kv") } else { "" },
        intermediate: "ffn_hidden_size",
        widening: Some(4),
        norm_eps: "layer_norm_epsilon",
        norm_eps_default: 1e-5,
        activation: "activation",
        activation_default: Activation::Gelu,
        ..Names::LLAMA
    };
    let mut config = ModelConfig::parse(fields, &names)?;
    if !grouped && fields.flag("multi_query")?.unwrap_or(true) {
        config.heads.kv_heads = 1;
    }
    Ok(config)
}

fn block(fields: &Fields<'_>, grouped: bool) -> Result<Block, ConfigError> {
    let parallel = grouped || fields.flag("parallel_attn")?.unwrap_or(true);
    let norms = fields.size("num_ln_in_parallel_attn")?.unwrap_or(if grouped { 2 } else { 1 });
    Ok(match (parallel, grouped && norms == 2) {
        (true, true) => Block::Parallel { attention: "ln_attn", mlp: Some("ln_mlp") },
        (true, false) => Block::Parallel { attention: "input_layernorm", mlp: None },
        (false, _) => Block::sequential("input_layernorm", "post_attention_layernorm"),
    })
}
