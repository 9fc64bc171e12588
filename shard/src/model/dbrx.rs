//! DBRX: a mixture of experts, clipped projections, LayerNorms without biases. Source: Databricks 2024.

use kernels::{Gating, Normalize, Score};

use super::config::{ModelConfig, Names, activation};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{Block, DecoderSpec, HeadWeight, MlpKind};
use crate::layers::{ExpertNames, MoeSpec, NormSpec, Projections, RoutingSpec};

/// `dbrx`
pub(super) fn dbrx(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let attention = file.inside("attn_config")?;
    let experts = file.inside("ffn_config")?;
    let names = Names {
        hidden: "d_model",
        layers: "n_layers",
        heads: "n_heads",
        positions_max: "max_seq_len",
        intermediate: "",
        widening: Some(1),
        norm_eps: "",
        norm_eps_default: 1e-5,
        activation: "",
        ..Names::LLAMA
    };
    let mut config = ModelConfig::parse(&fields, &names)?;
    let attention = attention.fields();
    config.heads.kv_heads = attention.size("kv_n_heads")?.unwrap_or(1);
    if let Some(theta) = attention.number_from("rope_theta", 1.0)? {
        config.rope.theta = theta;
    }
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let clip = attention.number_from("clip_qkv", f64::MIN_POSITIVE)?.map(|limit| limit as f32);
    spec.body = &["transformer"];
    spec.embedding.name = "wte";
    spec.layers_name = "blocks";
    spec.last_norm = Some("norm_f");
    spec.norm = NormSpec { bias: false, ..NormSpec::layer(config.norm_eps) };
    for attention in spec.attentions() {
        attention.projections = Projections::Stacked("Wqkv");
        (attention.output, attention.clip) = ("out_proj", clip);
    }
    let moe = moe(&experts.fields(), &config)?;
    for layer in &mut spec.layers {
        layer.attention_name = "norm_attn_norm.attn";
        layer.block = Block::sequential("norm_attn_norm.norm_1", "norm_attn_norm.norm_2");
        (layer.mlp_name, layer.mlp) = ("ffn", MlpKind::Experts(Box::new(moe.clone())));
    }
    if spec.head.weight != HeadWeight::Tied {
        spec.head.weight = HeadWeight::LM_HEAD;
    }
    Ok(spec)
}

fn moe(fields: &Fields<'_>, config: &ModelConfig) -> Result<MoeSpec, ConfigError> {
    let normalize = match fields.number_from("moe_normalize_expert_weights", f64::MIN_POSITIVE)? {
        Some(p) => Normalize::Norm { p: p as f32 },
        None => Normalize::No,
    };
    let chosen = fields.size("moe_top_k")?.unwrap_or(1);
    let gating = match fields.object("ffn_act_fn")? {
        Some(function) => activation(&function, "name")?,
        None => None,
    };
    Ok(MoeSpec {
        hidden: config.hidden,
        intermediate: fields.required("ffn_hidden_size", Fields::size)?,
        experts: fields.size("moe_num_experts")?.unwrap_or(4),
        router: "router.layer",
        router_bias: false,
        routing: RoutingSpec { normalize, ..RoutingSpec::best(chosen, Score::Softmax) },
        names: ExpertNames::Flat { gate: "experts.mlp.w1", up: "experts.mlp.v1", down: "experts.mlp.w2" },
        bias: false,
        gating: Gating::Activation(gating.unwrap_or(config.activation)),
        shared: None,
    })
}
