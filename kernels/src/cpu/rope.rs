use super::Cpu;
use crate::error::{check_indices, check_length, check_rows};
use crate::{HeadShape, OpError, RopeLayout, RopeTable};

const OP: &str = "rope_cache_write";

/// Inputs of [`rope_cache_write`].
#[derive(Debug)]
pub struct RopeCacheWrite<'a> {
    /// What to rotate, and by how much; nothing is rotated without it.
    pub table: Option<RopeTable<'a>>,
    /// Heads.
    pub shape: HeadShape,
    /// `[T]`, row of the table of each token: its position in its own sequence, or a row that was made for it. Not read
    /// without a table.
    pub angles: &'a [u32],
    /// `[T]`, where each token's key and value go.
    pub slots: &'a [u32],
    /// `[T, heads, head_dim]`, rotated in place.
    pub query: &'a mut [f32],
    /// `[T, kv_heads, head_dim]`, rotated in place.
    pub key: &'a mut [f32],
    /// `[T, value_width]`
    pub value: &'a [f32],
    /// Elements of one token's values, of all heads; zero where the cache keeps keys only.
    pub value_width: usize,
    /// `[slots, kv_heads, head_dim]`, this layer's cached keys.
    pub keys: &'a mut [f32],
    /// `[slots, value_width]`, this layer's cached values.
    pub values: &'a mut [f32],
}

/// Rotates queries and keys in place and stores keys and values in the cache.
///
/// Where a slot is named twice, the last token's key and value stay. Errors when `rotary_dim` is odd, the rotated
/// elements are not within a head, the table lacks an angle, or a slot is not in the cache.
pub fn rope_cache_write(cpu: &Cpu, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    check(&args)?;
    let RopeCacheWrite { table, shape, angles, slots, query, key, value, value_width, keys, values } = args;

    if let Some(table) = table {
        rotate_all(cpu, &table, angles, query, shape.query_width(), shape.head_dim);
        rotate_all(cpu, &table, angles, key, shape.kv_width(), shape.head_dim);
    }
    store(slots, key, shape.kv_width(), keys);
    store(slots, value, value_width, values);
    Ok(())
}

fn check(args: &RopeCacheWrite<'_>) -> Result<(), OpError> {
    let RopeCacheWrite { table, shape, angles, slots, query, key, value, value_width, keys, values } = args;
    shape.check(OP)?;
    let tokens = slots.len();
    if let Some(table) = table {
        check_table(table, shape.head_dim, angles)?;
        check_length(OP, "angles", tokens, angles.len())?;
    }
    check_length(OP, "query", tokens.saturating_mul(shape.query_width()), query.len())?;
    check_length(OP, "key", tokens.saturating_mul(shape.kv_width()), key.len())?;
    check_length(OP, "value", tokens.saturating_mul(*value_width), value.len())?;
    let cache_slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    check_length(OP, "values", cache_slots.saturating_mul(*value_width), values.len())?;
    check_indices(OP, "slot", slots, cache_slots)
}

fn check_table(table: &RopeTable<'_>, head_dim: usize, angles: &[u32]) -> Result<(), OpError> {
    let RopeTable { cos, sin, rotary_dim, start, .. } = *table;
    if rotary_dim % 2 != 0 || start.saturating_add(rotary_dim) > head_dim {
        let reason = format!("{rotary_dim} rotated elements from {start} on, in a head of {head_dim}");
        return Err(OpError::unsupported(OP, reason));
    }
    check_length(OP, "sin", cos.len(), sin.len())?;
    if rotary_dim > 0 {
        let rows = check_rows(OP, "cos", rotary_dim / 2, cos.len())?;
        check_indices(OP, "angle", angles, rows)?;
    }
    Ok(())
}

/// Copies row `t` to `cache[slots[t]]`; `rows`: `[T, width]`.
fn store(slots: &[u32], rows: &[f32], width: usize, cache: &mut [f32]) {
    for (token, &slot) in slots.iter().enumerate() {
        cache[slot as usize * width..][..width].copy_from_slice(&rows[token * width..][..width]);
    }
}

/// Rotates every head of every token. `x`: `[T, width]`.
fn rotate_all(
    cpu: &Cpu,
    table: &RopeTable<'_>,
    angles: &[u32],
    x: &mut [f32],
    width: usize,
    head_dim: usize,
) {
    /// Per element: a rotation is four products for two elements, read and written in place.
    const WORK: usize = 4;
    if table.rotary_dim == 0 {
        return;
    }
    let work = x.len() / head_dim * table.rotary_dim * WORK;
    let tokens = angles.len().div_ceil(cpu.pieces(work)).max(1);
    let pieces: Vec<_> = x.chunks_mut(tokens * width).zip(angles.chunks(tokens)).collect();
    let half = table.rotary_dim / 2;
    let rotated = table.start..table.start + table.rotary_dim;
    cpu.for_each(work, pieces, |(x, angles)| {
        for (token, &angle) in x.chunks_exact_mut(width).zip(angles) {
            let angles = angle as usize * half..(angle as usize + 1) * half;
            let (cos, sin) = (&table.cos[angles.clone()], &table.sin[angles]);
            for head in token.chunks_exact_mut(head_dim) {
                rotate(table.layout, cos, sin, &mut head[rotated.clone()]);
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
