//! What `config.json` says about a decoder, checked and with defaults filled in.

use kernels::HeadShape;

use super::config_file::{ConfigError, ConfigFile, Fields};
use crate::layers::RopeScaling;

/// Defaults of the reference library (transformers, `LlamaConfig`) for fields that older checkpoints leave out.
mod default {
    pub(super) const POSITIONS_MAX: usize = 2048;
    pub(super) const NORM_EPS: f64 = 1e-6;
    pub(super) const ROPE_THETA: f64 = 10_000.0;
    pub(super) const ROPE_TYPE: &str = "default";
}

/// A decoder's configuration, as far as families share it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Heads of each attention layer. The key/value heads divide the heads; the head size is even.
    pub heads: HeadShape,
    /// Positions the model was made for.
    pub positions_max: usize,
    /// Added to the mean of squares in norms.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// The function in the MLP.
    pub activation: Activation,
    /// Whether attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether the head is the embedding; `None` where the file leaves it to the family.
    pub tie_word_embeddings: Option<bool>,
    /// Tokens that end a text. Empty when the file names none.
    pub eos_token_ids: Vec<u32>,
}

/// The function of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`, also called swish.
    Silu,
}

impl ModelConfig {
    /// Reads the fields that families share. Errors when one is missing, out of bounds, or contradicts another.
    pub fn parse(file: &ConfigFile) -> Result<Self, ConfigError> {
        let fields = file.fields();
        refuse_quantization(&fields)?;
        let hidden = fields.required("hidden_size", Fields::size)?;
        let (rope_theta, rope_scaling) = rope(&fields)?;
        Ok(Self {
            vocabulary: fields.required("vocab_size", Fields::size)?,
            hidden,
            intermediate: fields.required("intermediate_size", Fields::size)?,
            layers: fields.required("num_hidden_layers", Fields::size)?,
            heads: heads(&fields, hidden)?,
            positions_max: fields.size("max_position_embeddings")?.unwrap_or(default::POSITIONS_MAX),
            norm_eps: fields.number_from("rms_norm_eps", 0.0)?.unwrap_or(default::NORM_EPS) as f32,
            rope_theta,
            rope_scaling,
            activation: activation(&fields)?,
            attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
        })
    }
}

/// Quantized tensors have other names and types; say why rather than that some tensor is missing.
fn refuse_quantization(fields: &Fields<'_>) -> Result<(), ConfigError> {
    match fields.object("quantization_config")? {
        None => Ok(()),
        Some(quantization) => {
            let method = quantization.text("quant_method")?.unwrap_or("unnamed");
            Err(fields.unserved("quantization_config", method, &["unquantized weights"]))
        }
    }
}

fn heads(fields: &Fields<'_>, hidden: usize) -> Result<HeadShape, ConfigError> {
    let heads = fields.required("num_attention_heads", Fields::size)?;
    let kv_heads = fields.size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of `num_attention_heads`, which is {heads}");
        return Err(fields.wrong("num_key_value_heads", expected));
    }
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("a multiple of `num_attention_heads`, which is {heads}, or a `head_dim`");
            return Err(fields.wrong("hidden_size", expected));
        }
    };
    if !head_dim.is_multiple_of(2) {
        let expected = format!("an even head size for the rotary embedding, not {head_dim}");
        return Err(fields.wrong("head_dim", expected));
    }
    Ok(HeadShape { heads, kv_heads, head_dim })
}

fn activation(fields: &Fields<'_>) -> Result<Activation, ConfigError> {
    match fields.text("hidden_act")? {
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => Err(fields.unserved("hidden_act", other, &["silu"])),
    }
}

/// Base and scaling. Newer files hold both in `rope_parameters`; older ones have `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields<'_>) -> Result<(f64, RopeScaling), ConfigError> {
    let outer_theta = fields.number_from("rope_theta", 1.0)?;
    let newer = fields.object("rope_parameters")?;
    let inner_theta = match &newer {
        Some(parameters) => parameters.number_from("rope_theta", 1.0)?,
        None => None,
    };
    let scaling = match newer {
        Some(parameters) => rope_scaling(&parameters)?,
        None => match fields.object("rope_scaling")? {
            Some(scaling) => rope_scaling(&scaling)?,
            None => RopeScaling::None,
        },
    };
    Ok((inner_theta.or(outer_theta).unwrap_or(default::ROPE_THETA), scaling))
}

fn rope_scaling(fields: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    if let Some(layers) = fields.object_names().next() {
        return Err(fields.wrong(layers, "one set of rotary parameters for all layers"));
    }
    let number = |name: &str| fields.required(name, |fields, name| fields.number_from(name, 1.0));
    let name = if fields.has("rope_type") { "rope_type" } else { "type" };
    match fields.text(name)?.unwrap_or(default::ROPE_TYPE) {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => {
            let low_freq_factor =
                fields.required("low_freq_factor", |fields, name| fields.number_from(name, 0.0))?;
            let high_freq_factor = number("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let expected = format!("more than `low_freq_factor`, which is {low_freq_factor}");
                return Err(fields.wrong("high_freq_factor", expected));
            }
            Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor,
                high_freq_factor,
                positions_original: number("original_max_position_embeddings")?,
            })
        }
        other => Err(fields.unserved(name, other, &["default", "linear", "llama3"])),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A configuration of which some fields are replaced.
    fn parse(changes: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 6
        });
        let fields = config.as_object_mut().unwrap();
        fields.extend(changes.as_object().unwrap().clone());
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        ModelConfig::parse(&ConfigFile::read(directory.path()).unwrap())
    }

    fn check(changes: Value, expected: &str) {
        let message = parse(changes).unwrap_err().to_string();
        assert!(message.contains("config.json: "), "{message}");
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn what_a_file_leaves_out_has_the_reference_librarys_default() {
        let config = parse(json!({"num_key_value_heads": null, "eos_token_id": null, "rope_scaling": null}));
        let expected = ModelConfig {
            vocabulary: 64,
            hidden: 48,
            intermediate: 96,
            layers: 2,
            heads: HeadShape { heads: 6, kv_heads: 6, head_dim: 8 },
            positions_max: 2048,
            norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            activation: Activation::Silu,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: None,
            eos_token_ids: vec![],
        };
        assert_eq!(config.unwrap(), expected);
    }

    #[test]
    fn what_a_file_says_is_taken() {
        let config = parse(json!({
            "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 500000, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true,
            "eos_token_id": [1, 2], "hidden_act": "swish"
        }))
        .unwrap();
        assert_eq!(config.heads, HeadShape { heads: 6, kv_heads: 2, head_dim: 20 });
        assert_eq!((config.positions_max, config.norm_eps, config.rope_theta), (512, 1e-5, 500_000.0));
        assert!(config.attention_bias && config.mlp_bias);
        assert_eq!(config.tie_word_embeddings, Some(true));
        assert_eq!(config.eos_token_ids, [1, 2]);
    }

    #[test]
    fn rope_scaling_is_read_in_its_older_and_newer_forms() {
        let scaling = |changes| {
            let config = parse(changes).unwrap();
            (config.rope_theta, config.rope_scaling)
        };
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 8192
        });
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            positions_original: 8192.0,
        };
        assert_eq!(scaling(json!({"rope_scaling": llama3})), (10_000.0, expected));
        let mut newer = llama3.clone();
        newer["rope_theta"] = json!(5e5);
        assert_eq!(scaling(json!({"rope_parameters": newer})), (5e5, expected));
        let linear = RopeScaling::Linear { factor: 2.0 };
        assert_eq!(scaling(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})), (10_000.0, linear));
        let default = json!({"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e6});
        assert_eq!(scaling(default), (1e6, RopeScaling::None));
    }

    #[test]
    fn fields_that_are_wrong_or_contradict_each_other_are_named() {
        check(json!({"vocab_size": null}), "`vocab_size` is missing");
        check(json!({"hidden_size": 0}), "`hidden_size` is 0");
        check(json!({"num_hidden_layers": 4.5}), "`num_hidden_layers` is 4.5");
        check(json!({"intermediate_size": 1u64 << 60}), "`intermediate_size` is 1152921504606846976");
        check(json!({"num_key_value_heads": 4}), "`num_key_value_heads` is 4, expected a divisor of");
        check(json!({"num_attention_heads": 5}), "`hidden_size` is 48, expected a multiple of");
        check(json!({"head_dim": 15}), "`head_dim` is 15, expected an even head size");
        check(json!({"rms_norm_eps": -1}), "`rms_norm_eps` is -1");
        check(json!({"rope_theta": "big"}), "`rope_theta` is \"big\"");
        check(json!({"attention_bias": 1}), "`attention_bias` is 1, expected true or false");
        check(json!({"eos_token_id": "x"}), "`eos_token_id` is \"x\"");
        check(json!({"hidden_act": "relu"}), "hidden_act `relu` is not served; served: silu");
        check(
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantization_config `gptq` is not served; served: unquantized weights",
        );
    }

    #[test]
    fn wrong_rope_scaling_is_named_with_its_place() {
        let scaling = |fields: Value| json!({"rope_scaling": fields});
        check(
            scaling(json!({"rope_type": "yarn", "factor": 4})),
            "rope_scaling.rope_type `yarn` is not served; served: default, linear, llama3",
        );
        check(scaling(json!({"type": "dynamic"})), "rope_scaling.type `dynamic` is not served");
        check(scaling(json!({"type": "linear"})), "`rope_scaling.factor` is missing");
        check(scaling(json!({"type": "linear", "factor": 0})), "`rope_scaling.factor` is 0, expected");
        check(scaling(json!("linear")), "`rope_scaling` is \"linear\", expected an object");
        check(
            scaling(json!({"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4})),
            "`rope_scaling.high_freq_factor` is 4, expected more than",
        );
        check(
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            "`rope_parameters.full_attention` is {\"rope_type\":\"default\"}, expected one set",
        );
    }
}
