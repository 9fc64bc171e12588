//! The CPU versions.

use std::num::NonZeroUsize;

use crate::{HeadShape, Matrix, OpError, RopeTable, Sequence};

/// The threads and the instruction set that operations run on.
pub struct Cpu {}

impl Cpu {
    /// Starts `threads` threads and picks the best instruction set this machine has.
    pub fn new(_threads: NonZeroUsize) -> Result<Self, OpError> {
        unimplemented!()
    }
}

/// One product of a [`linear`] call: `out[t, o] = sum over i of input[t, i] * weight[o, i] + bias[o]`.
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: Matrix<'a>,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// `[tokens, outputs]`
    pub out: &'a mut [f32],
}

/// `out[t] = table[ids[t]]` as f32; `table`: `[vocabulary, width]`, `out`: `[T, width]`.
pub fn embedding(_cpu: &Cpu, _table: &Matrix<'_>, _ids: &[u32], _out: &mut [f32]) -> Result<(), OpError> {
    unimplemented!()
}

/// Products of one input with several weights, in one pass over the threads. `input`: `[T, inputs]`.
pub fn linear(_cpu: &Cpu, _input: &[f32], _products: &mut [Product<'_>]) -> Result<(), OpError> {
    unimplemented!()
}

/// `out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight`; `x`, `out`: `[T, width]`, `weight`: `[width]`.
pub fn rms_norm(_cpu: &Cpu, _x: &[f32], _weight: &[f32], _eps: f32, _out: &mut [f32]) -> Result<(), OpError> {
    unimplemented!()
}

/// `residual += delta`, then `out = rms_norm(residual)`.
pub fn add_rms_norm(
    _cpu: &Cpu,
    _residual: &mut [f32],
    _delta: &[f32],
    _weight: &[f32],
    _eps: f32,
    _out: &mut [f32],
) -> Result<(), OpError> {
    unimplemented!()
}

/// Inputs of [`rope_cache_write`].
pub struct RopeCacheWrite<'a> {
    /// Angles.
    pub table: RopeTable<'a>,
    /// Heads.
    pub shape: HeadShape,
    /// `[T]`, position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[T]`, where each token's key and value go.
    pub slots: &'a [u32],
    /// `[T, heads, head_dim]`, rotated in place.
    pub query: &'a mut [f32],
    /// `[T, kv_heads, head_dim]`, rotated in place.
    pub key: &'a mut [f32],
    /// `[T, kv_heads, head_dim]`
    pub value: &'a [f32],
    /// `[slots, kv_heads, head_dim]`, this layer's cached keys.
    pub keys: &'a mut [f32],
    /// `[slots, kv_heads, head_dim]`, this layer's cached values.
    pub values: &'a mut [f32],
}

/// Rotates queries and keys in place and stores keys and values in the cache.
pub fn rope_cache_write(_cpu: &Cpu, _args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    unimplemented!()
}

/// Inputs of [`attention`].
pub struct Attention<'a> {
    /// Heads.
    pub shape: HeadShape,
    /// Multiplies the scores; usually `head_dim^-0.5`.
    pub scale: f32,
    /// `[T, heads, head_dim]`
    pub query: &'a [f32],
    /// `[slots, kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// `[slots, kv_heads, head_dim]`
    pub values: &'a [f32],
    /// The requests of the batch; their rows cover `0 .. T` without overlap.
    pub sequences: &'a [Sequence<'a>],
    /// `[T, heads, head_dim]`
    pub out: &'a mut [f32],
}

/// Causal attention: each token over the cached keys and values of its own sequence, up to and including its position.
pub fn attention(_cpu: &Cpu, _args: Attention<'_>) -> Result<(), OpError> {
    unimplemented!()
}

/// `gate = silu(gate) * up`, element by element.
pub fn gated_silu(_cpu: &Cpu, _gate: &mut [f32], _up: &[f32]) -> Result<(), OpError> {
    unimplemented!()
}

/// `x += delta`.
pub fn add(_cpu: &Cpu, _x: &mut [f32], _delta: &[f32]) -> Result<(), OpError> {
    unimplemented!()
}
