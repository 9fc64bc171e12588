//! What `config.json` says about a decoder, checked and with defaults filled in.

use kernels::{Activation, HeadShape};

use super::config_file::{ConfigError, Fields};
use super::rope_config::RopeConfig;

/// The names under which a family keeps what all of them have, and its defaults for what may be left out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    /// Width of the residual stream.
    pub hidden: &'static str,
    /// Width inside the MLP.
    pub intermediate: &'static str,
    /// The width inside the MLP in multiples of the residual stream's, where it may be left out.
    pub widening: Option<usize>,
    /// Number of decoder layers.
    pub layers: &'static str,
    /// Number of attention heads.
    pub heads: &'static str,
    /// Number of key/value heads.
    pub kv_heads: &'static str,
    /// Positions the model was made for.
    pub positions_max: &'static str,
    /// Added to the mean of squares in norms.
    pub norm_eps: &'static str,
    /// Its default.
    pub norm_eps_default: f64,
    /// The function in the MLP.
    pub activation: &'static str,
    /// Its default.
    pub activation_default: Activation,
}

impl Names {
    /// Llama's names, which most families took over. Defaults are those of transformers' `LlamaConfig`.
    pub(super) const LLAMA: Self = Self {
        hidden: "hidden_size",
        intermediate: "intermediate_size",
        widening: None,
        layers: "num_hidden_layers",
        heads: "num_attention_heads",
        kv_heads: "num_key_value_heads",
        positions_max: "max_position_embeddings",
        norm_eps: "rms_norm_eps",
        norm_eps_default: 1e-6,
        activation: "hidden_act",
        activation_default: Activation::Silu,
    };
    /// GPT-2's names.
    pub(super) const GPT2: Self = Self {
        hidden: "n_embd",
        intermediate: "n_inner",
        widening: Some(4),
        layers: "n_layer",
        heads: "n_head",
        kv_heads: "n_head_kv",
        positions_max: "n_positions",
        norm_eps: "layer_norm_epsilon",
        norm_eps_default: 1e-5,
        activation: "activation_function",
        activation_default: Activation::GeluTanh,
    };
}

/// Positions of a model that does not say how many it was made for.
const POSITIONS_MAX_DEFAULT: usize = 2048;

/// Most layers accepted: each is described before any weight is looked at. Published models have fewer than 200.
const LAYERS_MAX: usize = 4096;

/// A decoder's configuration, as far as families share it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ModelConfig {
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Heads of each attention layer. The key/value heads divide the heads.
    pub heads: HeadShape,
    /// Positions the model was made for.
    pub positions_max: usize,
    /// Added to the mean of squares in norms.
    pub norm_eps: f32,
    /// Rotary parameters of all layers, or of those that see everything.
    pub rope: RopeConfig,
    /// The function in the MLP.
    pub activation: Activation,
    /// Whether attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether the head is the embedding; `None` where the file leaves it to the family.
    pub tie_word_embeddings: Option<bool>,
    /// Tokens that a sliding layer sees, itself among them.
    pub sliding_window: Option<usize>,
    /// Which layers slide, where the file has a list.
    pub sliding_layers: Option<Vec<bool>>,
}

impl ModelConfig {
    /// Reads the fields that families share. Errors when one is missing, out of bounds, or contradicts another.
    pub(super) fn parse(fields: &Fields<'_>, names: &Names) -> Result<Self, ConfigError> {
        refuse_quantization(fields)?;
        let hidden = fields.required(names.hidden, Fields::size)?;
        let layers = fields.required(names.layers, Fields::size)?;
        if layers > LAYERS_MAX {
            return Err(fields.wrong(names.layers, format!("at most {LAYERS_MAX} layers")));
        }
        let positions_max = fields.size(names.positions_max)?.unwrap_or(POSITIONS_MAX_DEFAULT);
        let intermediate = match (fields.size(names.intermediate)?, names.widening) {
            (None, Some(widening)) => widening * hidden,
            _ => fields.required(names.intermediate, Fields::size)?,
        };
        let rope = RopeConfig::parse(fields, positions_max, Some("full_attention"))?;
        Ok(Self {
            vocabulary: fields.required("vocab_size", Fields::size)?,
            hidden,
            intermediate,
            layers,
            heads: heads(fields, names, hidden)?,
            positions_max: rope.scaling.positions_max(positions_max),
            norm_eps: fields.number_from(names.norm_eps, 0.0)?.unwrap_or(names.norm_eps_default) as f32,
            rope,
            activation: activation(fields, names.activation)?.unwrap_or(names.activation_default),
            attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            sliding_window: fields.size("sliding_window")?,
            sliding_layers: sliding_layers(fields, layers)?,
        })
    }

    /// The window of each layer: as the file's list says, or else as the family does.
    pub(super) fn windows(&self, slides: impl Fn(usize) -> bool) -> Vec<Option<usize>> {
        let slides = |layer: usize| match &self.sliding_layers {
            Some(layers) => layers[layer],
            None => slides(layer),
        };
        (0..self.layers).map(|layer| self.sliding_window.filter(|_| slides(layer))).collect()
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

fn heads(fields: &Fields<'_>, names: &Names, hidden: usize) -> Result<HeadShape, ConfigError> {
    let heads = fields.required(names.heads, Fields::size)?;
    let kv_heads = fields.size(names.kv_heads)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of `{}`, which is {heads}", names.heads);
        return Err(fields.wrong(names.kv_heads, expected));
    }
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("a multiple of `{}`, which is {heads}, or a `head_dim`", names.heads);
            return Err(fields.wrong(names.hidden, expected));
        }
    };
    Ok(HeadShape { heads, kv_heads, head_dim })
}

/// The function that a field names.
pub(super) fn activation(fields: &Fields<'_>, name: &str) -> Result<Option<Activation>, ConfigError> {
    Ok(match fields.text(name)? {
        None => None,
        Some("silu" | "swish") => Some(Activation::Silu),
        Some("gelu") => Some(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Some(Activation::GeluTanh),
        Some("quick_gelu") => Some(Activation::QuickGelu),
        Some("relu") => Some(Activation::Relu),
        Some(other) => {
            let served =
                ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu"];
            return Err(fields.unserved(name, other, &served));
        }
    })
}

/// `layer_types`, one per layer.
fn sliding_layers(fields: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>, ConfigError> {
    const NAME: &str = "layer_types";
    let Some(types) = fields.texts(NAME)? else {
        return Ok(None);
    };
    if types.len() < layers {
        return Err(fields.wrong(NAME, format!("one entry for each of {layers} layers")));
    }
    let slides = |kind: &&str| match *kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(fields.unserved(NAME, other, &["full_attention", "sliding_attention"])),
    };
    types.iter().take(layers).map(slides).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::layers::RopeScaling;
    use crate::model::config_file::ConfigFile;

    /// A configuration of which some fields are replaced.
    fn parse(changes: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 6
        });
        let fields = config.as_object_mut().unwrap();
        fields.extend(changes.as_object().unwrap().clone());
        ModelConfig::parse(&ConfigFile::from_json(config).fields(), &Names::LLAMA)
    }

    fn check(changes: Value, expected: &str) {
        let message = parse(changes).unwrap_err().to_string();
        assert!(message.contains("config.json: "), "{message}");
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn what_a_file_leaves_out_has_the_reference_librarys_default() {
        let config = parse(json!({"num_key_value_heads": null, "rope_scaling": null}));
        let expected = ModelConfig {
            vocabulary: 64,
            hidden: 48,
            intermediate: 96,
            layers: 2,
            heads: HeadShape { heads: 6, kv_heads: 6, head_dim: 8 },
            positions_max: 2048,
            norm_eps: 1e-6,
            rope: RopeConfig { theta: 10_000.0, scaling: RopeScaling::None, partial: None },
            activation: Activation::Silu,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: None,
            sliding_window: None,
            sliding_layers: None,
        };
        assert_eq!(config.unwrap(), expected);
    }

    #[test]
    fn what_a_file_says_is_taken() {
        let config = parse(json!({
            "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 500000, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true,
            "hidden_act": "gelu_new", "sliding_window": 8
        }))
        .unwrap();
        assert_eq!(config.heads, HeadShape { heads: 6, kv_heads: 2, head_dim: 20 });
        assert_eq!((config.positions_max, config.norm_eps, config.rope.theta), (512, 1e-5, 500_000.0));
        assert!(config.attention_bias && config.mlp_bias);
        assert_eq!((config.tie_word_embeddings, config.activation), (Some(true), Activation::GeluTanh));
        assert_eq!(config.windows(|layer| layer == 1), [None, Some(8)]);
    }

    #[test]
    fn a_list_of_layer_types_goes_before_the_familys_rule() {
        let config =
            parse(json!({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}))
                .unwrap();
        assert_eq!(config.windows(|_| true), [Some(8), None]);
        check(
            json!({"layer_types": ["full_attention"]}),
            "`layer_types` is [\"full_attention\"], expected one entry",
        );
        check(json!({"layer_types": ["full_attention", "linear"]}), "layer_types `linear` is not served");
    }

    #[test]
    fn fields_that_are_wrong_or_contradict_each_other_are_named() {
        check(json!({"vocab_size": null}), "`vocab_size` is missing");
        check(json!({"hidden_size": 0}), "`hidden_size` is 0");
        check(json!({"num_hidden_layers": 4.5}), "`num_hidden_layers` is 4.5");
        check(json!({"intermediate_size": 1u64 << 60}), "`intermediate_size` is 1152921504606846976");
        check(json!({"num_key_value_heads": 4}), "`num_key_value_heads` is 4, expected a divisor of");
        check(json!({"num_attention_heads": 5}), "`hidden_size` is 48, expected a multiple of");
        check(json!({"rms_norm_eps": -1}), "`rms_norm_eps` is -1");
        check(json!({"attention_bias": 1}), "`attention_bias` is 1, expected true or false");
        check(json!({"hidden_act": "mish"}), "hidden_act `mish` is not served; served: silu, swish, gelu");
        check(
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantization_config `gptq` is not served; served: unquantized weights",
        );
    }
}
