//! Baichuan 1 and 2: Llama with fused projections; the larger ones with linear biases instead of rotations, the second
//! generation with an output head of unit rows. Source: Yang et al. 2023, "Baichuan 2".

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{DecoderSpec, HeadWeight};
use crate::layers::{Alibi, Projections};

/// Vocabulary of the second generation; nothing else in its configuration tells it from the first.
const VOCABULARY_OF_2: usize = 125_696;

/// `baichuan`
pub(super) fn baichuan(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    // The larger models say how many tokens they take under another name, since they have no positions.
    let alibi = !fields.has("max_position_embeddings");
    let positions_max = if alibi { "model_max_length" } else { Names::LLAMA.positions_max };
    let config = ModelConfig::parse(&fields, &Names { positions_max, ..Names::LLAMA })?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    for attention in spec.attentions() {
        attention.projections = Projections::Stacked("W_pack");
        if alibi {
            (attention.rope, attention.alibi) = (None, Some(Alibi { exponent_max: 8.0, factor: 1.0 }));
        }
    }
    if config.vocabulary == VOCABULARY_OF_2 {
        spec.head.weight = HeadWeight::Own { names: &["lm_head"], bias: false, normalized: true };
    }
    Ok(spec)
}
