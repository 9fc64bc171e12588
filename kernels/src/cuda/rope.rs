//! Rotary position embedding, and the write into the paged cache.

use super::driver::{DevicePtr, Grid, Kernel};
use super::params::{fit, params};
use super::{Element, Gpu, Slice, SliceMut};
use crate::error::{check_length, check_rows};
use crate::{HeadShape, OpError, RopeLayout};

const OP: &str = "rope_cache_write";
const THREADS: usize = 128;

params! {
    struct RopeParams {
        query: DevicePtr,
        key: DevicePtr,
        value: DevicePtr,
        keys: DevicePtr,
        values: DevicePtr,
        cos: DevicePtr,
        sin: DevicePtr,
        angles: DevicePtr,
        slots: DevicePtr,
        angle_rows: u32,
        cache_slots: u32,
        heads: u32,
        kv_heads: u32,
        head_dim: u32,
        value_width: u32,
        rotary_dim: u32,
        start: u32,
        interleaved: u32,
    }
}

/// Cosine and sine of every angle, and which of them each token is rotated by.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable<'a> {
    /// `[any rows, rotary_dim / 2]`, f32.
    pub cos: Slice<'a>,
    /// As many.
    pub sin: Slice<'a>,
    /// `[T]`, u32: each token's row of the table.
    pub angles: Slice<'a>,
    /// Rotated elements of each head; the others pass.
    pub rotary_dim: usize,
    /// The first of them within each head.
    pub start: usize,
    /// How they are paired.
    pub layout: RopeLayout,
}

/// Arguments of [`rope_cache_write`]. Queries, keys and values are of one type: f32, f16 or bf16.
#[derive(Debug)]
pub struct RopeCacheWrite<'a> {
    /// What to rotate, and by how much; nothing is rotated without it.
    pub table: Option<RopeTable<'a>>,
    /// Heads.
    pub shape: HeadShape,
    /// `[T]`, u32: where each token's key and value go.
    pub slots: Slice<'a>,
    /// `[T, heads, head_dim]`, rotated in place.
    pub query: SliceMut<'a>,
    /// `[T, kv_heads, head_dim]`, rotated in place.
    pub key: SliceMut<'a>,
    /// `[T, value_width]`; none where the cache keeps keys only.
    pub value: Option<Slice<'a>>,
    /// Elements of one token's values, of all heads; zero without values.
    pub value_width: usize,
    /// `[slots, kv_heads, head_dim]`, this layer's cached keys: of the same type, E4M3 or E5M2.
    pub keys: SliceMut<'a>,
    /// `[slots, value_width]`, this layer's cached values, of the type of the keys.
    pub values: SliceMut<'a>,
}

/// Rotates queries and keys in place and stores keys and values in the cache. Eight-bit types are rounded to from the
/// rotated f32 values, and hold their largest number where those are larger.
///
/// A token whose slot the cache does not have is not stored: rows that only fill up a batch have such slots. One whose
/// angle the table does not have is not rotated. Where tokens name the same slot, each of its elements is one of theirs.
///
/// Errors when `rotary_dim` is odd, or the rotated elements are not within a head.
/// Source: Su et al. 2021 (RoFormer), section 3.4.2; pairing as in Llama or GPT-J checkpoints.
pub fn rope_cache_write(gpu: &Gpu, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    let kernel = kernel(args.query.element(), args.keys.element())?;
    let params = checked(&args)?;
    let (shape, tokens) = (args.shape, args.slots.len());
    if tokens == 0 {
        return Ok(());
    }
    let rotations = (shape.heads + shape.kv_heads) * (params.rotary_dim as usize / 2);
    let elements = rotations.max(shape.kv_width()).max(args.value_width);
    let grid = Grid::rows(OP, tokens, args.query.element().vectors(elements), THREADS)?;
    // SAFETY: there is a query, a key and a value of this shape for each slot, and the cache has whole slots; slots and
    // angles are compared with their limits.
    unsafe { gpu.launch(OP, kernel, grid, &params) }
}

fn kernel(element: Element, cache: Element) -> Result<Kernel, OpError> {
    let names = match cache {
        Element::E4M3 => ["rope_f32_e4m3", "rope_f16_e4m3", "rope_bf16_e4m3"],
        Element::E5M2 => ["rope_f32_e5m2", "rope_f16_e5m2", "rope_bf16_e5m2"],
        _ if cache == element => ["rope_f32", "rope_f16", "rope_bf16"],
        _ => {
            let reason = format!("a cache of {cache:?} for keys of {element:?}");
            return Err(OpError::unsupported(OP, reason));
        }
    };
    Gpu::pick(OP, element, names.map(|name| Kernel { module: "rope", name }))
}

/// Checks everything that can be checked without a look at the device's memory.
fn checked(args: &RopeCacheWrite<'_>) -> Result<RopeParams, OpError> {
    let RopeCacheWrite { table, shape, slots, query, key, value, value_width, keys, values } = args;
    shape.check(OP)?;
    let (tokens, element) = (slots.len(), query.element());
    slots.check(OP, "slots", Element::U32, tokens)?;
    query.check(OP, "query", element, tokens.saturating_mul(shape.query_width()))?;
    key.check(OP, "key", element, tokens.saturating_mul(shape.kv_width()))?;
    match value {
        Some(value) => value.check(OP, "value", element, tokens.saturating_mul(*value_width))?,
        None => check_length(OP, "value", tokens.saturating_mul(*value_width), 0)?,
    }
    let cache_slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    values.check(OP, "values", keys.element(), cache_slots.saturating_mul(*value_width))?;
    let angle_rows = match table {
        Some(table) => check_table(table, shape.head_dim, tokens)?,
        None => 0,
    };
    // Everything that a kernel counts within a token is less than this.
    fit(OP, "query", shape.query_width().saturating_add(shape.kv_width()))?;
    let table = table.filter(|table| table.rotary_dim > 0);
    let of_table = |part: fn(&RopeTable<'_>) -> DevicePtr| table.as_ref().map_or(DevicePtr::NULL, part);
    Ok(RopeParams {
        query: query.ptr,
        key: key.ptr,
        value: Slice::ptr_or_null(*value),
        keys: keys.ptr,
        values: values.ptr,
        cos: of_table(|table| table.cos.ptr),
        sin: of_table(|table| table.sin.ptr),
        angles: of_table(|table| table.angles.ptr),
        slots: slots.ptr,
        angle_rows: fit(OP, "cos", angle_rows)?,
        cache_slots: fit(OP, "keys", cache_slots)?,
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
        value_width: fit(OP, "value", *value_width)?,
        rotary_dim: table.map_or(0, |table| table.rotary_dim as u32),
        start: table.map_or(0, |table| table.start as u32),
        interleaved: u32::from(table.is_some_and(|table| table.layout == RopeLayout::Interleaved)),
    })
}

/// Answers how many rows the table has.
fn check_table(table: &RopeTable<'_>, head_dim: usize, tokens: usize) -> Result<usize, OpError> {
    let RopeTable { cos, sin, angles, rotary_dim, start, .. } = *table;
    if rotary_dim % 2 != 0 || start.saturating_add(rotary_dim) > head_dim {
        let reason = format!("{rotary_dim} rotated elements from {start} on, in a head of {head_dim}");
        return Err(OpError::unsupported(OP, reason));
    }
    angles.check(OP, "angles", Element::U32, tokens)?;
    cos.check(OP, "cos", Element::F32, cos.len())?;
    sin.check(OP, "sin", Element::F32, cos.len())?;
    if rotary_dim == 0 { Ok(0) } else { check_rows(OP, "cos", rotary_dim / 2, cos.len()) }
}
