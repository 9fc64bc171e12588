//! Llama, and the plain decoder that other families start from. Source: Touvron et al. 2023.

use kernels::{Gating, HeadShape, RopeLayout};

use super::config::{ModelConfig, Names};
use super::config_file::{ConfigError, ConfigFile, Fields};
use super::spec::{AttentionKind, Block, DecoderSpec, HeadSpec, HeadWeight, LayerSpec, MlpKind};
use crate::layers::{
    AttentionSpec, EmbeddingSpec, GatedNames, MlpForm, MlpSpec, NormSpec, Projections, RopeSpec,
};

/// `llama`: Llama 2 and 3, and what was built on them.
pub(super) fn llama(file: &ConfigFile) -> Result<DecoderSpec, ConfigError> {
    let config = ModelConfig::parse(&file.fields(), &Names::LLAMA)?;
    DecoderSpec::llama(&file.fields(), &config)
}

impl DecoderSpec {
    /// Grouped attention over all earlier tokens, rotary positions in two halves, SwiGLU, RMS norms before each part.
    pub(super) fn llama(fields: &Fields<'_>, config: &ModelConfig) -> Result<Self, ConfigError> {
        let ModelConfig { hidden, heads, norm_eps, .. } = *config;
        let layer = LayerSpec {
            block: Block::sequential("input_layernorm", "post_attention_layernorm"),
            attention_name: "self_attn",
            attention: AttentionKind::Heads(AttentionSpec {
                qkv_bias: config.attention_bias,
                output_bias: config.attention_bias,
                ..AttentionSpec::plain(hidden, heads)
            }),
            mlp_name: "mlp",
            mlp: MlpKind::Dense(MlpSpec {
                hidden,
                intermediate: config.intermediate,
                form: MlpForm::Gated(
                    GatedNames::Separate { gate: "gate_proj", up: "up_proj" },
                    Gating::Activation(config.activation),
                ),
                down: "down_proj",
                bias: config.mlp_bias,
                transposed: false,
            }),
        };
        Ok(Self {
            vocabulary: config.vocabulary,
            hidden,
            positions_max: config.positions_max,
            body: &["model"],
            embedding: EmbeddingSpec {
                name: "embed_tokens",
                width: hidden,
                scale: None,
                positions: None,
                project: None,
                norm: None,
            },
            ropes: vec![RopeSpec::of_heads(fields, config, RopeLayout::HalfSplit)?],
            norm: NormSpec::rms(norm_eps),
            layers_name: "layers",
            layers: vec![layer; config.layers],
            residual_scale: None,
            last_norm: Some("norm"),
            head: HeadSpec {
                weight: match config.tie_word_embeddings {
                    Some(true) => HeadWeight::Tied,
                    Some(false) | None => HeadWeight::LM_HEAD,
                },
                project: None,
                scale: None,
                soft_cap: None,
            },
        })
    }

    /// Every layer's attention over heads.
    pub(super) fn attentions(&mut self) -> impl Iterator<Item = &mut AttentionSpec> {
        self.layers.iter_mut().filter_map(LayerSpec::heads_mut)
    }

    /// Every layer's MLP.
    pub(super) fn mlps(&mut self) -> impl Iterator<Item = &mut MlpSpec> {
        self.layers.iter_mut().filter_map(LayerSpec::dense_mut)
    }

    /// Gives each layer its window.
    pub(super) fn set_windows(&mut self, windows: &[Option<usize>]) {
        self.attentions().zip(windows).for_each(|(attention, window)| attention.window = *window);
    }
}

impl AttentionSpec {
    /// Llama's attention: separate projections without biases, the first rotary embedding.
    pub(super) fn plain(hidden: usize, heads: HeadShape) -> Self {
        Self {
            hidden,
            heads,
            projections: Projections::Separate { query: "q_proj", key: "k_proj", value: "v_proj" },
            output: "o_proj",
            transposed: false,
            qkv_bias: false,
            output_bias: false,
            clip: None,
            qk_norm: None,
            rope: Some(0),
            scale: (heads.head_dim as f32).sqrt().recip(),
            window: None,
            soft_cap: None,
            alibi: None,
            sinks: None,
        }
    }
}

impl RopeSpec {
    /// A rotary embedding of heads, over the share of each head that the configuration says.
    pub(super) fn of_heads(
        fields: &Fields<'_>,
        config: &ModelConfig,
        layout: RopeLayout,
    ) -> Result<Self, ConfigError> {
        let head_dim = config.heads.head_dim;
        let rotary_dim = match config.rope.partial {
            Some(partial) => (head_dim as f64 * partial) as usize,
            None => head_dim,
        };
        Self::new(fields, config, rotary_dim, layout)
    }

    /// A rotary embedding of the first `rotary_dim` elements of each head.
    ///
    /// Errors when that is odd or more than a head, and when a list of factors has another length.
    pub(super) fn new(
        fields: &Fields<'_>,
        config: &ModelConfig,
        rotary_dim: usize,
        layout: RopeLayout,
    ) -> Result<Self, ConfigError> {
        let head_dim = config.heads.head_dim;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            let expected = format!(
                "an even number of rotated elements up to {head_dim}, the size of a head, not {rotary_dim}"
            );
            return Err(fields.wrong("head_dim", expected));
        }
        config.rope.scaling.check(fields, rotary_dim / 2)?;
        Ok(Self {
            rotary_dim,
            start: 0,
            layout,
            theta: config.rope.theta,
            scaling: config.rope.scaling.clone(),
            positions_max: config.positions_max,
        })
    }
}
