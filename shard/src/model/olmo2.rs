//! OLMo 2: Llama with norms behind its parts instead of before, and norms over all queries and all keys. Source: OLMo Team 2024,
//! "2 OLMo 2 Furious".

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec};
use crate::layers::{QkNorm, QkNormScope};

/// `olmo2`
pub(super) fn olmo2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names { norm_eps_default: 1e-5, ..Names::LLAMA })?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let qk_norm = QkNorm { scope: QkNormScope::Width, ..QkNorm::per_head(config.norm_eps) };
    spec.attentions().for_each(|attention| attention.qk_norm = Some(qk_norm));
    for layer in &mut spec.layers {
        layer.block = Block::Sequential {
            before_attention: None,
            after_attention: Some("post_attention_layernorm"),
            before_mlp: None,
            after_mlp: Some("post_feedforward_layernorm"),
        };
    }
    Ok(spec)
}
