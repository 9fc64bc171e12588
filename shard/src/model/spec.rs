//! What a decoder is made of. A family builds a [`DecoderSpec`] from its configuration; the decoder is the same for all.

use crate::layers::{AttentionSpec, EmbeddingSpec, LatentSpec, MlpSpec, MoeSpec, NormSpec, RopeSpec};

/// A decoder, over all ranks.
#[derive(Clone, Debug)]
pub struct DecoderSpec {
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Positions the model was made for.
    pub positions_max: usize,
    /// Where the embedding, the layers and the last norm are, as far as checkpoints differ: the first place that has the
    /// embedding counts.
    pub body: &'static [&'static str],
    /// From token ids to hidden states.
    pub embedding: EmbeddingSpec,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<RopeSpec>,
    /// What all norms of hidden states are.
    pub norm: NormSpec,
    /// Name of the list of layers.
    pub layers_name: &'static str,
    /// The layers.
    pub layers: Vec<LayerSpec>,
    /// Multiplies what each attention and each MLP adds.
    pub residual_scale: Option<f32>,
    /// Name of the norm behind the layers.
    pub last_norm: Option<&'static str>,
    /// From hidden states to logits.
    pub head: HeadSpec,
}

/// One layer.
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// In which order its parts run, and between which norms.
    pub block: Block,
    /// Name of the attention.
    pub attention_name: &'static str,
    /// Its attention.
    pub attention: AttentionKind,
    /// Name of the MLP.
    pub mlp_name: &'static str,
    /// Its MLP.
    pub mlp: MlpKind,
}

/// In which order the parts of a layer run. The names are those of norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// `x += after(attention(before(x)))`, then the same with the MLP. What has no name is left out.
    Sequential {
        /// Before the attention.
        before_attention: Option<&'static str>,
        /// Behind it.
        after_attention: Option<&'static str>,
        /// Before the MLP.
        before_mlp: Option<&'static str>,
        /// Behind it.
        after_mlp: Option<&'static str>,
    },
    /// `x += attention(norm(x)) + mlp(norm(x))`
    Parallel {
        /// Before the attention.
        attention: &'static str,
        /// Before the MLP, if that has a norm of its own.
        mlp: Option<&'static str>,
    },
    /// `x = norm(x); x += attention(x)`, then the same with the MLP: the normalized states are what is added to.
    Normed {
        /// Before the attention.
        attention: &'static str,
        /// Before the MLP.
        mlp: &'static str,
    },
    /// `x = norm(x + attention(x))`, then the same with the MLP. Source: Vaswani et al. 2017.
    Behind {
        /// Behind the attention.
        attention: &'static str,
        /// Behind the MLP.
        mlp: &'static str,
    },
}

/// How a layer attends.
#[derive(Clone, Debug)]
pub enum AttentionKind {
    /// Over keys and values per head.
    Heads(AttentionSpec),
    /// Over latents that all heads share.
    Latent(LatentSpec),
}

/// What a layer does to each token.
#[derive(Clone, Debug)]
pub enum MlpKind {
    /// One MLP.
    Dense(MlpSpec),
    /// A mixture of experts.
    Experts(Box<MoeSpec>),
}

/// From hidden states to logits.
#[derive(Clone, Debug)]
pub struct HeadSpec {
    /// Where the weight comes from.
    pub weight: HeadWeight,
    /// A projection to the width of the embedding before it, if that is another.
    pub project: Option<&'static str>,
    /// Multiplies the logits.
    pub scale: Option<f32>,
    /// Logits approach this and no more.
    pub soft_cap: Option<f32>,
}

/// Where the output head's weight comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadWeight {
    /// It is the embedding's; another one in the checkpoint is left alone.
    Tied,
    /// One of its own, under the first of these names that the checkpoint has.
    Own {
        /// Names, counted from the root of the checkpoint.
        names: &'static [&'static str],
        /// Whether it has a bias.
        bias: bool,
        /// Whether its rows are divided by their length.
        normalized: bool,
    },
}

impl DecoderSpec {
    /// Whether a router chooses experts in some layer.
    pub fn has_experts(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.mlp, MlpKind::Experts(_)))
    }
}

impl Block {
    /// `x += attention(norm(x)); x += mlp(norm(x))`
    pub const fn sequential(attention: &'static str, mlp: &'static str) -> Self {
        Self::Sequential {
            before_attention: Some(attention),
            after_attention: None,
            before_mlp: Some(mlp),
            after_mlp: None,
        }
    }
}

impl HeadWeight {
    /// `lm_head`, without a bias.
    pub const LM_HEAD: Self =
        Self::Own { names: &["lm_head", "language_model.lm_head"], bias: false, normalized: false };
}

impl LayerSpec {
    /// Its attention, where that is over heads.
    pub fn heads_mut(&mut self) -> Option<&mut AttentionSpec> {
        match &mut self.attention {
            AttentionKind::Heads(spec) => Some(spec),
            AttentionKind::Latent(_) => None,
        }
    }

    /// Its MLP, where that is one.
    pub fn dense_mut(&mut self) -> Option<&mut MlpSpec> {
        match &mut self.mlp {
            MlpKind::Dense(spec) => Some(spec),
            MlpKind::Experts(_) => None,
        }
    }
}
