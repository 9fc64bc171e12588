use std::ops::Range;

use crate::OpError;

/// Heads of an attention layer, on this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads; query head `h` reads key/value head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements per query and per key.
    pub head_dim: usize,
}

impl HeadShape {
    /// Elements of one token's queries.
    pub fn query_width(&self) -> usize {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Elements of one token's keys; of its values too, where they are as long.
    pub fn kv_width(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim)
    }

    /// No part may be zero, and each key/value head serves the same number of query heads.
    pub(crate) fn check(&self, op: &'static str) -> Result<(), OpError> {
        let Self { heads, kv_heads, head_dim } = *self;
        if heads == 0 || kv_heads == 0 || head_dim == 0 {
            let reason = format!("{heads} heads over {kv_heads} key/value heads of {head_dim} elements");
            return Err(OpError::unsupported(op, reason));
        }
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{heads} heads cannot be shared out among {kv_heads} key/value heads");
            return Err(OpError::unsupported(op, reason));
        }
        Ok(())
    }
}

/// The tokens of one request in a flattened batch, and where its past lies in the cache.
#[derive(Clone, Debug)]
pub struct Sequence<'a> {
    /// Its rows of the batch.
    pub rows: Range<usize>,
    /// Position of its first row, which is the number of its tokens already in the cache.
    pub start: usize,
    /// Cache slot of each position `0 .. start + rows.len()`; longer is fine.
    pub slots: &'a [u32],
}

/// Which elements of a head form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Element `j` with `j + rotary_dim / 2`, as in Llama checkpoints.
    HalfSplit,
    /// Element `2 j` with `2 j + 1`, as in GPT-J checkpoints.
    Interleaved,
}

/// Cosine and sine of every angle a rotary embedding needs.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable<'a> {
    /// `[angles, rotary_dim / 2]`
    pub cos: &'a [f32],
    /// `[angles, rotary_dim / 2]`
    pub sin: &'a [f32],
    /// Rotated elements of each head; the others pass.
    pub rotary_dim: usize,
    /// The first of them within each head.
    pub start: usize,
    /// How they are paired.
    pub layout: RopeLayout,
}
