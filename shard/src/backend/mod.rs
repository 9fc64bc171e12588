//! The device, its tensors, and the operations that layers call. Everything above is written against this list and
//! never asks which device it runs on.
//!
//! - `tensor.rs`, `matrix.rs`: tensors and weights on the device
//! - `step.rs`: what a step says about its tokens; `moe.rs`: experts; `scratch.rs`: what operations keep between steps
//! - `open.rs`: which device it is; `link.rs`: how the devices of several ranks meet
//! - `cpu.rs`: the operations on CPUs; `cuda/`: on NVIDIA GPUs (feature `cuda`)
//!
//! Operations are asynchronous where the device is: their errors are wrong arguments, found before anything runs, or a
//! failure of the device ([`OpError::Device`]), which is final and may be older than the operation that reports it.

mod cpu;
#[cfg(feature = "gpu")]
mod cuda;
mod link;
mod matrix;
mod moe;
mod open;
mod scratch;
mod step;
mod tensor;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use kernels::collective::LocalGroup;
use kernels::cpu::Cpu;
use kernels::{
    Activation, DType, Gating, Groups, HeadShape, NormKind, Normalize, OpError, RopeLayout, Score,
};

#[cfg(feature = "gpu")]
pub use cuda::Cuda;
pub use link::Link;
pub use matrix::{Matrix, Projection};
pub use moe::{Expert, ExpertSet};
pub use open::{CacheDType, DeviceChoice, DeviceOptions};
pub use scratch::{AttentionScratch, ExpertScratch, Routes, SamplingState};
pub use step::{Indices, SequenceBuffer, Sequences};
pub use tensor::Tensor;

use matrix::MatrixStorage;

use crate::cache::LayerKv;
use crate::layers::LayerError;
use crate::sampling::{Choice, Pick};
use crate::weights::{FileRange, Progress, Weight, prefetch};

/// Where tensors live and operations run. A clone is the same device.
#[derive(Clone)]
pub enum Device {
    /// Threads of this machine; tensors are plain memory.
    Cpu(Arc<Cpu>),
    /// An NVIDIA GPU.
    #[cfg(feature = "gpu")]
    Cuda(Arc<Cuda>),
}

/// Hands an operation to the device.
macro_rules! dispatch {
    ($device:ident, $op:ident($($argument:expr),*)) => {
        match $device {
            Self::Cpu(device) => cpu::$op(device, $($argument),*),
            #[cfg(feature = "gpu")]
            Self::Cuda(device) => cuda::$op(device, $($argument),*),
        }
    };
}

/// Bytes of a device's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Taken by nobody.
    pub free: u64,
    /// All there is.
    pub total: u64,
}

/// One product of a [`Device::linear`] call: `out = input * weight^T + bias`, or `out += …` where it adds.
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: &'a Matrix,
    /// `[outputs]`
    pub bias: Option<&'a Tensor>,
    /// `[T, outputs]`
    pub out: &'a mut Tensor,
}

/// A low-rank addition to some rows of a product: `out[rows] += scale * (input[rows] * a^T) * b^T`.
pub struct LowRank<'a> {
    /// Rows of `input` and `out`.
    pub rows: Range<usize>,
    /// `[rank, inputs]`
    pub a: &'a Matrix,
    /// `[outputs, rank]`
    pub b: &'a Matrix,
    /// Multiplies what is added.
    pub scale: f32,
    /// `[T, inputs]`
    pub input: &'a Tensor,
    /// `[T, outputs]`
    pub out: &'a mut Tensor,
}

/// Parameters of a norm over rows of `width` elements; a tensor's row may hold several.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// Which norm.
    pub kind: NormKind,
    /// Elements that are normalized together.
    pub width: usize,
    /// `[width]`, or several of them that take turns, row by row; `None` is all ones.
    pub weight: Option<&'a Tensor>,
    /// Like `weight`, added.
    pub bias: Option<&'a Tensor>,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// Angles of a rotary embedding.
#[derive(Clone, Copy)]
pub struct RopeAngles<'a> {
    /// `[angles, rotary_dim / 2]`
    pub cos: &'a Tensor,
    /// `[angles, rotary_dim / 2]`
    pub sin: &'a Tensor,
    /// `[T]`, row of the table of each token.
    pub rows: &'a Indices,
    /// Rotated elements of each head.
    pub rotary_dim: usize,
    /// The first of them.
    pub start: usize,
    /// How they are paired.
    pub layout: RopeLayout,
}

/// Arguments of [`Device::rope_cache_write`].
pub struct RopeCacheWrite<'a> {
    /// Angles of every token; nothing is rotated without.
    pub angles: Option<RopeAngles<'a>>,
    /// Heads of this layer.
    pub heads: HeadShape,
    /// `[T]`, where each token's key and value go.
    pub slots: &'a Indices,
    /// `[T, heads * head_dim]`, rotated in place.
    pub query: &'a mut Tensor,
    /// `[T, kv_heads * head_dim]`, rotated in place.
    pub key: &'a mut Tensor,
    /// `[T, value width]`; none where the cache keeps keys only.
    pub value: Option<&'a Tensor>,
    /// This layer's cache.
    pub cache: &'a mut LayerKv,
}

/// Arguments of [`Device::attention`].
pub struct Attention<'a> {
    /// Heads of this layer.
    pub heads: HeadShape,
    /// Elements of a value.
    pub value_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// What else happens to the scores.
    pub rules: AttentionRules<'a>,
    /// `[T, heads * head_dim]`
    pub query: &'a Tensor,
    /// This layer's cache. Where it keeps keys only, a value is the beginning of its key.
    pub cache: &'a LayerKv,
    /// The requests; their rows cover `0 .. T` without overlap.
    pub sequences: Sequences<'a>,
    /// What is kept between calls.
    pub scratch: &'a mut AttentionScratch,
    /// `[T, heads * value_dim]`
    pub out: &'a mut Tensor,
}

/// How scores differ from plain causal attention.
#[derive(Clone, Copy, Default)]
pub struct AttentionRules<'a> {
    /// A token sees itself and this many tokens less one before it.
    pub window: Option<usize>,
    /// Scores approach this and no more.
    pub soft_cap: Option<f32>,
    /// `[heads]`, ALiBi.
    pub slopes: Option<&'a Tensor>,
    /// `[heads]`, one more score per head, without a value.
    pub sinks: Option<&'a Tensor>,
}

/// Arguments of [`Device::experts`].
pub struct Experts<'a> {
    /// `[T, hidden]`
    pub input: &'a Tensor,
    /// Which experts each token goes to.
    pub routes: &'a Routes,
    /// All experts of the layer.
    pub experts: &'a ExpertSet,
    /// What happens inside of them.
    pub gating: Gating,
    /// Buffers that are kept.
    pub scratch: &'a mut ExpertScratch,
    /// `[T, hidden]`
    pub out: &'a mut Tensor,
}

/// Arguments of [`Device::copy_parts`]: `to[t, part, into ..] = from[t, part, out_of ..]`.
pub struct CopyParts<'a> {
    /// Equal parts of a row, in both tensors.
    pub parts: usize,
    /// `[T, parts * any width]`
    pub from: &'a Tensor,
    /// Where it begins in each part.
    pub out_of: usize,
    /// `[T, parts * any width]`
    pub to: &'a mut Tensor,
    /// Where it goes in each part.
    pub into: usize,
    /// Elements of each part.
    pub width: usize,
}

/// From scores to experts and their weights.
#[derive(Clone, Copy)]
pub struct Routing<'a> {
    /// Number of experts.
    pub experts: usize,
    /// Experts per token.
    pub chosen: usize,
    /// How scores become probabilities.
    pub score: Score,
    /// Groups of experts, of which only the best are looked into.
    pub groups: Option<Groups>,
    /// `[experts]`, added to the probabilities for choosing, and for choosing only.
    pub correction: Option<&'a Tensor>,
    /// What the chosen experts' weights are divided by.
    pub normalize: Normalize,
    /// Multiplies the weights.
    pub scale: f32,
}

impl Device {
    /// The CPU, with `threads` threads of its own.
    pub fn cpu(threads: NonZeroUsize) -> Result<Self, OpError> {
        Ok(Self::Cpu(Arc::new(Cpu::new(threads)?)))
    }

    /// Runs a sequence of operations where each of them starts at the least cost. They may as well be called outside.
    pub fn run<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        match self {
            Self::Cpu(cpu) => cpu.install(pass),
            #[cfg(feature = "gpu")]
            Self::Cuda(_) => pass(),
        }
    }

    /// What connects this device with those of the other ranks, which all call this. Errors when they do not come.
    pub fn link(&self, group: &Arc<LocalGroup>) -> Result<Link, OpError> {
        dispatch!(self, link(group))
    }

    /// A tensor of zeros for what flows through the layers, `[rows, width]`.
    ///
    /// Errors when the device clearly has no room for it. Where the system allows, memory is taken on first use.
    pub fn zeros(&self, rows: usize, width: usize) -> Result<Tensor, OpError> {
        dispatch!(self, zeros(rows, width))
    }

    /// A tensor of zeros for the stream that layers add to, `[rows, width]`: f32 on every device.
    ///
    /// Errors as [`zeros`](Self::zeros) does.
    pub fn zeros_stream(&self, rows: usize, width: usize) -> Result<Tensor, OpError> {
        dispatch!(self, zeros_f32(rows, width))
    }

    /// A tensor of zeros in f32, for scores and logits, `[rows, width]`.
    ///
    /// Errors as [`zeros`](Self::zeros) does.
    pub fn zeros_f32(&self, rows: usize, width: usize) -> Result<Tensor, OpError> {
        dispatch!(self, zeros_f32(rows, width))
    }

    /// A tensor of zeros in the type of the key/value cache, `[rows, width]`.
    ///
    /// Errors as [`zeros`](Self::zeros) does.
    pub fn zeros_cache(&self, rows: usize, width: usize) -> Result<Tensor, OpError> {
        dispatch!(self, zeros_cache(rows, width))
    }

    /// These elements on the device as f32, `[elements / width, width]`.
    ///
    /// Errors when `width` does not divide their number, or the device has no room for them.
    pub fn upload(&self, elements: Vec<f32>, width: usize) -> Result<Tensor, OpError> {
        dispatch!(self, upload(elements, width))
    }

    /// A weight where the operations find it: on a CPU where it lies already, on a GPU in its memory, in the model's type.
    ///
    /// Errors when the device has no room for it.
    pub fn place(&self, weight: Weight) -> Result<Matrix, OpError> {
        dispatch!(self, place(weight))
    }

    /// The experts of a layer.
    ///
    /// Errors when the device has no room for what it needs to know of them.
    pub fn expert_set(&self, experts: Vec<Expert>) -> Result<ExpertSet, OpError> {
        dispatch!(self, expert_set(experts))
    }

    /// Returns when all weights are where they were placed; those of a CPU, which lie in `files`, are then in memory.
    /// `report` is told how far that has come.
    ///
    /// Errors when a file cannot be read, or the device has failed.
    pub fn settle(&self, files: &[FileRange], report: impl FnMut(Progress)) -> Result<(), LayerError> {
        match self {
            Self::Cpu(_) => {
                let ranges = files.iter().map(|mapped| (mapped.file.clone(), mapped.range.clone()));
                Ok(prefetch(&ranges.collect::<Vec<_>>(), report)?)
            }
            #[cfg(feature = "gpu")]
            Self::Cuda(device) => Ok(cuda::settle(device)?),
        }
    }

    /// Room for ids, positions or slots of a step.
    pub fn indices(&self) -> Indices {
        dispatch!(self, indices())
    }

    /// Room for the requests of a step. Errors when the device has none.
    pub fn sequences(&self) -> Result<SequenceBuffer, OpError> {
        dispatch!(self, sequences())
    }

    /// What attention keeps. Errors when the device has no room for it.
    pub fn attention_scratch(&self) -> Result<AttentionScratch, OpError> {
        dispatch!(self, attention_scratch())
    }

    /// Routes of no tokens. Errors when the device has no room for them.
    pub fn routes(&self) -> Result<Routes, OpError> {
        dispatch!(self, routes())
    }

    /// What a mixture of experts keeps. Errors when the device has no room for it.
    pub fn expert_scratch(&self) -> Result<ExpertScratch, OpError> {
        dispatch!(self, expert_scratch())
    }

    /// What choosing tokens keeps.
    pub fn sampling_state(&self) -> SamplingState {
        dispatch!(self, sampling_state())
    }

    /// Bytes of an element of the key/value cache.
    pub fn cache_element_bytes(&self) -> usize {
        dispatch!(self, cache_element_bytes())
    }

    /// How much memory the device has to itself; nothing where that is the machine's. Errors when the device has failed.
    pub fn memory(&self) -> Result<Option<DeviceMemory>, OpError> {
        dispatch!(self, memory())
    }

    /// Tokens of the largest step that a start may well compute, to prove that there is memory for it.
    pub fn rehearsal_tokens(&self) -> usize {
        dispatch!(self, rehearsal_tokens())
    }

    /// What the contract calls this kind of device.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
            #[cfg(feature = "gpu")]
            Self::Cuda(_) => "cuda",
        }
    }

    /// Whether weights are converted when they are placed, so that nobody needs to do it before.
    pub fn converts(&self) -> bool {
        !matches!(self, Self::Cpu(_))
    }

    /// The type that weights have here which the checkpoint stores in `stored`.
    pub fn weight_dtype(&self, stored: DType) -> DType {
        dispatch!(self, weight_dtype(stored))
    }

    /// `out[t] = table[ids[t] - first]`, and zeros for ids that the table does not have; `out`: `[T, width]`.
    pub fn embedding(
        &self,
        table: &Matrix,
        first: u32,
        ids: &Indices,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        dispatch!(self, embedding(table, first, ids, out))
    }

    /// `out[t] += table[ids[t]]`; `out`: `[T, width]`.
    pub fn add_embedding(&self, table: &Matrix, ids: &Indices, out: &mut Tensor) -> Result<(), OpError> {
        dispatch!(self, add_embedding(table, ids, out))
    }

    /// Products of one input `[T, inputs]` with several weights: they share the reading of the input, and the threads.
    pub fn linear<const N: usize>(&self, input: &Tensor, products: [Product<'_>; N]) -> Result<(), OpError> {
        dispatch!(self, linear(input, products))
    }

    /// Each head's part of the input with its own rows of the weight. `input`: `[T, heads * inputs]`,
    /// `weight`: `[heads * outputs, inputs]`, `out`: `[T, heads * outputs]`.
    pub fn linear_per_head(
        &self,
        heads: usize,
        input: &Tensor,
        weight: &Matrix,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        dispatch!(self, linear_per_head(heads, input, weight, out))
    }

    /// Adds a low-rank product to some rows.
    pub fn add_low_rank(&self, args: LowRank<'_>) -> Result<(), OpError> {
        dispatch!(self, add_low_rank(args))
    }

    /// `out[t] += bias` for some rows; `bias`: `[width]`.
    pub fn add_bias(&self, rows: Range<usize>, bias: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        dispatch!(self, add_bias(rows, bias, out))
    }

    /// `out = norm(x)`, row by row.
    pub fn norm(&self, x: &Tensor, norm: Norm<'_>, out: &mut Tensor) -> Result<(), OpError> {
        dispatch!(self, norm(x, norm, out))
    }

    /// `x = norm(x)`, row by row.
    pub fn norm_in_place(&self, x: &mut Tensor, norm: Norm<'_>) -> Result<(), OpError> {
        dispatch!(self, norm_in_place(x, norm))
    }

    /// `residual += delta`, then `out = norm(residual)`, row by row.
    pub fn add_norm(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_>,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        dispatch!(self, add_norm(residual, delta, norm, out))
    }

    /// Rotates queries and keys in place and stores keys and values in the cache.
    pub fn rope_cache_write(&self, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
        dispatch!(self, rope_cache_write(args))
    }

    /// Causal attention: each token over the cached keys and values of its own sequence, up to its own position.
    pub fn attention(&self, args: Attention<'_>) -> Result<(), OpError> {
        dispatch!(self, attention(args))
    }

    /// `x = activation(x)`, element by element.
    pub fn activate(&self, activation: Activation, x: &mut Tensor) -> Result<(), OpError> {
        dispatch!(self, activate(activation, x))
    }

    /// `gate = gating(gate) * up`, element by element.
    pub fn gated(&self, gating: Gating, gate: &mut Tensor, up: &Tensor) -> Result<(), OpError> {
        dispatch!(self, gated(gating, gate, up))
    }

    /// `x *= factor`.
    pub fn scale(&self, x: &mut Tensor, factor: f32) -> Result<(), OpError> {
        dispatch!(self, scale(x, factor))
    }

    /// `x[t] *= sigmoid(gate[t])`; `gate`: `[T, 1]`.
    pub fn scale_rows(&self, x: &mut Tensor, gate: &Tensor) -> Result<(), OpError> {
        dispatch!(self, scale_rows(x, gate))
    }

    /// `x += delta`.
    pub fn add(&self, x: &mut Tensor, delta: &Tensor) -> Result<(), OpError> {
        dispatch!(self, add(x, delta))
    }

    /// `stream = x`; what `x` holds afterwards is unspecified.
    pub fn enter_stream(&self, x: &mut Tensor, stream: &mut Tensor) -> Result<(), OpError> {
        dispatch!(self, enter_stream(x, stream))
    }

    /// The stream as the layers' type: itself where that is f32, else what is written to `x`.
    pub fn from_stream<'a>(&self, stream: &'a Tensor, x: &'a mut Tensor) -> Result<&'a Tensor, OpError> {
        dispatch!(self, from_stream(stream, x))
    }

    /// Keeps every element between `-limit` and `limit`.
    pub fn clamp(&self, x: &mut Tensor, limit: f32) -> Result<(), OpError> {
        dispatch!(self, clamp(x, limit))
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn soft_cap(&self, x: &mut Tensor, cap: f32) -> Result<(), OpError> {
        dispatch!(self, soft_cap(x, cap))
    }

    /// Which experts each token goes to, from its scores `[T, experts]`.
    pub fn route(&self, scores: &Tensor, routing: &Routing<'_>, routes: &mut Routes) -> Result<(), OpError> {
        dispatch!(self, route(scores, routing, routes))
    }

    /// Each token's experts, weighted and summed.
    pub fn experts(&self, args: Experts<'_>) -> Result<(), OpError> {
        dispatch!(self, experts(args))
    }

    /// Copies some elements of every part of every row.
    pub fn copy_parts(&self, args: CopyParts<'_>) -> Result<(), OpError> {
        dispatch!(self, copy_parts(args))
    }

    /// `out[r] = x[rows[r]]`; `out`: `[R, width]`.
    pub fn select_rows(&self, x: &Tensor, rows: &Indices, out: &mut Tensor) -> Result<(), OpError> {
        dispatch!(self, select_rows(x, rows, out))
    }

    /// The natural logarithm of the probability of each of `ids` in its row `at` of raw logits.
    pub fn row_logprobs(
        &self,
        state: &mut SamplingState,
        logits: &Tensor,
        at: &[u32],
        ids: &[u32],
    ) -> Result<Vec<f32>, OpError> {
        dispatch!(self, row_logprobs(state, logits, at, ids))
    }

    /// Chooses a token for each pick, in order; none where the logits are no distribution. The rows of `logits` that take part
    /// may be changed.
    pub fn choose(
        &self,
        state: &mut SamplingState,
        logits: &mut Tensor,
        picks: &mut [Pick<'_>],
    ) -> Result<Vec<Option<Choice>>, OpError> {
        dispatch!(self, choose(state, logits, picks))
    }
}
