//! BLOOM: linear biases instead of positions, a norm of the embeddings, LayerNorms. Source: Le Scao et al. 2022.

use kernels::Activation;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{Alibi, MlpForm, NormSpec, Projections};

/// `bloom`
pub(super) fn bloom(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let either = |newer: &'static str, older| if fields.has(newer) { newer } else { older };
    let names = Names {
        hidden: either("hidden_size", "n_embed"),
        layers: either("num_hidden_layers", "n_layer"),
        heads: either("num_attention_heads", "n_head"),
        widening: Some(4),
        positions_max: "seq_length",
        norm_eps: "layer_norm_epsilon",
        norm_eps_default: 1e-5,
        activation_default: Activation::GeluTanh,
        ..Names::LLAMA
    };
    let config = ModelConfig::parse(&fields, &names)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    spec.body = &["transformer", ""];
    spec.norm = NormSpec::layer(config.norm_eps);
    spec.embedding.name = "word_embeddings";
    spec.embedding.norm = Some(("word_embeddings_layernorm", spec.norm));
    spec.layers_name = "h";
    spec.last_norm = Some("ln_f");
    spec.ropes.clear();
    for attention in spec.attentions() {
        attention.projections = Projections::Grouped("query_key_value");
        (attention.output, attention.qkv_bias, attention.output_bias) = ("dense", true, true);
        (attention.rope, attention.alibi) = (None, Some(Alibi { exponent_max: 8.0, factor: 1.0 }));
    }
    for mlp in spec.mlps() {
        (mlp.form, mlp.down) = (MlpForm::Plain("dense_h_to_4h", config.activation), "dense_4h_to_h");
        mlp.bias = true;
    }
    let (attention, mlp) = ("input_layernorm", "post_attention_layernorm");
    let normed = fields.flag("apply_residual_connection_post_layernorm")?.unwrap_or(false);
    for layer in &mut spec.layers {
        layer.attention_name = "self_attention";
        layer.block =
            if normed { Block::Normed { attention, mlp } } else { Block::sequential(attention, mlp) };
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}
