//! Qwen 2 and 3: Llama with biases on queries, keys and values, or with norms of queries and keys; either with mixtures of
//! experts. Sources: Yang et al. 2024 and 2025 (technical reports).

use kernels::{Gating, Normalize, Score};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{DecoderSpec, MlpKind};
use crate::layers::{
    ExpertNames, MlpSpec, MoeSpec, NormSpec, QkNorm, QkNormScope, RoutingSpec, SharedExpert,
};

/// `qwen2`
pub(super) fn qwen2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    windowed(file, |layer, first| layer >= first).map(|(spec, _)| biased(spec, true))
}

/// `qwen3`
pub(super) fn qwen3(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    normed(file, |layer, first| layer >= first)
}

/// `qwen2_moe`, also of Qwen 1.5
pub(super) fn qwen2_moe(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let bias = fields.flag("qkv_bias")?.unwrap_or(true);
    // Unlike in the other models, it is every second of the first layers.
    let (spec, _) = windowed(file, |layer, first| layer < first && layer.is_multiple_of(2))?;
    let mut spec = biased(spec, bias);
    let intermediate = fields.required("shared_expert_intermediate_size", Fields::size)?;
    set_experts(&fields, &mut spec, |mlp| {
        let mlp = MlpSpec { intermediate, ..mlp.clone() };
        Some(SharedExpert { name: "shared_expert", mlp, gate: Some("shared_expert_gate") })
    })?;
    Ok(spec)
}

/// `qwen3_moe`
pub(super) fn qwen3_moe(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let mut spec = normed(file, |_, _| true)?;
    set_experts(&file.fields(), &mut spec, |_| None)?;
    Ok(spec)
}

/// Llama with biases on queries, keys and values.
fn biased(mut spec: DecoderSpec, bias: bool) -> DecoderSpec {
    spec.attentions().for_each(|attention| (attention.qkv_bias, attention.output_bias) = (bias, false));
    spec
}

/// Llama with norms of queries and keys.
fn normed(file: &ConfigFile, slides: impl Fn(usize, usize) -> bool) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("head_dim", json!(128))]);
    let (mut spec, config) = windowed(&file, slides)?;
    spec.attentions().for_each(|attention| attention.qk_norm = Some(QkNorm::per_head(config.norm_eps)));
    Ok(spec)
}

/// Only with `use_sliding_window` do layers slide; which ones depends on the layer and on `max_window_layers`.
fn windowed(
    file: &ConfigFile,
    slides: impl Fn(usize, usize) -> bool,
) -> Result<(DecoderSpec, ModelConfig), ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::LLAMA)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    if fields.flag("use_sliding_window")?.unwrap_or(false) {
        let first = fields.index("max_window_layers")?.unwrap_or(28);
        spec.set_windows(&config.windows(|layer| slides(layer, first)));
    }
    Ok((spec, config))
}

/// Experts in every layer, or in every so many, but for those that are listed as having none.
fn set_experts(
    fields: &Fields<'_>,
    spec: &mut DecoderSpec,
    shared: impl Fn(&MlpSpec) -> Option<SharedExpert>,
) -> Result<(), ConfigError> {
    let step = fields.index("decoder_sparse_step")?.unwrap_or(1);
    let dense = fields.indices("mlp_only_layers")?.unwrap_or_default();
    let normalize = match fields.flag("norm_topk_prob")?.unwrap_or(false) {
        true => Normalize::Sum { eps: 0.0 },
        false => Normalize::No,
    };
    let chosen = fields.required("num_experts_per_tok", Fields::size)?;
    // Newer files have Mixtral's name.
    let experts = if fields.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let config = ModelConfig::parse(fields, &Names::LLAMA)?;
    let moe = MoeSpec {
        hidden: spec.hidden,
        intermediate: fields.required("moe_intermediate_size", Fields::size)?,
        experts: fields.required(experts, Fields::size)?,
        router: "gate",
        router_bias: false,
        routing: RoutingSpec { normalize, ..RoutingSpec::best(chosen, Score::Softmax) },
        names: ExpertNames::LLAMA,
        bias: false,
        gating: Gating::Activation(config.activation),
        shared: None,
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let sparse = step > 0 && (index + 1).is_multiple_of(step) && !dense.contains(&index);
        if let (true, MlpKind::Dense(mlp)) = (sparse, &layer.mlp) {
            layer.mlp = MlpKind::Experts(Box::new(MoeSpec { shared: shared(mlp), ..moe.clone() }));
        }
    }
    Ok(())
}

impl QkNorm {
    /// RMS norms of each head, with the same weights for all heads.
    pub(super) fn per_head(eps: f32) -> Self {
        Self { norm: NormSpec::rms(eps), scope: QkNormScope::Head, query: "q_norm", key: "k_norm" }
    }
}
