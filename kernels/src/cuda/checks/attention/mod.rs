//! Attention by each of its kernels, over a cache whose pages are shuffled and whose unused slots are no numbers.

pub(super) mod decode;
pub(super) mod plain;
pub(super) mod prefill;

use std::fmt;
use std::ops::Range;

use super::{Checker, Finding, Floats, rounding};
use crate::cuda::attention::{attention, attention_within};
use crate::cuda::{self, AttentionScratch, Buffer, Element, Gpu, Sequences, Slice};
use crate::{AttentionRules, HeadShape, OpError, Sequence, Values, reference};

/// An attention operation on the device.
type Operation = fn(&Gpu, cuda::Attention<'_>) -> Result<(), OpError>;

/// The sizes of an attention layer, and its types.
#[derive(Clone, Copy, Debug)]
struct Layer {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    in_keys: bool,
    element: Element,
    cache: Element,
    /// Elements before those of the cache, so that it begins in the middle of a vector.
    shift: usize,
}

/// Which rules hold.
#[derive(Clone, Copy, Debug, Default)]
struct Rules {
    window: Option<usize>,
    soft_cap: Option<f32>,
    slopes: bool,
    sinks: bool,
}

const NONE: Rules = Rules { window: None, soft_cap: None, slopes: false, sinks: false };
const EVERYTHING: Rules = Rules { window: Some(40), soft_cap: Some(2.0), slopes: true, sinks: true };

/// [`cuda::attention`] where blocks have little shared memory.
fn on_a_small_device(gpu: &Gpu, args: cuda::Attention<'_>) -> Result<(), OpError> {
    attention_within(gpu, args, 99 << 10)
}

/// Where the sequences of a pass have their rows and their slots.
#[derive(Debug)]
struct Batch {
    sequences: Vec<(Range<usize>, usize, Vec<u32>)>,
    tokens: usize,
    page: usize,
    cache_slots: usize,
}

/// The arguments of attention, here and on the device.
#[derive(Debug)]
struct Inputs {
    layer: Layer,
    rules: Rules,
    batch: Batch,
    query: Floats,
    keys: Floats,
    values: Option<Floats>,
    slopes: Option<Floats>,
    sinks: Option<Floats>,
}

impl Layer {
    /// Values as long as keys, in a cache of their own.
    const fn new((heads, kv_heads, head_dim): (usize, usize, usize), element: Element) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            in_keys: false,
            element,
            cache: element,
            shift: 0,
        }
    }

    /// Multi-head latent attention, as in DeepSeek V2 and V3.
    const fn latent(heads: usize, element: Element) -> Self {
        Self { value_dim: 512, in_keys: true, ..Self::new((heads, 1, 576), element) }
    }

    fn shape(&self) -> HeadShape {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        HeadShape { heads, kv_heads, head_dim }
    }

    fn scale(&self) -> f32 {
        (self.head_dim as f32).powf(-0.5)
    }
}

impl fmt::Display for Inputs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, rules, batch, .. } = self;
        let lengths: Vec<_> = batch.sequences.iter().map(|(rows, start, _)| (rows.len(), *start)).collect();
        write!(formatter, "{layer}{rules}, pages of {}, (rows, start) {lengths:?}", batch.page)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { heads, kv_heads, head_dim, value_dim, in_keys, element, cache, shift } = self;
        let values = if *in_keys { "in the keys" } else { "of their own" };
        write!(formatter, "{element:?} over {cache:?}, {heads} heads over {kv_heads} of {head_dim}, ")?;
        write!(formatter, "values of {value_dim} {values}")?;
        if *shift > 0 { write!(formatter, ", {shift} elements behind an aligned address") } else { Ok(()) }
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { window, soft_cap, slopes, sinks } = self;
        window.iter().try_for_each(|window| write!(formatter, ", window {window}"))?;
        soft_cap.iter().try_for_each(|cap| write!(formatter, ", soft cap {cap}"))?;
        formatter.write_str(if *slopes { ", slopes" } else { "" })?;
        formatter.write_str(if *sinks { ", sinks" } else { "" })
    }
}

impl Batch {
    /// Sequences of `(rows, start)`, the first with the last rows. What follows their slots is far outside of the cache.
    fn new(c: &mut Checker, page: usize, lengths: &[(usize, usize)]) -> Self {
        let pages: Vec<usize> = lengths.iter().map(|(rows, start)| (rows + start).div_ceil(page)).collect();
        let count = pages.iter().sum::<usize>() + 2;
        let order = c.random().permutation(count);
        let mut order = order.iter().map(|&at| at * page as u32);
        let tokens = lengths.iter().map(|(rows, _)| rows).sum();
        let mut row = tokens;
        let sequence = |(&(rows, start), pages): (&(usize, usize), usize)| {
            row -= rows;
            let own = order.by_ref().take(pages).flat_map(|first| first..first + page as u32);
            let mut slots: Vec<u32> = own.take(rows + start).collect();
            slots.extend([u32::MAX - 1, 1 << 24]);
            (row..row + rows, start, slots)
        };
        let sequences = lengths.iter().zip(pages).map(sequence).collect();
        Self { sequences, tokens, page, cache_slots: count * page }
    }

    /// One of its sequences, without the others.
    fn alone(&self, index: usize) -> Self {
        let (rows, start, slots) = self.sequences[index].clone();
        Self { sequences: vec![(0..rows.len(), start, slots)], tokens: rows.len(), ..*self }
    }

    fn sequences(&self) -> Vec<Sequence<'_>> {
        let all = self.sequences.iter();
        all.map(|(rows, start, slots)| Sequence { rows: rows.clone(), start: *start, slots }).collect()
    }

    /// Random vectors in the slots that some row sees; no numbers in the others, and `before` all of them.
    fn cache(
        &self,
        c: &mut Checker,
        element: Element,
        width: usize,
        window: Option<usize>,
        before: usize,
    ) -> Result<Floats, OpError> {
        let mut cache = vec![f32::NAN; self.cache_slots * width];
        for (rows, start, slots) in &self.sequences {
            let forgotten = window.map_or(0, |window| (start + 1).saturating_sub(window)).min(*start);
            for &slot in &slots[forgotten..start + rows.len()] {
                cache[slot as usize * width..][..width].copy_from_slice(&c.random().numbers(width));
            }
        }
        c.placed(element, before, &cache, 0)
    }
}

impl Inputs {
    fn new(
        c: &mut Checker,
        layer: Layer,
        rules: Rules,
        page: usize,
        lengths: &[(usize, usize)],
    ) -> Result<Self, OpError> {
        let Layer { heads, kv_heads, head_dim, value_dim, in_keys, element, cache, shift } = layer;
        let batch = Batch::new(c, page, lengths);
        let query: Vec<f32> =
            c.random().numbers(batch.tokens * heads * head_dim).iter().map(|x| x * 4.0).collect();
        let query = c.given(element, &query)?;
        let keys = batch.cache(c, cache, kv_heads * head_dim, rules.window, shift)?;
        let values = match in_keys {
            true => None,
            false => Some(batch.cache(c, cache, kv_heads * value_dim, rules.window, shift)?),
        };
        let slopes = rules.slopes.then(|| c.floats(Element::F32, heads)).transpose()?;
        let sinks = rules.sinks.then(|| c.floats(Element::F32, heads)).transpose()?;
        Ok(Self { layer, rules, batch, query, keys, values, slopes, sinks })
    }

    /// By the definition.
    fn expected(&self) -> Vec<f64> {
        let sequences = self.batch.sequences();
        reference::attention(&crate::cpu::Attention {
            shape: self.layer.shape(),
            value_dim: self.layer.value_dim,
            scale: self.layer.scale(),
            query: &self.query.host,
            keys: &self.keys.host,
            values: self.values.as_ref().map_or(Values::InKeys, |values| Values::Own(&values.host)),
            rules: AttentionRules {
                window: self.rules.window,
                soft_cap: self.rules.soft_cap,
                slopes: self.slopes.as_ref().map(|slopes| &slopes.host[..]),
                sinks: self.sinks.as_ref().map(|sinks| &sinks.host[..]),
            },
            sequences: &sequences,
            out: &mut [],
        })
    }

    /// On the device, for a batch that reads the same cache, whose first row is that of the queries.
    fn found(
        &self,
        c: &Checker,
        operation: Operation,
        scratch: &mut AttentionScratch,
        batch: &Batch,
        first_row: usize,
    ) -> Result<Buffer, OpError> {
        let (gpu, Layer { heads, value_dim, element, .. }) = (c.gpu(), self.layer);
        let mut sequences = Sequences::new(&gpu)?;
        sequences.set(&batch.sequences(), batch.page)?;
        let mut out = c.unwritten(element, batch.tokens * heads * value_dim)?;
        let width = self.layer.shape().query_width();
        let query = self.query.buffer.slice(first_row * width..(first_row + batch.tokens) * width);
        operation(&gpu, self.arguments(query, &sequences, scratch, &mut out))?;
        Ok(out)
    }

    fn arguments<'a>(
        &'a self,
        query: Slice<'a>,
        sequences: &'a Sequences,
        scratch: &'a mut AttentionScratch,
        out: &'a mut Buffer,
    ) -> cuda::Attention<'a> {
        let cache = |floats: &'a Floats| floats.buffer.slice(self.layer.shift..floats.buffer.len());
        cuda::Attention {
            shape: self.layer.shape(),
            value_dim: self.layer.value_dim,
            scale: self.layer.scale(),
            rules: cuda::AttentionRules {
                window: self.rules.window,
                soft_cap: self.rules.soft_cap,
                slopes: self.slopes.as_ref().map(|slopes| slopes.buffer.all()),
                sinks: self.sinks.as_ref().map(|sinks| sinks.buffer.all()),
            },
            query,
            keys: cache(&self.keys),
            values: self
                .values
                .as_ref()
                .map_or(cuda::Values::InKeys, |values| cuda::Values::Own(cache(values))),
            sequences,
            scratch,
            out: out.all_mut(),
        }
    }
}

/// The whole batch against the definition, and each of its sequences alone: neighbours must not change a bit.
fn check(c: &mut Checker, operation: Operation, inputs: &Inputs, roundings: f64) -> Result<(), OpError> {
    let mut scratch = AttentionScratch::new(&c.gpu())?;
    let together = close(c, operation, &mut scratch, inputs, roundings)?;
    let width = inputs.layer.heads * inputs.layer.value_dim;
    for (index, (rows, start, _)) in inputs.batch.sequences.iter().enumerate() {
        let batch = inputs.batch.alone(index);
        let out = inputs.found(c, operation, &mut scratch, &batch, rows.start)?;
        let (alone, together) = (c.read(&out)?, &together[rows.start * width..rows.end * width]);
        let case = format!("{inputs}: {} rows from {start} on, alone", rows.len());
        c.equal(case, &super::bits(&alone), &super::bits(together));
    }
    Ok(())
}

/// The whole batch against the definition, and without bank conflicts. Answers what was found.
fn close(
    c: &mut Checker,
    operation: Operation,
    scratch: &mut AttentionScratch,
    inputs: &Inputs,
    roundings: f64,
) -> Result<Vec<f32>, OpError> {
    let conflicts = bank_conflicts();
    let out = inputs.found(c, operation, scratch, &inputs.batch, 0)?;
    c.equal(format!("{inputs}: bank conflicts"), &[bank_conflicts() - conflicts], &[0]);
    close_by_head(c, &inputs.to_string(), &inputs.layer, &out, &inputs.expected(), roundings)?;
    c.read(&out)
}

/// What kernels on tensor cores may be off: weights are rounded to the type before they are multiplied with values.
const ROUNDINGS: f64 = 4.0;

/// Every head size and type that there are kernels for.
fn sweep(c: &mut Checker, page: usize, lengths: &[(usize, usize)]) -> Result<(), OpError> {
    let mut scratch = AttentionScratch::new(&c.gpu())?;
    for head_dim in [64, 80, 96, 112, 128, 192, 256] {
        for element in [Element::F16, Element::BF16] {
            for cache in [element, Element::E4M3, Element::E5M2] {
                let layer = Layer { cache, ..Layer::new((3, 1, head_dim), element) };
                let inputs = Inputs::new(c, layer, NONE, page, lengths)?;
                close(c, attention, &mut scratch, &inputs, ROUNDINGS)?;
            }
        }
    }
    Ok(())
}

fn one(
    c: &mut Checker,
    layer: Layer,
    rules: Rules,
    page: usize,
    lengths: &[(usize, usize)],
) -> Result<(), OpError> {
    let inputs = Inputs::new(c, layer, rules, page, lengths)?;
    check(c, attention, &inputs, ROUNDINGS)
}

/// Passes over shared memory that were only needed because rows were in the same banks. Counted by the emulator alone.
fn bank_conflicts() -> u64 {
    #[cfg(feature = "emulation")]
    return crate::cuda::counter("matrix_bank_conflicts");
    #[cfg(not(feature = "emulation"))]
    0
}

/// Every element must be within so many roundings of the definition's, relative to the root mean square of its row and
/// head: one head that is wrong must not be averaged away.
fn close_by_head(
    c: &mut Checker,
    case: &str,
    layer: &Layer,
    found: &Buffer,
    expected: &[f64],
    roundings: f64,
) -> Result<(), OpError> {
    let bound = roundings * rounding(found.element());
    let found = c.read(found)?;
    let mut worst = if found.len() == expected.len() { 0.0 } else { f64::INFINITY };
    for (found, expected) in found.chunks(layer.value_dim).zip(expected.chunks(layer.value_dim)) {
        let squares: f64 = expected.iter().map(|value| value * value).sum();
        let typical = (squares / expected.len() as f64).sqrt().max(f64::MIN_POSITIVE);
        for (&found, &expected) in found.iter().zip(expected) {
            let error = (f64::from(found) - expected).abs() / expected.abs().max(typical) / bound;
            // NaN is the worst of all, and stays.
            if error.is_nan() || error > worst {
                worst = error;
            }
        }
    }
    c.findings.push(Finding { case: case.to_owned(), error: worst });
    Ok(())
}
