//! Attention over the paged cache.
//!
//! - `plain.rs`: the kernel for all types, sizes and rules, which others are compared with
//! - `tensor.rs`: those on tensor cores, for the sizes that models have
//!
//! Here: arguments, their checks, and the choice between the two.

pub(super) mod plain;
mod tensor;

use std::sync::Arc;

use super::driver::DevicePtr;
use super::params::{fit, params};
use super::{Buffer, Element, Gpu, Sequences, Slice, SliceMut};
use crate::error::{check_length, check_rows};
use crate::{HeadShape, OpError};

const OP: &str = "attention";

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
        states: DevicePtr,
        counters: DevicePtr,
        sequence_count: u32,
        work_count: u32,
        heads: u32,
        kv_heads: u32,
        head_dim: u32,
        value_dim: u32,
        value_stride: u32,
        page_shift: u32,
        window: u32,
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
#[derive(Debug)]
pub struct AttentionScratch {
    gpu: Arc<Gpu>,
    /// Results of splits, f32.
    partial: Buffer,
    /// Their largest score, and the sum of their weights; f32.
    states: Buffer,
    /// Splits that are done, by sequence and heads, u32; all zero between calls.
    counters: Buffer,
}

impl AttentionScratch {
    /// None yet.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        let none = |element| gpu.buffer(element, 0);
        let (partial, states, counters) = (none(Element::F32)?, none(Element::F32)?, none(Element::U32)?);
        Ok(Self { gpu: gpu.clone(), partial, states, counters })
    }

    /// Room for so many rows of partial results of this width, and so many counters.
    fn reserve(&mut self, rows: usize, width: usize, counters: usize) -> Result<(), OpError> {
        for (buffer, len) in [(&mut self.partial, rows.saturating_mul(width)), (&mut self.states, 2 * rows)] {
            if buffer.len() < len {
                *buffer = self.gpu.buffer(Element::F32, len.next_power_of_two())?;
            }
        }
        if self.counters.len() < counters {
            self.counters = self.gpu.buffer(Element::U32, counters.next_power_of_two())?;
            self.counters.fill(0)?;
        }
        Ok(())
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
/// On tensor cores where types and sizes allow that, and by [`plain`] otherwise; which, follows from the layer alone.
/// Errors when the sequences do not cover the batch, a slot is not in the cache, or a rule makes no sense.
pub fn attention(gpu: &Gpu, args: Attention<'_>) -> Result<(), OpError> {
    attention_within(gpu, args, gpu.properties().shared_bytes_max as usize)
}

/// The same as on a device whose blocks have so much shared memory, at most what this one has.
pub(super) fn attention_within(
    gpu: &Gpu,
    args: Attention<'_>,
    shared_bytes_max: usize,
) -> Result<(), OpError> {
    let params = checked(&args)?;
    if args.sequences.bounds().tokens == 0 {
        return Ok(());
    }
    match tensor::kernels(&args, shared_bytes_max) {
        Some(kernels) => tensor::run(gpu, args, kernels, params),
        None => plain::run(gpu, &args, &params),
    }
}

/// Checks everything but the contents of the device's memory.
fn checked(args: &Attention<'_>) -> Result<AttentionParams, OpError> {
    let Attention { shape, value_dim, scale, rules, query, keys, values, sequences, out, .. } = args;
    shape.check(OP)?;
    check_rules(rules, shape.heads)?;
    let (element, bounds) = (query.element(), sequences.bounds());
    let tokens = check_rows(OP, "query", shape.query_width(), query.len())?;
    check_length(OP, "the sequences' rows", tokens, bounds.tokens)?;
    out.check(OP, "out", element, tokens.saturating_mul(shape.heads.saturating_mul(*value_dim)))?;
    if keys.element() != element && !matches!(keys.element(), Element::E4M3 | Element::E5M2) {
        let reason = format!("a cache of {:?} for queries of {element:?}", keys.element());
        return Err(OpError::unsupported(OP, reason));
    }
    let slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    if sequences.slots_end() > slots {
        return Err(OpError::Index { op: OP, what: "slot", index: sequences.slots_end() - 1, limit: slots });
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
        states: DevicePtr::NULL,
        counters: DevicePtr::NULL,
        sequence_count: fit(OP, "sequences", bounds.count)?,
        work_count: 0,
        heads: check_heads(shape.heads)?,
        kv_heads: shape.kv_heads as u32,
        head_dim: fit(OP, "head_dim", shape.head_dim)?,
        value_dim: fit(OP, "value_dim", *value_dim)?,
        value_stride: value_stride as u32,
        page_shift: bounds.page_shift,
        // A window that is longer than any sequence is none.
        window: rules.window.map_or(0, |window| fit(OP, "window", window).unwrap_or(0)),
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
