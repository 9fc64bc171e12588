//! IBM's Granite 3: Llama with four multipliers, and with mixtures of experts, perhaps beside a shared MLP.

use kernels::{Gating, Score};

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{DecoderSpec, HeadWeight, MlpKind};
use crate::layers::{ExpertNames, GatedNames, MlpForm, MlpSpec, MoeSpec, RoutingSpec, SharedExpert};

/// `granite`
pub(super) fn granite(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    base(&fields, &ModelConfig::parse(&fields, &Names::LLAMA)?)
}

/// `granitemoe`
pub(super) fn granitemoe(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::LLAMA)?;
    let mut spec = base(&fields, &config)?;
    set_experts(&fields, &mut spec, &config, None)?;
    Ok(spec)
}

/// `granitemoeshared`
pub(super) fn granitemoeshared(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::LLAMA)?;
    let mut spec = base(&fields, &config)?;
    let gating = Gating::Activation(config.activation);
    let intermediate = fields.index("shared_intermediate_size")?.unwrap_or(0);
    let mlp = MlpSpec {
        hidden: config.hidden,
        intermediate,
        form: MlpForm::Gated(GatedNames::Stacked("input_linear"), gating),
        down: "output_linear",
        bias: false,
        transposed: false,
    };
    let shared = SharedExpert { name: "shared_mlp", mlp, gate: None };
    set_experts(&fields, &mut spec, &config, (intermediate > 0).then_some(shared))?;
    Ok(spec)
}

fn base(fields: &Fields<'_>, config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    let multiplier = |name| Ok(fields.number_from(name, 0.0)?.map(|factor| factor as f32));
    let mut spec = DecoderSpec::llama(fields, config)?;
    spec.embedding.scale = multiplier("embedding_multiplier")?;
    spec.residual_scale = multiplier("residual_multiplier")?;
    if let Some(scaling) = fields.number_from("logits_scaling", f64::MIN_POSITIVE)? {
        spec.head.scale = Some(scaling.recip() as f32);
    }
    // Without one, scores are not scaled at all.
    let scale = multiplier("attention_multiplier")?.unwrap_or(1.0);
    spec.attentions().for_each(|attention| attention.scale = scale);
    Ok(spec)
}

/// The list of experts and the shared MLP lie side by side in a layer.
fn set_experts(
    fields: &Fields<'_>,
    spec: &mut DecoderSpec,
    config: &ModelConfig,
    shared: Option<SharedExpert>,
) -> Result<(), ConfigError> {
    let chosen = fields.required("num_experts_per_tok", Fields::size)?;
    let moe = MoeSpec {
        hidden: config.hidden,
        intermediate: config.intermediate,
        experts: fields.required("num_local_experts", Fields::size)?,
        router: "block_sparse_moe.router.layer",
        router_bias: false,
        routing: RoutingSpec::best(chosen, Score::SoftmaxOfChosen),
        names: ExpertNames::Fused {
            gate_up: "block_sparse_moe.input_linear.weight",
            down: "block_sparse_moe.output_linear.weight",
            transposed: false,
            interleaved: false,
        },
        bias: false,
        gating: Gating::Activation(config.activation),
        shared,
    };
    for layer in &mut spec.layers {
        layer.mlp_name = "";
        layer.mlp = MlpKind::Experts(Box::new(moe.clone()));
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(())
}
