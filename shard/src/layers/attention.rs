use kernels::{HeadShape, OpError, Sequence};

use super::{LayerError, Linear, LinearSpec};
use crate::backend::{self, Device, RopeAngles, RopeCacheWrite, Tensor};
use crate::cache::LayerKv;
use crate::weights::WeightPath;

/// Sizes of an attention layer, and what it does besides attending.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec {
    /// Elements of an input and an output row.
    pub hidden: usize,
    /// Heads.
    pub heads: HeadShape,
    /// Multiplies the scores; usually `head_dim^-0.5`.
    pub scale: f32,
    /// Whether queries, keys and values get a bias.
    pub qkv_bias: bool,
    /// Whether the output gets a bias.
    pub output_bias: bool,
}

/// Causal self-attention over the paged cache, with grouped heads. Source: Ainslie et al. 2023 (grouped queries).
#[derive(Debug)]
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: HeadShape,
    scale: f32,
}

/// What an [`Attention`] keeps between its steps. Layers run one after the other, so one set serves them all.
#[derive(Debug)]
pub struct AttentionBuffers {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
}

/// Which tokens a step consists of, as attention needs to know it. The same for all layers.
#[derive(Clone, Copy)]
pub struct AttentionStep<'a> {
    /// Angles of every position that occurs.
    pub angles: RopeAngles<'a>,
    /// `[T]`, position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[T]`, where each token's key and value go.
    pub slots: &'a [u32],
    /// The requests; their rows cover `0 .. T` without overlap.
    pub sequences: &'a [Sequence<'a>],
}

/// What [`Attention::forward`] reads and writes.
pub struct AttentionIo<'a> {
    /// `[T, hidden]`
    pub input: &'a Tensor,
    /// This layer's cache. The step's keys and values go there first, so that each token also sees itself.
    pub cache: &'a mut LayerKv,
    /// Buffers with `T` rows.
    pub buffers: &'a mut AttentionBuffers,
    /// `[T, hidden]`
    pub out: &'a mut Tensor,
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj` and `o_proj` from `path`.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: &AttentionSpec) -> Result<Self, LayerError> {
        let (query_width, kv_width) = (spec.heads.query_width(), spec.heads.kv_width());
        let into = |outputs| LinearSpec { inputs: spec.hidden, outputs, bias: spec.qkv_bias };
        let out = LinearSpec { inputs: query_width, outputs: spec.hidden, bias: spec.output_bias };
        Ok(Self {
            query: Linear::load(&path.at("q_proj"), device, into(query_width))?,
            key: Linear::load(&path.at("k_proj"), device, into(kv_width))?,
            value: Linear::load(&path.at("v_proj"), device, into(kv_width))?,
            output: Linear::load(&path.at("o_proj"), device, out)?,
            heads: spec.heads,
            scale: spec.scale,
        })
    }

    /// Projects, rotates, stores, attends, projects back.
    pub fn forward(
        &self,
        device: &Device,
        step: AttentionStep<'_>,
        io: AttentionIo<'_>,
    ) -> Result<(), OpError> {
        let AttentionIo { input, cache, buffers, out } = io;
        let AttentionBuffers { query, key, value, context } = buffers;
        device
            .linear(input, [self.query.product(query), self.key.product(key), self.value.product(value)])?;
        device.rope_cache_write(RopeCacheWrite {
            angles: step.angles,
            heads: self.heads,
            positions: step.positions,
            slots: step.slots,
            query,
            key,
            value,
            keys: &mut cache.keys,
            values: &mut cache.values,
        })?;
        device.attention(backend::Attention {
            heads: self.heads,
            scale: self.scale,
            query,
            keys: &cache.keys,
            values: &cache.values,
            sequences: step.sequences,
            out: context,
        })?;
        self.output.forward(device, context, out)
    }
}

impl AttentionBuffers {
    /// Empty buffers for attention layers of these sizes.
    pub fn new(device: &Device, spec: &AttentionSpec) -> Result<Self, OpError> {
        Ok(Self {
            query: device.zeros(0, spec.heads.query_width())?,
            key: device.zeros(0, spec.heads.kv_width())?,
            value: device.zeros(0, spec.heads.kv_width())?,
            context: device.zeros(0, spec.heads.query_width())?,
        })
    }

    /// Makes room for `rows` tokens.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        for tensor in [&mut self.query, &mut self.key, &mut self.value, &mut self.context] {
            tensor.set_rows(rows)?;
        }
        Ok(())
    }
}
