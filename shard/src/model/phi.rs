//! Phi: Phi-2 is a parallel decoder with LayerNorms and a plain MLP; Phi-3 and 4 are Llama with fused projections; PhiMoE has
//! LayerNorms and experts. Sources: Gunasekar et al. 2023; Abdin et al. 2024 (technical reports).

use kernels::{Activation, Gating, Score};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec, HeadWeight, MlpKind};
use crate::layers::{
    ExpertNames, GatedNames, MlpForm, MoeSpec, NormSpec, Projections, QkNorm, QkNormScope, RoutingSpec,
};

/// `phi`: Phi-1, 1.5 and 2
pub(super) fn phi(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("partial_rotary_factor", json!(0.5))]);
    let fields = file.fields();
    let config = ModelConfig::parse(
        &fields,
        &Names {
            widening: Some(4),
            norm_eps: "layer_norm_eps",
            norm_eps_default: 1e-5,
            activation_default: Activation::GeluTanh,
            ..Names::LLAMA
        },
    )?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let norm = NormSpec::layer(config.norm_eps);
    let qk_norm = QkNorm { norm, scope: QkNormScope::Head, query: "q_layernorm", key: "k_layernorm" };
    let has_qk_norm = fields.flag("qk_layernorm")?.unwrap_or(false);
    spec.norm = norm;
    spec.last_norm = Some("final_layernorm");
    for attention in spec.attentions() {
        (attention.qkv_bias, attention.output_bias, attention.output) = (true, true, "dense");
        attention.qk_norm = has_qk_norm.then_some(qk_norm);
    }
    for mlp in spec.mlps() {
        mlp.form = MlpForm::Plain("fc1", config.activation);
        (mlp.down, mlp.bias) = ("fc2", true);
    }
    for layer in &mut spec.layers {
        layer.block = Block::Parallel { attention: "input_layernorm", mlp: None };
    }
    if spec.head.weight != HeadWeight::Tied {
        spec.head.weight = HeadWeight::Own { names: &["lm_head"], bias: true, normalized: false };
    }
    Ok(spec)
}

/// `phi3`: Phi-3, 3.5 and 4
pub(super) fn phi3(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { norm_eps_default: 1e-5, ..Names::LLAMA })?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    spec.set_windows(&config.windows(|_| true));
    spec.attentions().for_each(|attention| attention.projections = Projections::Stacked("qkv_proj"));
    let gating = Gating::Activation(config.activation);
    spec.mlps().for_each(|mlp| mlp.form = MlpForm::Gated(GatedNames::Stacked("gate_up_proj"), gating));
    Ok(spec)
}

/// `phimoe`
pub(super) fn phimoe(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { norm_eps_default: 1e-5, ..Names::LLAMA })?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    spec.set_windows(&config.windows(|_| true));
    spec.norm = NormSpec::layer(config.norm_eps);
    let jitter = fields.number_from("router_jitter_noise", 0.0)?.unwrap_or(0.01) as f32;
    let chosen = fields.size("num_experts_per_tok")?.unwrap_or(2);
    let moe = MoeSpec {
        hidden: config.hidden,
        intermediate: config.intermediate,
        experts: fields.size("num_local_experts")?.unwrap_or(16),
        router: "gate",
        router_bias: false,
        routing: RoutingSpec::best(chosen, Score::SparseMixer { jitter }),
        names: ExpertNames::MIXTRAL,
        bias: false,
        gating: Gating::Activation(config.activation),
        shared: None,
    };
    for layer in &mut spec.layers {
        layer.mlp_name = "block_sparse_moe";
        layer.mlp = MlpKind::Experts(Box::new(moe.clone()));
    }
    if spec.head.weight != HeadWeight::Tied {
        let bias = fields.flag("lm_head_bias")?.unwrap_or(false);
        spec.head.weight = HeadWeight::Own { names: &["lm_head"], bias, normalized: false };
    }
    Ok(spec)
}
