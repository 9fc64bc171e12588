//! SmolLM 3: Llama in which every fourth layer has no positions. Source: Yang et al. 2025, "Rope to Nope and Back Again".

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{DecoderSpec, HeadWeight};

/// `smollm3`
pub(super) fn smollm3(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::LLAMA)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let interval = fields.size("no_rope_layer_interval")?.unwrap_or(4);
    let has_rope = match fields.indices("no_rope_layers")? {
        Some(layers) if layers.len() >= config.layers => layers.iter().map(|&has| has != 0).collect(),
        Some(_) => {
            let expected = format!("one entry for each of {} layers", config.layers);
            return Err(fields.wrong("no_rope_layers", expected));
        }
        None => (0..config.layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect::<Vec<_>>(),
    };
    for (attention, has_rope) in spec.attentions().zip(has_rope) {
        attention.rope = has_rope.then_some(0);
    }
    if fields.flag("use_sliding_window")?.unwrap_or(false) {
        spec.set_windows(&config.windows(|_| true));
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}
