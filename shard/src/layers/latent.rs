use kernels::{HeadShape, OpError};

use super::{AttentionIo, AttentionStep, LayerError, Linear, Norm, NormSpec, Pass, project};
use crate::backend::{
    self, AttentionRules, AttentionScratch, CopyParts, Device, Matrix, RopeCacheWrite, Tensor,
};
use crate::weights::{Partition, Region, Rows, WeightPath};

/// Sizes of a latent attention layer over all ranks.
#[derive(Clone, Debug)]
pub struct LatentSpec {
    /// Elements of an input and an output row.
    pub hidden: usize,
    /// Query heads. They share one latent key.
    pub heads: usize,
    /// Elements of a head that are not rotated.
    pub plain_dim: usize,
    /// Elements of a head that are.
    pub rotary_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Elements of the latent that keys and values are made from.
    pub latent_dim: usize,
    /// How queries are made.
    pub queries: Queries,
    /// Whether the projections from hidden states and the output have biases.
    pub bias: bool,
    /// The norms of the latent, and of a low-rank query.
    pub norm: NormSpec,
    /// Which of the model's rotary embeddings.
    pub rope: usize,
    /// Multiplies the scores.
    pub scale: f32,
}

/// How queries are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queries {
    /// `q_proj`
    Direct,
    /// `q_b_proj(norm(q_a_proj(x)))`
    LowRank(usize),
}

/// Multi-head latent attention. Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.
///
/// The cache holds what keys and values are made from: the normalized latent and the rotated part of the key, one of each for
/// all heads. The projections from the latent are absorbed instead: into the queries on the way in (`q_plain * W_K`), and
/// behind the attention on the way out (`context * W_V`), which is the same product in another order.
#[derive(Debug)]
pub struct LatentAttention {
    query_in: Option<(Linear, Norm)>,
    query_plain: Linear,
    query_rotary: Linear,
    latent: Linear,
    latent_norm: Norm,
    key_rotary: Linear,
    /// `[heads * latent_dim, plain_dim]`
    absorb_key: Matrix,
    /// `[heads * value_dim, latent_dim]`
    expand_value: Matrix,
    output: Linear,
    heads: HeadShape,
    latent_dim: usize,
    rope: usize,
    scale: f32,
}

/// What a [`LatentAttention`] keeps between its steps.
#[derive(Debug)]
pub struct LatentBuffers {
    query_low: Option<Tensor>,
    query_plain: Tensor,
    query_latent: Tensor,
    query_rotary: Tensor,
    /// `[T, heads, latent_dim + rotary_dim]`
    query: Tensor,
    latent: Tensor,
    key_rotary: Tensor,
    /// `[T, latent_dim + rotary_dim]`
    key: Tensor,
    context_latent: Tensor,
    context: Tensor,
    scratch: AttentionScratch,
}

impl LatentSpec {
    /// The heads of one rank: all of them share one key.
    fn local_heads(&self, partition: Partition) -> HeadShape {
        HeadShape {
            heads: partition.even(self.heads).len(),
            kv_heads: 1,
            head_dim: self.latent_dim + self.rotary_dim,
        }
    }

    /// Elements of a cached key.
    pub fn key_width(&self) -> usize {
        self.latent_dim + self.rotary_dim
    }
}

impl LatentAttention {
    /// Takes this rank's part of the projections from `path`, under their names in DeepSeek checkpoints.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: &LatentSpec) -> Result<Self, LayerError> {
        let LatentSpec { hidden, plain_dim, rotary_dim, value_dim, latent_dim, bias, .. } = *spec;
        let heads = path.partition().even(spec.heads);
        // Each head's rows of a matrix that holds two kinds of them per head.
        let per_head = |first, group, stride| {
            Rows::strided(first, group, spec.heads, stride).slice(heads.start * group..heads.end * group)
        };
        let linear = |name, region: &Region, bias| Linear::load(&path.at(name), device, region, bias);

        let (query_in, query_name, query_inputs) = match spec.queries {
            Queries::Direct => (None, "q_proj", hidden),
            Queries::LowRank(rank) => {
                let down = linear("q_a_proj", &Region::all(rank, hidden), bias)?;
                let norm = Norm::load(&path.at("q_a_layernorm"), device, rank, spec.norm)?;
                (Some((down, norm)), "q_b_proj", rank)
            }
        };
        let query_dim = plain_dim + rotary_dim;
        let query = |first, group| {
            let region = Region::all(spec.heads * query_dim, query_inputs);
            linear(query_name, &region.with_rows(per_head(first, group, query_dim)), false)
        };
        let latent = Region::all(latent_dim + rotary_dim, hidden);
        let latent_rows =
            |rows| linear("kv_a_proj_with_mqa", &latent.clone().with_rows(Rows::range(rows)), bias);
        let expand = Region::all(spec.heads * (plain_dim + value_dim), latent_dim);
        let expand_rows = |first, group| {
            let rows = per_head(first, group, plain_dim + value_dim);
            path.at("kv_b_proj").at("weight").matrix(&expand.clone().with_rows(rows))
        };
        let output = Region::all(hidden, spec.heads * value_dim)
            .with_cols(heads.start * value_dim..heads.end * value_dim);
        Ok(Self {
            query_plain: query(0, plain_dim)?,
            query_rotary: query(plain_dim, rotary_dim)?,
            query_in,
            latent: latent_rows(0..latent_dim)?,
            latent_norm: Norm::load(&path.at("kv_a_layernorm"), device, latent_dim, spec.norm)?,
            key_rotary: latent_rows(latent_dim..latent_dim + rotary_dim)?,
            absorb_key: device.place(expand_rows(0, plain_dim)?.transpose_parts(heads.len()))?,
            expand_value: device.place(expand_rows(plain_dim, value_dim)?)?,
            output: linear("o_proj", &output, bias)?,
            heads: spec.local_heads(path.partition()),
            latent_dim,
            rope: spec.rope,
            scale: spec.scale,
        })
    }

    /// Projects, rotates, stores, attends, projects back.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        step: AttentionStep<'_>,
        io: AttentionIo<'_, LatentBuffers>,
    ) -> Result<(), OpError> {
        let AttentionIo { input, cache, buffers, out } = io;
        self.make_query(pass, input, buffers)?;
        self.make_key(pass, input, buffers)?;
        let LatentBuffers { query, key, context_latent, context, scratch, .. } = buffers;
        pass.device.rope_cache_write(RopeCacheWrite {
            angles: Some(step.ropes[self.rope].angles()),
            heads: self.heads,
            slots: step.slots,
            query,
            key,
            value: None,
            cache,
        })?;
        pass.device.attention(backend::Attention {
            heads: self.heads,
            value_dim: self.latent_dim,
            scale: self.scale,
            rules: AttentionRules::default(),
            query,
            cache,
            sequences: step.sequences,
            scratch,
            out: context_latent,
        })?;
        pass.device.linear_per_head(self.heads.heads, context_latent, &self.expand_value, context)?;
        self.output.forward(pass, context, out)
    }

    /// Per head, the query against latents and the query against rotated keys, side by side.
    fn make_query(
        &self,
        pass: &Pass<'_>,
        input: &Tensor,
        buffers: &mut LatentBuffers,
    ) -> Result<(), OpError> {
        let LatentBuffers { query_low, query_plain, query_latent, query_rotary, query, .. } = buffers;
        let input = match (&self.query_in, query_low) {
            (Some((down, norm)), Some(low)) => {
                down.forward(pass, input, low)?;
                norm.forward_in_place(pass, low)?;
                &*low
            }
            _ => input,
        };
        project(
            pass,
            input,
            [(&self.query_plain, &mut *query_plain), (&self.query_rotary, &mut *query_rotary)],
        )?;
        let heads = self.heads.heads;
        pass.device.linear_per_head(heads, query_plain, &self.absorb_key, query_latent)?;
        self.side_by_side(pass, heads, [&*query_latent, &*query_rotary], query)
    }

    /// The normalized latent and the key that is rotated, side by side.
    fn make_key(&self, pass: &Pass<'_>, input: &Tensor, buffers: &mut LatentBuffers) -> Result<(), OpError> {
        let LatentBuffers { latent, key_rotary, key, .. } = buffers;
        project(pass, input, [(&self.latent, &mut *latent), (&self.key_rotary, &mut *key_rotary)])?;
        self.latent_norm.forward_in_place(pass, latent)?;
        self.side_by_side(pass, 1, [&*latent, &*key_rotary], key)
    }

    /// Per part of a row, a latent and what is rotated behind it.
    fn side_by_side(
        &self,
        pass: &Pass<'_>,
        parts: usize,
        [latent, rotary]: [&Tensor; 2],
        to: &mut Tensor,
    ) -> Result<(), OpError> {
        let latent_dim = self.latent_dim;
        let latent = CopyParts { parts, from: latent, out_of: 0, to: &mut *to, into: 0, width: latent_dim };
        pass.device.copy_parts(latent)?;
        let width = self.heads.head_dim - latent_dim;
        pass.device.copy_parts(CopyParts { parts, from: rotary, out_of: 0, to, into: latent_dim, width })
    }
}

impl LatentBuffers {
    /// Empty buffers for attention layers of these sizes.
    pub fn new(device: &Device, spec: &LatentSpec, partition: Partition) -> Result<Self, OpError> {
        let heads = partition.even(spec.heads).len();
        let zeros = |width| device.zeros(0, width);
        Ok(Self {
            query_low: match spec.queries {
                Queries::Direct => None,
                Queries::LowRank(rank) => Some(zeros(rank)?),
            },
            query_plain: zeros(heads * spec.plain_dim)?,
            query_latent: zeros(heads * spec.latent_dim)?,
            query_rotary: zeros(heads * spec.rotary_dim)?,
            query: zeros(heads * spec.key_width())?,
            latent: zeros(spec.latent_dim)?,
            key_rotary: zeros(spec.rotary_dim)?,
            key: zeros(spec.key_width())?,
            context_latent: zeros(heads * spec.latent_dim)?,
            context: zeros(heads * spec.value_dim)?,
            scratch: device.attention_scratch()?,
        })
    }

    /// Makes room for `rows` tokens.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        let Self { query_low, query_plain, query_latent, query_rotary, query, .. } = self;
        query_low.iter_mut().try_for_each(|tensor| tensor.set_rows(rows))?;
        for tensor in [query_plain, query_latent, query_rotary, query] {
            tensor.set_rows(rows)?;
        }
        let Self { latent, key_rotary, key, context_latent, context, .. } = self;
        [latent, key_rotary, key, context_latent, context]
            .into_iter()
            .try_for_each(|tensor| tensor.set_rows(rows))
    }
}
