//! The device, its tensors, and the operations that layers call. Everything above is written against this list and
//! never asks which device it runs on.
//!
//! - `tensor.rs`: f32 tensors on the device
//! - `cpu.rs`: the operations on CPUs
//!
//! Operations are asynchronous where the device is: their errors are wrong arguments, found before anything runs.

mod cpu;
mod tensor;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use kernels::cpu::Cpu;
use kernels::{Activation, Gating, HeadShape, NormKind, OpError, RopeLayout, Routes, Routing, Sequence};

pub use kernels::cpu::ExpertScratch;
pub use tensor::Tensor;

use crate::cache::LayerKv;
use crate::weights::Weight;

/// Where tensors live and operations run. A clone is the same device.
#[derive(Clone)]
pub enum Device {
    /// Threads of this machine; tensors are plain memory.
    Cpu(Arc<Cpu>),
}

/// One product of a [`Device::linear`] call: `out = input * weight^T + bias`, or `out += …` where it adds.
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: &'a Weight,
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
    pub a: &'a Weight,
    /// `[outputs, rank]`
    pub b: &'a Weight,
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
    pub rows: &'a [u32],
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
    pub slots: &'a [u32],
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
    pub sequences: &'a [Sequence<'a>],
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
    pub experts: &'a [Expert<'a>],
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

/// An expert's weights.
pub struct Expert<'a> {
    /// Into the gate.
    pub gate: Projection<'a>,
    /// Into what is gated.
    pub up: Projection<'a>,
    /// Out.
    pub down: Projection<'a>,
}

/// A weight with its bias.
pub struct Projection<'a> {
    /// `[outputs, inputs]`
    pub weight: &'a Weight,
    /// `[outputs]`
    pub bias: Option<&'a Tensor>,
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
        }
    }

    /// A tensor of zeros, `[rows, width]`.
    ///
    /// Errors when the device clearly has no room for it. Where the system allows, memory is taken on first use.
    pub fn zeros(&self, rows: usize, width: usize) -> Result<Tensor, OpError> {
        match self {
            Self::Cpu(_) => Tensor::host_zeros(rows, width),
        }
    }

    /// These elements on the device, `[elements / width, width]`.
    ///
    /// Errors when `width` does not divide their number.
    pub fn upload(&self, elements: Vec<f32>, width: usize) -> Result<Tensor, OpError> {
        match self {
            Self::Cpu(_) => Tensor::from_host(elements, width),
        }
    }

    /// `out[t] = table[ids[t] - first]`, and zeros for ids that the table does not have; `out`: `[T, width]`.
    pub fn embedding(
        &self,
        table: &Weight,
        first: u32,
        ids: &[u32],
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::embedding(cpu, table, first, ids, out),
        }
    }

    /// `out[t] += table[ids[t]]`; `out`: `[T, width]`.
    pub fn add_embedding(&self, table: &Weight, ids: &[u32], out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::add_embedding(cpu, table, ids, out),
        }
    }

    /// Products of one input `[T, inputs]` with several weights: they share the reading of the input, and the threads.
    pub fn linear<const N: usize>(&self, input: &Tensor, products: [Product<'_>; N]) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::linear(cpu, input, products),
        }
    }

    /// Each head's part of the input with its own rows of the weight. `input`: `[T, heads * inputs]`,
    /// `weight`: `[heads * outputs, inputs]`, `out`: `[T, heads * outputs]`.
    pub fn linear_per_head(
        &self,
        heads: usize,
        input: &Tensor,
        weight: &Weight,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::linear_per_head(cpu, heads, input, weight, out),
        }
    }

    /// Adds a low-rank product to some rows.
    pub fn add_low_rank(&self, args: LowRank<'_>) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::add_low_rank(cpu, args),
        }
    }

    /// `out[t] += bias` for some rows; `bias`: `[width]`.
    pub fn add_bias(&self, rows: Range<usize>, bias: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::add_bias(cpu, rows, bias, out),
        }
    }

    /// `out = norm(x)`, row by row.
    pub fn norm(&self, x: &Tensor, norm: Norm<'_>, out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::norm(cpu, x, norm, out),
        }
    }

    /// `x = norm(x)`, row by row.
    pub fn norm_in_place(&self, x: &mut Tensor, norm: Norm<'_>) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::norm_in_place(cpu, x, norm),
        }
    }

    /// `residual += delta`, then `out = norm(residual)`, row by row.
    pub fn add_norm(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_>,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::add_norm(cpu, residual, delta, norm, out),
        }
    }

    /// Rotates queries and keys in place and stores keys and values in the cache.
    pub fn rope_cache_write(&self, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::rope_cache_write(cpu, args),
        }
    }

    /// Causal attention: each token over the cached keys and values of its own sequence, up to its own position.
    pub fn attention(&self, args: Attention<'_>) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::attention(cpu, args),
        }
    }

    /// `x = activation(x)`, element by element.
    pub fn activate(&self, activation: Activation, x: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::activate(cpu, activation, x),
        }
    }

    /// `gate = gating(gate) * up`, element by element.
    pub fn gated(&self, gating: Gating, gate: &mut Tensor, up: &Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::gated(cpu, gating, gate, up),
        }
    }

    /// `x *= factor`.
    pub fn scale(&self, x: &mut Tensor, factor: f32) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::scale(cpu, x, factor),
        }
    }

    /// `x[t] *= sigmoid(gate[t])`; `gate`: `[T, 1]`.
    pub fn scale_rows(&self, x: &mut Tensor, gate: &Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::scale_rows(cpu, x, gate),
        }
    }

    /// `x += delta`.
    pub fn add(&self, x: &mut Tensor, delta: &Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::add(cpu, x, delta),
        }
    }

    /// Keeps every element between `-limit` and `limit`.
    pub fn clamp(&self, x: &mut Tensor, limit: f32) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::clamp(cpu, x, limit),
        }
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn soft_cap(&self, x: &mut Tensor, cap: f32) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::soft_cap(cpu, x, cap),
        }
    }

    /// Which experts each token goes to, from its scores `[T, experts]`.
    pub fn route(&self, scores: &Tensor, routing: &Routing<'_>, routes: &mut Routes) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::route(cpu, scores, routing, routes),
        }
    }

    /// Each token's experts, weighted and summed.
    pub fn experts(&self, args: Experts<'_>) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::experts(cpu, args),
        }
    }

    /// Copies some elements of every part of every row.
    pub fn copy_parts(&self, args: CopyParts<'_>) -> Result<(), OpError> {
        match self {
            Self::Cpu(_) => cpu::copy_parts(args),
        }
    }

    /// `out[r] = x[rows[r]]`; `out`: `[R, width]`.
    pub fn select_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(_) => cpu::select_rows(x, rows, out),
        }
    }
}
