//! Attention over the paged cache.

use std::sync::Arc;

use super::driver::DevicePtr;
use super::params::{fit, params};
use super::{Buffer, Element, Gpu, Grid, Kernel, Sequences, Slice, SliceMut};
use crate::error::{check_length, check_rows};
use crate::{HeadShape, OpError};

const OP: &str = "attention";
const PLAIN_THREADS: u32 = 128;

params! {
    struct AttentionParams {
        query: DevicePtr,
        keys: DevicePtr,
        values: DevicePtr,
        out: DevicePtr,
        slopes: DevicePtr,
        sinks: DevicePtr,
        sequences: DevicePtr,
        tables: DevicePtr,
        work: DevicePtr,
        partial: DevicePtr,
        counters: DevicePtr,
        sequence_count: u32,
        heads: u32,
        kv_heads: u32,
        head_dim: u32,
        value_dim: u32,
        value_stride: u32,
        page_shift: u32,
        window: u32,
        eight_bit: u32,
        partial_rows: u32,
        scale: f32,
        soft_cap: f32,
    }
}

/// What changes the scores of attention, or the softmax over them: see [`AttentionRules`](crate::AttentionRules), whose
/// vectors are on the device here.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionRules<'a> {
    /// A token sees itself and the `window - 1` tokens before it; not zero.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`; more than zero.
    pub soft_cap: Option<f32>,
    /// `[heads]`, f32; `slope * (key position - query position)` is added.
    pub slopes: Option<Slice<'a>>,
    /// `[heads]`, f32, one more score in each softmax, whose value is zero.
    pub sinks: Option<Slice<'a>>,
}

/// Where attention finds the values.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// In a cache of their own, of the type of the keys: `[slots, kv_heads, value_dim]`.
    Own(Slice<'a>),
    /// They are the first `value_dim` elements of each key, as in multi-head latent attention.
    InKeys,
}

/// Memory that attention works in. Kept from call to call, for all layers.
#[expect(dead_code, reason = "memory for kernels that work together")]
#[derive(Debug)]
pub struct AttentionScratch {
    /// Results of splits, f32.
    partial: Buffer,
    /// Splits that are done, by sequence and head; all zero between calls.
    counters: Buffer,
}

impl AttentionScratch {
    /// None yet.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        Ok(Self { partial: gpu.buffer(Element::F32, 0)?, counters: gpu.buffer(Element::U32, 0)? })
    }
}

/// Arguments of [`attention`].
#[derive(Debug)]
pub struct Attention<'a> {
    /// Heads of the queries and keys.
    pub shape: HeadShape,
    /// Elements per value, and per head of the result.
    pub value_dim: usize,
    /// Multiplies the scores; usually `head_dim^-0.5`.
    pub scale: f32,
    /// What differs from causal attention.
    pub rules: AttentionRules<'a>,
    /// `[T, heads, head_dim]`: f32, f16 or bf16.
    pub query: Slice<'a>,
    /// `[slots, kv_heads, head_dim]`: of the same type, E4M3 or E5M2.
    pub keys: Slice<'a>,
    /// As many as the keys.
    pub values: Values<'a>,
    /// The requests of the pass; their rows are `0 .. T`.
    pub sequences: &'a Sequences,
    /// Where blocks leave what others go on with.
    pub scratch: &'a mut AttentionScratch,
    /// `[T, heads, value_dim]`, of the type of the queries.
    pub out: SliceMut<'a>,
}

/// Causal attention: each token over the cached keys and values of its own sequence, up to and including its position.
///
/// Errors when the sequences do not cover the batch, a slot is not in the cache, or a rule makes no sense.
pub fn attention(gpu: &Gpu, args: Attention<'_>) -> Result<(), OpError> {
    let params = checked(&args)?;
    if args.sequences.pass().tokens == 0 {
        return Ok(());
    }
    plain(gpu, &args, &params)
}

/// The same by the one kernel that can do everything.
pub(super) fn attention_plain(gpu: &Gpu, args: Attention<'_>) -> Result<(), OpError> {
    let params = checked(&args)?;
    if args.sequences.pass().tokens == 0 { Ok(()) } else { plain(gpu, &args, &params) }
}

fn plain(gpu: &Gpu, args: &Attention<'_>, params: &AttentionParams) -> Result<(), OpError> {
    let names = match args.keys.element() {
        Element::E4M3 => {
            ["attention_plain_f32_e4m3", "attention_plain_f16_e4m3", "attention_plain_bf16_e4m3"]
        }
        Element::E5M2 => {
            ["attention_plain_f32_e5m2", "attention_plain_f16_e5m2", "attention_plain_bf16_e5m2"]
        }
        _ => ["attention_plain_f32", "attention_plain_f16", "attention_plain_bf16"],
    };
    let kernel = Gpu::pick(OP, args.query.element(), names.map(|name| Kernel { module: "attention", name }))?;
    let tokens = args.sequences.pass().tokens as u32;
    let grid = Grid {
        blocks: [tokens, params.heads, 1],
        threads: PLAIN_THREADS,
        shared_bytes: (params.head_dim + params.value_dim) * Element::F32.size() as u32,
    };
    // SAFETY: `checked` has compared every length with the shapes, and the slots of the sequences with those of the cache.
    unsafe { gpu.launch(OP, kernel, grid, params) }
}

/// Checks everything but the contents of the device's memory.
fn checked(args: &Attention<'_>) -> Result<AttentionParams, OpError> {
    let Attention { shape, value_dim, scale, rules, query, keys, values, sequences, out, .. } = args;
    shape.check(OP)?;
    check_rules(rules, shape.heads)?;
    let (element, pass) = (query.element(), sequences.pass());
    let tokens = check_rows(OP, "query", shape.query_width(), query.len())?;
    check_length(OP, "the sequences' rows", tokens, pass.tokens)?;
    out.check(OP, "out", element, tokens.saturating_mul(shape.heads.saturating_mul(*value_dim)))?;
    if keys.element() != element && !matches!(keys.element(), Element::E4M3 | Element::E5M2) {
        let reason = format!("a cache of {:?} for queries of {element:?}", keys.element());
        return Err(OpError::unsupported(OP, reason));
    }
    let slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    if pass.slots_end > slots {
        return Err(OpError::Index { op: OP, what: "slot", index: pass.slots_end - 1, limit: slots });
    }
    let (values, value_stride) = match values {
        _ if *value_dim == 0 => return Err(OpError::unsupported(OP, "values without elements")),
        Values::Own(values) => {
            let width = shape.kv_heads.saturating_mul(*value_dim);
            values.check(OP, "values", keys.element(), slots.saturating_mul(width))?;
            (values.ptr, *value_dim)
        }
        Values::InKeys if *value_dim > shape.head_dim => {
            let reason = format!("values of {value_dim} elements in keys of {}", shape.head_dim);
            return Err(OpError::unsupported(OP, reason));
        }
        Values::InKeys => (keys.ptr, shape.head_dim),
    };
    let parts = sequences.parts();
    Ok(AttentionParams {
        query: query.ptr,
        keys: keys.ptr,
        values,
        out: out.as_slice().ptr,
        slopes: Slice::ptr_or_null(rules.slopes),
        sinks: Slice::ptr_or_null(rules.sinks),
        sequences: parts.records,
        tables: parts.all,
        work: DevicePtr::NULL,
        partial: DevicePtr::NULL,
        counters: DevicePtr::NULL,
        sequence_count: fit(OP, "sequences", pass.count)?,
        heads: check_heads(shape.heads)?,
        kv_heads: shape.kv_heads as u32,
        head_dim: fit(OP, "head_dim", shape.head_dim)?,
        value_dim: fit(OP, "value_dim", *value_dim)?,
        value_stride: value_stride as u32,
        page_shift: pass.page_shift,
        // A window that is longer than any sequence is none.
        window: rules.window.map_or(0, |window| fit(OP, "window", window).unwrap_or(0)),
        eight_bit: 0,
        partial_rows: 0,
        scale: *scale,
        soft_cap: rules.soft_cap.unwrap_or(0.0),
    })
}

/// Heads are blocks along y.
fn check_heads(heads: usize) -> Result<u32, OpError> {
    const LIMIT: usize = 1 << 16;
    if heads < LIMIT {
        Ok(heads as u32)
    } else {
        Err(OpError::Index { op: OP, what: "head", index: heads, limit: LIMIT })
    }
}

fn check_rules(rules: &AttentionRules<'_>, heads: usize) -> Result<(), OpError> {
    if rules.window == Some(0) {
        return Err(OpError::unsupported(OP, "a window of no tokens"));
    }
    if let Some(cap) = rules.soft_cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return Err(OpError::unsupported(OP, format!("a soft cap of {cap}")));
    }
    for (what, vector) in [("slopes", rules.slopes), ("sinks", rules.sinks)] {
        if let Some(vector) = vector {
            vector.check(OP, what, Element::F32, heads)?;
        }
    }
    Ok(())
}
