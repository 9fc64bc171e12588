use super::Cpu;
use crate::error::{check_indices, check_length, check_rows};
use crate::{HeadShape, OpError, RopeLayout, RopeTable};

const OP: &str = "rope_cache_write";

/// Inputs of [`rope_cache_write`].
#[derive(Debug)]
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
///
/// Where a slot is named twice, the last token's key and value stay. Errors when `rotary_dim` is odd or larger than a
/// head, a position has no angle, or a slot is not in the cache.
pub fn rope_cache_write(cpu: &Cpu, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    check(&args)?;
    let RopeCacheWrite { table, shape, positions, slots, query, key, value, keys, values } = args;

    rotate_all(cpu, &table, positions, query, shape.query_width(), shape.head_dim);
    rotate_all(cpu, &table, positions, key, shape.kv_width(), shape.head_dim);

    let width = shape.kv_width();
    for (token, &slot) in slots.iter().enumerate() {
        let (token, slot) = (token * width, slot as usize * width);
        keys[slot..][..width].copy_from_slice(&key[token..][..width]);
        values[slot..][..width].copy_from_slice(&value[token..][..width]);
    }
    Ok(())
}

fn check(args: &RopeCacheWrite<'_>) -> Result<(), OpError> {
    let RopeCacheWrite { table, shape, positions, slots, query, key, value, keys, values } = args;
    shape.check(OP)?;
    let rotary_dim = table.rotary_dim;
    if rotary_dim % 2 != 0 || rotary_dim > shape.head_dim {
        let reason = format!("rotary_dim {rotary_dim} is odd or larger than head_dim {}", shape.head_dim);
        return Err(OpError::unsupported(OP, reason));
    }
    let tokens = positions.len();
    check_length(OP, "slots", tokens, slots.len())?;
    check_length(OP, "query", tokens.saturating_mul(shape.query_width()), query.len())?;
    check_length(OP, "key", tokens.saturating_mul(shape.kv_width()), key.len())?;
    check_length(OP, "value", key.len(), value.len())?;
    check_length(OP, "sin", table.cos.len(), table.sin.len())?;
    if rotary_dim > 0 {
        let angles = check_rows(OP, "cos", rotary_dim / 2, table.cos.len())?;
        check_indices(OP, "position", positions, angles)?;
    }
    let cache_slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    check_length(OP, "values", keys.len(), values.len())?;
    check_indices(OP, "slot", slots, cache_slots)
}

/// Rotates every head of every token. `x`: `[T, width]`.
fn rotate_all(
    cpu: &Cpu,
    table: &RopeTable<'_>,
    positions: &[u32],
    x: &mut [f32],
    width: usize,
    head_dim: usize,
) {
    /// Per element: a rotation is four products for two elements, read and written in place.
    const WORK: usize = 4;
    if table.rotary_dim == 0 {
        return;
    }
    let work = x.len() * WORK;
    let tokens = positions.len().div_ceil(cpu.pieces(work)).max(1);
    let pieces: Vec<_> = x.chunks_mut(tokens * width).zip(positions.chunks(tokens)).collect();
    let half = table.rotary_dim / 2;
    cpu.for_each(work, pieces, |(x, positions)| {
        for (token, &position) in x.chunks_exact_mut(width).zip(positions) {
            let angles = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&table.cos[angles.clone()], &table.sin[angles]);
            for head in token.chunks_exact_mut(head_dim) {
                rotate(table.layout, cos, sin, &mut head[..table.rotary_dim]);
            }
        }
    });
}

/// Rotates the pairs of one head by one angle each.
fn rotate(layout: RopeLayout, cos: &[f32], sin: &[f32], head: &mut [f32]) {
    let angles = cos.iter().zip(sin);
    match layout {
        RopeLayout::HalfSplit => {
            let (first, second) = head.split_at_mut(cos.len());
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
        RopeLayout::Interleaved => {
            for ([a, b], (cos, sin)) in head.as_chunks_mut().0.iter_mut().zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
