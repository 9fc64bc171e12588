//! GPT-J: parallel blocks with one norm, interleaved rotary pairs. Source: Wang and Komatsuzaki 2021.

use kernels::RopeLayout;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{Block, DecoderSpec, HeadWeight};
use crate::layers::{MlpForm, NormSpec, RopeSpec};

/// `gptj`
pub(super) fn gptj(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let config = ModelConfig::parse(&fields, &Names::GPT2)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let rotary_dim = fields.size("rotary_dim")?.unwrap_or(config.heads.head_dim);
    spec.body = &["transformer"];
    spec.embedding.name = "wte";
    spec.layers_name = "h";
    spec.last_norm = Some("ln_f");
    spec.norm = NormSpec::layer(config.norm_eps);
    spec.ropes = vec![RopeSpec::new(&fields, &config, rotary_dim, RopeLayout::Interleaved)?];
    spec.attentions().for_each(|attention| attention.output = "out_proj");
    for mlp in spec.mlps() {
        (mlp.form, mlp.down, mlp.bias) = (MlpForm::Plain("fc_in", config.activation), "fc_out", true);
    }
    for layer in &mut spec.layers {
        layer.attention_name = "attn";
        layer.block = Block::Parallel { attention: "ln_1", mlp: None };
    }
    if spec.head.weight != HeadWeight::Tied {
        spec.head.weight = HeadWeight::Own { names: &["lm_head"], bias: true, normalized: false };
    }
    Ok(spec)
}
