//! DeepSeek V2 and V3: latent attention, and many small experts of which some groups are looked into, beside shared ones.
//! Sources: DeepSeek-AI 2024, DeepSeek-V2 and DeepSeek-V3 (technical reports).

use kernels::{Gating, GroupScore, Groups, HeadShape, Normalize, RopeLayout, Score};

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{AttentionKind, DecoderSpec, MlpKind};
use crate::layers::{
    ExpertNames, LatentSpec, MlpSpec, MoeSpec, NormSpec, Queries, RopeSpec, RoutingSpec, SharedExpert,
};

/// `deepseek_v2`
pub(super) fn deepseek_v2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let limited = match fields.text("topk_method")? {
        None | Some("greedy") => false,
        Some("group_limited_greedy") => true,
        Some(other) => {
            return Err(fields.unserved("topk_method", other, &["greedy", "group_limited_greedy"]));
        }
    };
    let normalize = match fields.flag("norm_topk_prob")?.unwrap_or(false) {
        true => Normalize::Sum { eps: 1e-20 },
        false => Normalize::No,
    };
    let routing = RoutingSpec {
        groups: if limited { groups(&fields, GroupScore::Best)? } else { None },
        normalize,
        ..routing(&fields, Score::Softmax)?
    };
    deepseek(&fields, routing)
}

/// `deepseek_v3`, also R1
pub(super) fn deepseek_v3(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let normalize = match fields.flag("norm_topk_prob")?.unwrap_or(true) {
        true => Normalize::Sum { eps: 1e-20 },
        false => Normalize::No,
    };
    let routing = RoutingSpec {
        groups: groups(&fields, GroupScore::TwoBest)?,
        correction: Some("gate.e_score_correction_bias"),
        normalize,
        ..routing(&fields, Score::Sigmoid)?
    };
    deepseek(&fields, routing)
}

fn routing(fields: &Fields<'_>, score: Score) -> Result<RoutingSpec, ConfigError> {
    let chosen = fields.required("num_experts_per_tok", Fields::size)?;
    let scale = fields.number_from("routed_scaling_factor", 0.0)?.unwrap_or(1.0) as f32;
    Ok(RoutingSpec { scale, ..RoutingSpec::best(chosen, score) })
}

fn groups(fields: &Fields<'_>, score: GroupScore) -> Result<Option<Groups>, ConfigError> {
    let count = fields.size("n_group")?;
    let chosen = fields.size("topk_group")?;
    Ok(count.zip(chosen).map(|(count, chosen)| Groups { count, chosen, score }))
}

fn deepseek(fields: &Fields<'_>, routing: RoutingSpec) -> Result<DecoderSpec, ConfigError> {
    let plain_dim = fields.required("qk_nope_head_dim", Fields::size)?;
    let rotary_dim = fields.required("qk_rope_head_dim", Fields::size)?;
    let heads = fields.required("num_attention_heads", Fields::size)?;
    let mut config = ModelConfig::parse(fields, &Names::LLAMA)?;
    let mut spec = DecoderSpec::llama(fields, &config)?;
    let latent = LatentSpec {
        hidden: config.hidden,
        heads,
        plain_dim,
        rotary_dim,
        value_dim: fields.required("v_head_dim", Fields::size)?,
        latent_dim: fields.required("kv_lora_rank", Fields::size)?,
        queries: fields.size("q_lora_rank")?.map_or(Queries::Direct, Queries::LowRank),
        bias: config.attention_bias,
        norm: NormSpec::rms(LATENT_NORM_EPS),
        rope: 0,
        scale: scale(fields, plain_dim + rotary_dim)?,
    };
    // Only the rotary part of a head is rotated; in the cache it lies behind the latent.
    config.heads = HeadShape { heads, kv_heads: heads, head_dim: rotary_dim };
    let layout = match fields.flag("rope_interleave")?.unwrap_or(true) {
        true => RopeLayout::Interleaved,
        false => RopeLayout::HalfSplit,
    };
    spec.ropes =
        vec![RopeSpec { start: latent.latent_dim, ..RopeSpec::new(fields, &config, rotary_dim, layout)? }];
    for layer in &mut spec.layers {
        layer.attention = AttentionKind::Latent(latent.clone());
    }
    set_experts(fields, &mut spec, &config, routing)?;
    Ok(spec)
}

/// Of the norms inside of the attention, whatever the other norms have. Source: transformers, `DeepseekV3RMSNorm`.
const LATENT_NORM_EPS: f32 = 1e-6;

/// YaRN's temperature is applied to the scores, by the square of what would multiply cosines and sines.
fn scale(fields: &Fields<'_>, head_dim: usize) -> Result<f32, ConfigError> {
    let plain = (head_dim as f64).sqrt().recip();
    let newer = fields.object("rope_parameters")?;
    let scaling = if newer.is_some() { newer } else { fields.object("rope_scaling")? };
    let Some(scaling) = scaling else { return Ok(plain as f32) };
    let factor = scaling.number_from("factor", 1.0)?.unwrap_or(1.0);
    let mscale = scaling.number_from("mscale_all_dim", 0.0)?.unwrap_or(0.0);
    let stretch = 0.1 * mscale * factor.ln() + 1.0;
    Ok((plain * stretch * stretch) as f32)
}

/// Experts in all layers but the first few, or in every so many.
fn set_experts(
    fields: &Fields<'_>,
    spec: &mut DecoderSpec,
    config: &ModelConfig,
    routing: RoutingSpec,
) -> Result<(), ConfigError> {
    let first = fields.index("first_k_dense_replace")?.unwrap_or(0);
    let step = fields.size("moe_layer_freq")?.unwrap_or(1);
    let intermediate = fields.required("moe_intermediate_size", Fields::size)?;
    let shared = fields.index("n_shared_experts")?.unwrap_or(0);
    let moe = MoeSpec {
        hidden: spec.hidden,
        intermediate,
        experts: fields.required("n_routed_experts", Fields::size)?,
        router: "gate",
        router_bias: false,
        routing,
        names: ExpertNames::LLAMA,
        bias: false,
        gating: Gating::Activation(config.activation),
        shared: None,
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let MlpKind::Dense(mlp) = &layer.mlp else { continue };
        if index < first || !index.is_multiple_of(step) {
            continue;
        }
        let mlp = MlpSpec { intermediate: shared * intermediate, ..mlp.clone() };
        let shared = (shared > 0).then_some(SharedExpert { name: "shared_experts", mlp, gate: None });
        layer.mlp = MlpKind::Experts(Box::new(MoeSpec { shared, ..moe.clone() }));
    }
    Ok(())
}
