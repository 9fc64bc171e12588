use kernels::{HeadShape, OpError};

use super::{LayerError, Linear, Norm, NormSpec, Pass, Rope, project};
use crate::backend::{
    self, AttentionRules, AttentionScratch, CopyParts, Device, Indices, RopeCacheWrite, Sequences, Tensor,
};
use crate::cache::LayerKv;
use crate::weights::{Partition, Region, Rows, WeightPath};

/// Sizes of an attention layer over all ranks, and what it does besides attending.
#[derive(Clone, Debug)]
pub struct AttentionSpec {
    /// Elements of an input and an output row.
    pub hidden: usize,
    /// Heads.
    pub heads: HeadShape,
    /// How the projections into heads are stored.
    pub projections: Projections,
    /// Name of the projection back.
    pub output: &'static str,
    /// Whether weights are stored the other way around, `[inputs, outputs]`.
    pub transposed: bool,
    /// Whether queries, keys and values get a bias.
    pub qkv_bias: bool,
    /// Whether the output gets a bias.
    pub output_bias: bool,
    /// Keeps queries, keys and values between this and its opposite.
    pub clip: Option<f32>,
    /// Norms of queries and keys, before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// Which of the model's rotary embeddings, if any.
    pub rope: Option<usize>,
    /// Multiplies the scores; usually `head_dim^-0.5`.
    pub scale: f32,
    /// A token sees itself and this many tokens less one before it.
    pub window: Option<usize>,
    /// Scores approach this and no more.
    pub soft_cap: Option<f32>,
    /// Penalties for distance.
    pub alibi: Option<Alibi>,
    /// Name of the attention sinks.
    pub sinks: Option<&'static str>,
}

/// How the projections into queries, keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// Each on its own.
    Separate {
        /// Queries.
        query: &'static str,
        /// Keys.
        key: &'static str,
        /// Values.
        value: &'static str,
    },
    /// All queries, then all keys, then all values.
    Stacked(&'static str),
    /// Per key/value head: its queries, its key, its value.
    Grouped(&'static str),
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug)]
pub struct QkNorm {
    /// What they are.
    pub norm: NormSpec,
    /// Over which elements.
    pub scope: QkNormScope,
    /// Name of the queries' norm.
    pub query: &'static str,
    /// Name of the keys' norm.
    pub key: &'static str,
}

/// Which elements a norm of queries or keys takes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormScope {
    /// Each head's, with the same weights for all heads.
    Head,
    /// Each head's, with weights `[heads, head_dim]`.
    EachHead,
    /// Each head's, with weights in modules of their own, `norms.{head}`.
    Modules,
    /// All heads' together.
    Width,
}

/// Attention with linear biases. Source: Press et al. 2021.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alibi {
    /// The slopes are powers of 2 down to this negative exponent; usually 8.
    pub exponent_max: f32,
    /// Multiplies the slopes; usually 1.
    pub factor: f32,
}

/// Causal self-attention over the paged cache, with grouped heads. Source: Ainslie et al. 2023 (grouped queries).
#[derive(Debug)]
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: HeadShape,
    clip: Option<f32>,
    qk_norm: Option<HeadNorms>,
    rope: Option<usize>,
    scale: f32,
    window: Option<usize>,
    soft_cap: Option<f32>,
    slopes: Option<Tensor>,
    sinks: Option<Tensor>,
}

#[derive(Debug)]
struct HeadNorms {
    query: HeadNorm,
    key: HeadNorm,
}

#[derive(Debug)]
struct HeadNorm {
    norm: Norm,
    /// Where the norm is over the elements of all ranks: how many each of them has.
    cols: Option<Vec<usize>>,
}

/// What an [`Attention`] keeps between its steps. Layers run one after the other, so one set serves them all.
#[derive(Debug)]
pub struct AttentionBuffers {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    scratch: AttentionScratch,
    /// Queries or keys of all ranks.
    gathered: Option<[Tensor; 2]>,
}

/// Which tokens a step consists of, as attention needs to know it. The same for all layers.
#[derive(Clone, Copy)]
pub struct AttentionStep<'a> {
    /// The model's rotary embeddings; they cover the step.
    pub ropes: &'a [Rope],
    /// `[T]`, where each token's key and value go.
    pub slots: &'a Indices,
    /// The requests; their rows cover `0 .. T` without overlap.
    pub sequences: Sequences<'a>,
}

/// What an attention layer reads and writes.
pub struct AttentionIo<'a, B> {
    /// `[T, hidden]`
    pub input: &'a Tensor,
    /// This layer's cache. The step's keys and values go there first, so that each token also sees itself.
    pub cache: &'a mut LayerKv,
    /// Buffers with `T` rows.
    pub buffers: &'a mut B,
    /// `[T, hidden]`; where there are several ranks, this one's part of the sum.
    pub out: &'a mut Tensor,
}

impl AttentionSpec {
    /// The heads of one rank.
    pub fn local_heads(&self, partition: Partition) -> HeadShape {
        HeadShape {
            heads: partition.even(self.heads.heads).len(),
            kv_heads: partition.kv_heads(self.heads.heads, self.heads.kv_heads).len(),
            ..self.heads
        }
    }

    /// Names and regions of the projections into queries, keys and values.
    fn regions(&self, partition: Partition) -> [(&'static str, Region); 3] {
        let HeadShape { heads, kv_heads, head_dim } = self.heads;
        let own = partition.even(heads);
        let own_kv = partition.kv_heads(heads, kv_heads);
        let (query_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let region = |whole: usize, rows: Rows| {
            Region::all(whole, self.hidden).transposed(self.transposed).with_rows(rows)
        };
        let [all_query, all_key, all_value] = match self.projections {
            Projections::Separate { .. } => {
                [Rows::range(0..query_width), Rows::range(0..kv_width), Rows::range(0..kv_width)]
            }
            Projections::Stacked(_) => {
                let (keys, values) = (query_width, query_width + kv_width);
                [Rows::range(0..keys), Rows::range(keys..values), Rows::range(values..values + kv_width)]
            }
            Projections::Grouped(_) => {
                let queries = heads / kv_heads * head_dim;
                let part = |first, group| Rows::strided(first, group, kv_heads, queries + 2 * head_dim);
                [part(0, queries), part(queries, head_dim), part(queries + head_dim, head_dim)]
            }
        };
        let query = all_query.pick(head_dim, &own.collect::<Vec<_>>());
        let mut rows = [query, all_key.pick(head_dim, &own_kv), all_value.pick(head_dim, &own_kv)];
        let fused = query_width + 2 * kv_width;
        let (names, wholes) = match self.projections {
            Projections::Separate { query, key, value } => {
                ([query, key, value], [query_width, kv_width, kv_width])
            }
            Projections::Stacked(name) | Projections::Grouped(name) => ([name; 3], [fused; 3]),
        };
        std::array::from_fn(|at| (names[at], region(wholes[at], std::mem::take(&mut rows[at]))))
    }
}

impl Attention {
    /// Takes this rank's part of the projections from `path`.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: &AttentionSpec) -> Result<Self, LayerError> {
        let partition = path.partition();
        let query_width = spec.heads.query_width();
        let [query, key, value] = spec.regions(partition);
        let into =
            |(name, region): (&str, Region)| Linear::load(&path.at(name), device, &region, spec.qkv_bias);
        let inputs = partition.even(spec.heads.heads);
        let inputs = inputs.start * spec.heads.head_dim..inputs.end * spec.heads.head_dim;
        let output = Region::all(spec.hidden, query_width).transposed(spec.transposed).with_cols(inputs);
        let local = partition.even(spec.heads.heads);
        let upload = |elements: Vec<f32>| device.upload(elements, local.len());
        let slopes = spec.alibi.map(|alibi| upload(alibi.slopes(spec.heads.heads)[local.clone()].to_vec()));
        let sinks = match spec.sinks {
            Some(name) => {
                let rows = Rows::range(local.clone());
                Some(upload(path.at(name).vector_part(&[spec.heads.heads], &rows)?)?)
            }
            None => None,
        };
        Ok(Self {
            query: into(query)?,
            key: into(key)?,
            value: into(value)?,
            output: Linear::load(&path.at(spec.output), device, &output, spec.output_bias)?,
            heads: spec.local_heads(partition),
            clip: spec.clip,
            qk_norm: spec.qk_norm.map(|norms| HeadNorms::load(path, device, spec, norms)).transpose()?,
            rope: spec.rope,
            scale: spec.scale,
            window: spec.window,
            soft_cap: spec.soft_cap,
            slopes: slopes.transpose()?,
            sinks,
        })
    }

    /// Projects, rotates, stores, attends, projects back.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        step: AttentionStep<'_>,
        io: AttentionIo<'_, AttentionBuffers>,
    ) -> Result<(), OpError> {
        let AttentionIo { input, cache, buffers, out } = io;
        let AttentionBuffers { query, key, value, context, scratch, gathered } = buffers;
        project(
            pass,
            input,
            [(&self.query, &mut *query), (&self.key, &mut *key), (&self.value, &mut *value)],
        )?;
        if let Some(limit) = self.clip {
            for tensor in [&mut *query, &mut *key, &mut *value] {
                pass.device.clamp(tensor, limit)?;
            }
        }
        if let Some(norms) = &self.qk_norm {
            let [queries, keys] = gathered.as_mut().map_or([None, None], |both| both.each_mut().map(Some));
            norms.query.forward(pass, query, queries)?;
            norms.key.forward(pass, key, keys)?;
        }
        pass.device.rope_cache_write(RopeCacheWrite {
            angles: self.rope.map(|rope| step.ropes[rope].angles()),
            heads: self.heads,
            slots: step.slots,
            query,
            key,
            value: Some(value),
            cache,
        })?;
        pass.device.attention(backend::Attention {
            heads: self.heads,
            value_dim: self.heads.head_dim,
            scale: self.scale,
            rules: AttentionRules {
                window: self.window,
                soft_cap: self.soft_cap,
                slopes: self.slopes.as_ref(),
                sinks: self.sinks.as_ref(),
            },
            query,
            cache,
            sequences: step.sequences,
            scratch,
            out: context,
        })?;
        self.output.forward(pass, context, out)
    }
}

impl Alibi {
    /// The slope of each head. Where their number is no power of two, the slopes of the next lower one come first, and then
    /// every second of the doubled sequence.
    fn slopes(self, heads: usize) -> Vec<f32> {
        let slope = |head: usize, heads: usize| (-self.exponent_max * head as f32 / heads as f32).exp2();
        let lower = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let first = (1..=lower).map(|head| slope(head, lower));
        let between = (1..=2 * lower).step_by(2).map(|head| slope(head, 2 * lower));
        first.chain(between).take(heads).map(|slope| slope * self.factor).collect()
    }
}

impl HeadNorms {
    fn load(
        path: &WeightPath<'_>,
        device: &Device,
        spec: &AttentionSpec,
        norms: QkNorm,
    ) -> Result<Self, LayerError> {
        let partition = path.partition();
        let HeadShape { heads, kv_heads, head_dim } = spec.heads;
        let load = |name, count, part: &dyn Fn(Partition) -> Vec<usize>| {
            HeadNorm::load(&path.at(name), device, norms, NormHeads { partition, head_dim, count, part })
        };
        Ok(Self {
            query: load(norms.query, heads, &|rank: Partition| rank.even(heads).collect())?,
            key: load(norms.key, kv_heads, &|rank: Partition| rank.kv_heads(heads, kv_heads))?,
        })
    }
}

/// The heads that a norm is for.
struct NormHeads<'a> {
    partition: Partition,
    head_dim: usize,
    /// Over all ranks.
    count: usize,
    /// Which of them a rank has.
    part: &'a dyn Fn(Partition) -> Vec<usize>,
}

impl HeadNorm {
    fn load(
        path: &WeightPath<'_>,
        device: &Device,
        norms: QkNorm,
        heads: NormHeads<'_>,
    ) -> Result<Self, LayerError> {
        let NormHeads { partition, head_dim, count, part } = heads;
        let own = part(partition);
        let elements = |heads: &[usize]| Rows::range(0..count * head_dim).pick(head_dim, heads);
        let norm = match norms.scope {
            QkNormScope::Head => Norm::load(path, device, head_dim, norms.norm)?,
            QkNormScope::EachHead => {
                Norm::load_part(path, device, &[count, head_dim], &elements(&own), norms.norm)?
            }
            QkNormScope::Modules => {
                let gather = |name| -> Result<Vec<f32>, LayerError> {
                    let heads = own.iter().map(|head| path.at("norms").at(head).at(name).vector(head_dim));
                    Ok(heads.collect::<Result<Vec<_>, _>>()?.concat())
                };
                let bias = if norms.norm.bias { Some(gather("bias")?) } else { None };
                Norm::from_parts(device, head_dim, norms.norm, Some(gather("weight")?), bias)?
            }
            QkNormScope::Width => {
                // Ranks that share heads all bring them, each head as often: that changes neither mean nor variance.
                let all: Vec<usize> = partition.ranks().flat_map(part).collect();
                let gather = |name| path.at(name).vector_part(&[count * head_dim], &elements(&all));
                let weight = gather("weight")?;
                let bias = if norms.norm.bias { Some(gather("bias")?) } else { None };
                Norm::from_parts(device, weight.len(), norms.norm, Some(weight), bias)?
            }
        };
        let split = partition.is_split() && norms.scope == QkNormScope::Width;
        let cols = split.then(|| partition.ranks().map(|rank| part(rank).len() * head_dim).collect());
        Ok(Self { norm, cols })
    }

    fn forward(&self, pass: &Pass<'_>, x: &mut Tensor, gathered: Option<&mut Tensor>) -> Result<(), OpError> {
        let (Some(cols), Some(gathered)) = (&self.cols, gathered) else {
            return self.norm.forward_in_place(pass, x);
        };
        pass.ranks.gather_cols(x, cols, gathered)?;
        self.norm.forward_in_place(pass, gathered)?;
        let before: usize = cols[..pass.ranks.partition().rank].iter().sum();
        let width = x.width();
        pass.device.copy_parts(CopyParts { parts: 1, from: gathered, out_of: before, to: x, into: 0, width })
    }
}

impl AttentionBuffers {
    /// Empty buffers for attention layers of these sizes.
    pub fn new(device: &Device, spec: &AttentionSpec, partition: Partition) -> Result<Self, OpError> {
        let heads = spec.local_heads(partition);
        let whole = spec.qk_norm.is_some_and(|norms| norms.scope == QkNormScope::Width);
        let gathered = || -> Result<[Tensor; 2], OpError> {
            let keys = heads.kv_width() * partition.world;
            Ok([device.zeros(0, spec.heads.query_width())?, device.zeros(0, keys)?])
        };
        Ok(Self {
            query: device.zeros(0, heads.query_width())?,
            key: device.zeros(0, heads.kv_width())?,
            value: device.zeros(0, heads.kv_width())?,
            context: device.zeros(0, heads.query_width())?,
            scratch: device.attention_scratch()?,
            gathered: if whole && partition.is_split() { Some(gathered()?) } else { None },
        })
    }

    /// Makes room for `rows` tokens.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        for tensor in [&mut self.query, &mut self.key, &mut self.value, &mut self.context] {
            tensor.set_rows(rows)?;
        }
        self.gathered.iter_mut().flatten().try_for_each(|tensor| tensor.set_rows(rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(heads: usize, expected: &[f32]) {
        assert_eq!(Alibi { exponent_max: 8.0, factor: 1.0 }.slopes(heads), expected);
    }

    #[test]
    fn alibi_slopes_fall_geometrically_and_are_filled_up_from_between() {
        check(4, &[0.25, 0.0625, 0.015_625, 0.003_906_25]);
        check(3, &[0.0625, 0.003_906_25, 0.25]);
        check(6, &[0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125]);
    }

    fn stored(region: &Region) -> Vec<usize> {
        (0..region.rows.len()).map(|row| region.rows.stored(row)).collect()
    }

    #[test]
    fn fused_projections_are_taken_apart_and_split_over_ranks() {
        let spec = |projections| AttentionSpec {
            hidden: 4,
            heads: HeadShape { heads: 4, kv_heads: 2, head_dim: 1 },
            projections,
            output: "o_proj",
            transposed: false,
            qkv_bias: false,
            output_bias: false,
            clip: None,
            qk_norm: None,
            rope: None,
            scale: 1.0,
            window: None,
            soft_cap: None,
            alibi: None,
            sinks: None,
        };
        let rows = |projections, rank, world| {
            spec(projections).regions(Partition { rank, world }).map(|(_, region)| stored(&region))
        };
        let stacked = Projections::Stacked("qkv");
        assert_eq!(rows(stacked, 0, 1), [vec![0, 1, 2, 3], vec![4, 5], vec![6, 7]]);
        assert_eq!(rows(stacked, 1, 2), [vec![2, 3], vec![5], vec![7]]);
        let grouped = Projections::Grouped("qkv");
        assert_eq!(rows(grouped, 0, 1), [vec![0, 1, 4, 5], vec![2, 6], vec![3, 7]]);
        assert_eq!(rows(grouped, 1, 2), [vec![4, 5], vec![6], vec![7]]);
        assert_eq!(rows(grouped, 3, 4), [vec![5], vec![6], vec![7]]);
        let cut = AttentionSpec { heads: HeadShape { heads: 6, kv_heads: 3, head_dim: 1 }, ..spec(stacked) };
        let regions = cut.regions(Partition { rank: 1, world: 2 }).map(|(_, region)| stored(&region));
        assert_eq!(regions, [vec![3, 4, 5], vec![7, 8, 8], vec![10, 11, 11]]);
    }
}
