//! StarCoder 2: biases everywhere, LayerNorms, a plain MLP, a sliding window. Source: Lozhkov et al. 2024.

use kernels::Activation;

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile};
use super::spec::{DecoderSpec, HeadWeight};
use crate::layers::{MlpForm, NormSpec};

/// `starcoder2`
pub(super) fn starcoder2(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let fields = file.fields();
    let names = Names {
        norm_eps: "norm_epsilon",
        norm_eps_default: 1e-5,
        activation_default: Activation::GeluTanh,
        ..Names::LLAMA
    };
    let config = ModelConfig::parse(&fields, &names)?;
    let mut spec = DecoderSpec::llama(&fields, &config)?;
    let bias = fields.flag("use_bias")?.unwrap_or(true);
    spec.norm = match fields.text("norm_type")? {
        None | Some("layer_norm") => NormSpec::layer(config.norm_eps),
        Some("rms_norm") => NormSpec::rms(config.norm_eps),
        Some(other) => return Err(fields.unserved("norm_type", other, &["layer_norm", "rms_norm"])),
    };
    let plain = match fields.text("mlp_type")? {
        None | Some("default") => true,
        Some("gated") => false,
        Some(other) => return Err(fields.unserved("mlp_type", other, &["default", "gated"])),
    };
    spec.set_windows(&config.windows(|_| true));
    spec.attentions().for_each(|attention| (attention.qkv_bias, attention.output_bias) = (bias, bias));
    for mlp in spec.mlps() {
        mlp.bias = bias;
        if plain {
            (mlp.form, mlp.down) = (MlpForm::Plain("c_fc", config.activation), "c_proj");
        }
    }
    if config.tie_word_embeddings.unwrap_or(true) {
        spec.head.weight = HeadWeight::Tied;
    }
    Ok(spec)
}
