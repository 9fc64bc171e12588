//! Mistral: Llama with a sliding window in its first release. Mixtral: Mistral with a mixture of experts. Sources: Jiang et
//! al. 2023 and 2024.

use kernels::{Gating, Normalize, Score};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{DecoderSpec, MlpKind};
use crate::layers::{ExpertNames, MoeSpec, RoutingSpec};

/// `mistral`
pub(super) fn mistral(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    // Files that do not mention the window are as old as the first release, which has this one.
    let file = file.clone().or([("sliding_window", json!(4096))]);
    windowed(&file.fields(), &ModelConfig::parse(&file.fields(), &Names::LLAMA)?)
}

/// `mixtral`
pub(super) fn mixtral(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::LLAMA)?;
    let mut spec = windowed(&fields, &config)?;
    let moe = MoeSpec {
        hidden: config.hidden,
        intermediate: config.intermediate,
        experts: fields.required("num_local_experts", Fields::size)?,
        router: "gate",
        router_bias: false,
        routing: RoutingSpec {
            normalize: Normalize::Sum { eps: 0.0 },
            ..RoutingSpec::best(fields.required("num_experts_per_tok", Fields::size)?, Score::Softmax)
        },
        names: ExpertNames::MIXTRAL,
        bias: false,
        gating: Gating::Activation(config.activation),
        shared: None,
    };
    for layer in &mut spec.layers {
        layer.mlp_name = "block_sparse_moe";
        layer.mlp = MlpKind::Experts(Box::new(moe.clone()));
    }
    Ok(spec)
}

fn windowed(fields: &Fields<'_>, config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    let mut spec = DecoderSpec::llama(fields, config)?;
    spec.set_windows(&config.windows(|_| true));
    Ok(spec)
}

impl ExpertNames {
    /// As in Mixtral and what followed it.
    pub(super) const MIXTRAL: Self = Self::Separate { experts: "experts", gate: "w1", up: "w3", down: "w2" };
    /// As in Qwen and DeepSeek.
    pub(super) const LLAMA: Self =
        Self::Separate { experts: "experts", gate: "gate_proj", up: "up_proj", down: "down_proj" };
}

impl RoutingSpec {
    /// The best experts by their score, with their score for weight.
    pub(super) fn best(chosen: usize, score: Score) -> Self {
        Self { chosen, score, groups: None, correction: None, normalize: Normalize::No, scale: 1.0 }
    }
}
