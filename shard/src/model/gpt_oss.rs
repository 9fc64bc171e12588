//! gpt-oss: attention sinks, layers that slide in turn, a mixture of clamped experts with biases. Source: OpenAI 2025 (model
//! card).

use kernels::{Gating, Score};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{DecoderSpec, MlpKind};
use crate::layers::{ExpertNames, MoeSpec, RoutingSpec};

/// `gpt_oss`
pub(super) fn gpt_oss(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([
        ("attention_bias", json!(true)),
        ("head_dim", json!(64)),
        ("sliding_window", json!(128)),
        ("rms_norm_eps", json!(1e-5)),
    ]);
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::LLAMA)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    spec.set_windows(&config.windows(|layer| layer.is_multiple_of(2)));
    spec.attentions().for_each(|attention| attention.sinks = Some("sinks"));
    let chosen = fields.size("num_experts_per_tok")?.or(fields.size("experts_per_token")?).unwrap_or(4);
    let limit = fields.number_from("swiglu_limit", f64::MIN_POSITIVE)?.unwrap_or(7.0) as f32;
    let moe = MoeSpec {
        hidden: config.hidden,
        intermediate: config.intermediate,
        experts: fields.required("num_local_experts", Fields::size)?,
        router: "router",
        router_bias: true,
        routing: RoutingSpec::best(chosen, Score::SoftmaxOfChosen),
        names: ExpertNames::Fused {
            gate_up: "experts.gate_up_proj",
            down: "experts.down_proj",
            transposed: true,
            interleaved: true,
        },
        bias: true,
        gating: Gating::ClampedSwiglu { limit, alpha: 1.702 },
        shared: None,
    };
    for layer in &mut spec.layers {
        layer.mlp = MlpKind::Experts(Box::new(moe.clone()));
    }
    Ok(spec)
}
