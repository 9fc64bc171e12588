//! Gemma 1, 2 and 3 (text). Embeddings are scaled, norms multiply by one plus their weight, the MLP's gate is a tanh
//! approximation of GELU; later ones have norms behind each part, soft caps, and layers that slide. Sources: Gemma Team
//! 2024 and 2025 (technical reports).

use kernels::{Activation, RopeLayout};
use serde_json::json;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::rope_config::RopeConfig;
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{NormSpec, NormWeight, QkNorm, RopeSpec};

/// `gemma`
pub(super) fn gemma(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("head_dim", json!(256))]);
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { activation: "hidden_activation", ..NAMES })?;
    base(&fields, &config)
}

/// `gemma2`
pub(super) fn gemma2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or([("head_dim", json!(256)), ("sliding_window", json!(4096))]);
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { activation: "hidden_activation", ..NAMES })?;
    let mut spec = sandwiched(&fields, &config)?;
    spec.set_windows(&config.windows(|layer| layer.is_multiple_of(2)));
    Ok(spec)
}

/// `gemma3_text`
pub(super) fn gemma3_text(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let file = file.clone().or(GEMMA3_DEFAULTS.map(|(name, value)| (name, json!(value))));
    let file =
        file.or([("rope_theta", json!(1e6)), ("rms_norm_eps", json!(1e-6)), ("sliding_window", json!(4096))]);
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { activation: "hidden_activation", ..NAMES })?;
    let mut spec = sandwiched(&fields, &config)?;
    let pattern =
        fields.size("sliding_window_pattern")?.or(fields.size("_sliding_window_pattern")?).unwrap_or(6);
    let windows = config.windows(|layer| !(layer + 1).is_multiple_of(pattern));
    spec.set_windows(&windows);
    spec.ropes.push(RopeSpec::of_heads(&fields, &sliding_rope(&fields, &config)?, RopeLayout::HalfSplit)?);
    let norm = QkNorm { norm: norm(&config), ..QkNorm::per_head(config.norm_eps) };
    for attention in spec.attentions() {
        attention.qk_norm = Some(norm);
        attention.rope = Some(usize::from(attention.window.is_some()));
    }
    Ok(spec)
}

/// `gemma3`: the text model of one that also sees.
pub(super) fn gemma3(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let mut spec = gemma3_text(&file.inside("text_config")?)?;
    spec.body = &["language_model.model", "model.language_model", "model"];
    Ok(spec)
}

/// What published files leave out. Source: transformers, `Gemma3TextConfig`.
const GEMMA3_DEFAULTS: [(&str, usize); 8] = [
    ("vocab_size", 262_208),
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 26),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("head_dim", 256),
    ("max_position_embeddings", 131_072),
];

/// The gate is the tanh approximation, even where `hidden_act` says `gelu`.
const NAMES: Names = Names { activation_default: Activation::GeluTanh, ..Names::LLAMA };

fn norm(config: &ModelConfig) -> NormSpec {
    NormSpec { weight: NormWeight::OnePlus, ..NormSpec::rms(config.norm_eps) }
}

fn base(fields: &Fields<'_>, config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    let mut spec = DecoderSpec::llama(fields, config)?;
    spec.embedding.scale = Some((config.hidden as f32).sqrt());
    spec.norm = norm(config);
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}

/// Norms before and behind each part, and soft caps where the file has them.
fn sandwiched(fields: &Fields<'_>, config: &ModelConfig) -> Result<DecoderSpec, ConfigError> {
    let cap = |name| Ok(fields.number_from(name, f64::MIN_POSITIVE)?.map(|cap| cap as f32));
    let scalar = fields.number_from("query_pre_attn_scalar", f64::MIN_POSITIVE)?.unwrap_or(256.0);
    let mut spec = base(fields, config)?;
    spec.head.soft_cap = cap("final_logit_softcapping")?;
    let soft_cap = cap("attn_logit_softcapping")?;
    for attention in spec.attentions() {
        attention.scale = scalar.sqrt().recip() as f32;
        attention.soft_cap = soft_cap;
    }
    for layer in &mut spec.layers {
        layer.block = Block::Sequential {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_attention_layernorm"),
            before_mlp: Some("pre_feedforward_layernorm"),
            after_mlp: Some("post_feedforward_layernorm"),
        };
    }
    Ok(spec)
}

/// Layers that slide have a smaller base, and are not stretched.
fn sliding_rope(fields: &Fields<'_>, config: &ModelConfig) -> Result<ModelConfig, ConfigError> {
    const KIND: &str = "sliding_attention";
    let rope = match fields.object("rope_parameters")? {
        Some(parameters) if parameters.has(KIND) => {
            RopeConfig::parse(fields, config.positions_max, Some(KIND))?
        }
        _ => RopeConfig {
            theta: fields.number_from("rope_local_base_freq", 1.0)?.unwrap_or(10_000.0),
            scaling: crate::layers::RopeScaling::None,
            partial: None,
        },
    };
    Ok(ModelConfig { rope, ..config.clone() })
}
