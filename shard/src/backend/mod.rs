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
use std::sync::Arc;

use kernels::cpu::Cpu;
use kernels::{HeadShape, OpError, RopeLayout, Sequence};

pub use tensor::Tensor;

use crate::weights::Weight;

/// Where tensors live and operations run. A clone is the same device.
#[derive(Clone)]
pub enum Device {
    /// Threads of this machine; tensors are plain memory.
    Cpu(Arc<Cpu>),
}

/// One product of a [`Device::linear`] call: `out = input * weight^T + bias`.
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: &'a Weight,
    /// `[outputs]`
    pub bias: Option<&'a Tensor>,
    /// `[T, outputs]`
    pub out: &'a mut Tensor,
}

/// Parameters of a root-mean-square norm.
#[derive(Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[width]`
    pub weight: &'a Tensor,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// Angles of a rotary embedding.
#[derive(Clone, Copy)]
pub struct RopeAngles<'a> {
    /// `[positions, rotary_dim / 2]`
    pub cos: &'a Tensor,
    /// `[positions, rotary_dim / 2]`
    pub sin: &'a Tensor,
    /// Rotated elements at the start of each head.
    pub rotary_dim: usize,
    /// How they are paired.
    pub layout: RopeLayout,
}

/// Arguments of [`Device::rope_cache_write`].
pub struct RopeCacheWrite<'a> {
    /// Angles of every position that occurs.
    pub angles: RopeAngles<'a>,
    /// Heads of this layer.
    pub heads: HeadShape,
    /// `[T]`, position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[T]`, where each token's key and value go.
    pub slots: &'a [u32],
    /// `[T, heads * head_dim]`, rotated in place.
    pub query: &'a mut Tensor,
    /// `[T, kv_heads * head_dim]`, rotated in place.
    pub key: &'a mut Tensor,
    /// `[T, kv_heads * head_dim]`
    pub value: &'a Tensor,
    /// `[slots, kv_heads * head_dim]`, this layer's cached keys.
    pub keys: &'a mut Tensor,
    /// `[slots, kv_heads * head_dim]`, this layer's cached values.
    pub values: &'a mut Tensor,
}

/// Arguments of [`Device::attention`].
pub struct Attention<'a> {
    /// Heads of this layer.
    pub heads: HeadShape,
    /// Multiplies the scores.
    pub scale: f32,
    /// `[T, heads * head_dim]`
    pub query: &'a Tensor,
    /// `[slots, kv_heads * head_dim]`
    pub keys: &'a Tensor,
    /// `[slots, kv_heads * head_dim]`
    pub values: &'a Tensor,
    /// The requests; their rows cover `0 .. T` without overlap.
    pub sequences: &'a [Sequence<'a>],
    /// `[T, heads * head_dim]`
    pub out: &'a mut Tensor,
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

    /// `out[t] = table[ids[t]]`; `out`: `[T, width]`.
    pub fn embedding(&self, table: &Weight, ids: &[u32], out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::embedding(cpu, table, ids, out),
        }
    }

    /// Products of one input `[T, inputs]` with several weights: they share the reading of the input, and the threads.
    pub fn linear<const N: usize>(&self, input: &Tensor, products: [Product<'_>; N]) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::linear(cpu, input, products),
        }
    }

    /// `out = norm(x)`, row by row.
    pub fn rms_norm(&self, x: &Tensor, norm: RmsNorm<'_>, out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::rms_norm(cpu, x, norm, out),
        }
    }

    /// `residual += delta`, then `out = norm(residual)`, row by row.
    pub fn add_rms_norm(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: RmsNorm<'_>,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::add_rms_norm(cpu, residual, delta, norm, out),
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

    /// `gate = silu(gate) * up`, element by element.
    pub fn gated_silu(&self, gate: &mut Tensor, up: &Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(cpu) => cpu::gated_silu(cpu, gate, up),
        }
    }

    /// `out[r] = x[rows[r]]`; `out`: `[R, width]`.
    pub fn select_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Cpu(_) => cpu::select_rows(x, rows, out),
        }
    }
}
