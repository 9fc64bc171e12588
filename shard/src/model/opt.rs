//! OPT and Galactica: learned positions, plain MLPs; the smallest but one has its norms behind the parts, and an embedding
//! narrower than its hidden states. Source: Zhang et al. 2022.

use kernels::Activation;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{LearnedPositions, MlpForm, NormSpec, NormWeight};

/// The table of positions begins with rows for padding.
const POSITIONS_OFFSET: usize = 2;

/// `opt`
pub(super) fn opt(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let names = Names {
        intermediate: "ffn_dim",
        activation: "activation_function",
        activation_default: Activation::Relu,
        norm_eps: "layer_norm_eps",
        norm_eps_default: 1e-5,
        ..Names::LLAMA
    };
    let config = ModelConfig::parse(&fields, &names)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let flag = |name| Ok::<bool, ConfigError>(fields.flag(name)?.unwrap_or(true));
    let (bias, before) = (flag("enable_bias")?, flag("do_layer_norm_before")?);
    spec.body = &["model.decoder", "decoder"];
    spec.embedding.positions = Some(LearnedPositions {
        name: "embed_positions",
        offset: POSITIONS_OFFSET,
        count: config.positions_max,
    });
    set_embedding_width(&fields, &mut spec)?;
    spec.norm = NormSpec::layer(config.norm_eps);
    if !flag("layer_norm_elementwise_affine")? {
        spec.norm = NormSpec { weight: NormWeight::None, bias: false, ..spec.norm };
    }
    let removed = fields.flag("_remove_final_layer_norm")?.unwrap_or(false);
    spec.last_norm = (before && !removed).then_some("final_layer_norm");
    spec.ropes.clear();
    for attention in spec.attentions() {
        (attention.output, attention.qkv_bias, attention.output_bias) = ("out_proj", bias, bias);
        attention.rope = None;
    }
    for mlp in spec.mlps() {
        (mlp.form, mlp.down, mlp.bias) = (MlpForm::Plain("fc1", config.activation), "fc2", bias);
    }
    let (attention, mlp) = ("self_attn_layer_norm", "final_layer_norm");
    for layer in &mut spec.layers {
        layer.mlp_name = "";
        layer.block =
            if before { Block::sequential(attention, mlp) } else { Block::Behind { attention, mlp } };
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}

fn set_embedding_width(fields: &Fields<'_>, spec: &mut DecoderSpec) -> Result<(), ConfigError> {
    let width = fields.size("word_embed_proj_dim")?.unwrap_or(spec.hidden);
    if width != spec.hidden {
        spec.embedding.width = width;
        spec.embedding.project = Some("project_in");
        spec.head.project = Some("project_out");
    }
    Ok(())
}
