//! Exact causal attention with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1).
//!
//! Keys are taken in groups of [`GROUP`] consecutive positions, counted from the start of the sequence. A token's result
//! is built group by group in this order, so it does not matter in how many chunks its prompt came, and there is no
//! buffer as long as the context. The result itself, in `out`, is the running weighted sum of values.

use std::ops::Range;

use super::Cpu;
use super::dot::dots;
use super::simd::{Kernel, Row, Simd, exp};
use super::tile::Tile;
use crate::error::{check_indices, check_length, check_rows};
use crate::{HeadShape, OpError, Sequence};

const OP: &str = "attention";

/// Positions that are scored, and then weighted, together.
const GROUP: usize = 32;
/// Keys of a tile of scores.
const KEYS: usize = 4;
/// Tokens of a piece: they read a group of keys and values together.
const TOKENS: usize = 8;
/// Query heads of a piece; all share one key/value head.
const HEADS: usize = 8;

/// Inputs of [`attention`].
#[derive(Debug)]
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
///
/// Errors when the sequences do not cover the batch, or a slot is not in the cache.
pub fn attention(cpu: &Cpu, args: Attention<'_>) -> Result<(), OpError> {
    let sequences = check(&args)?;
    let Attention { shape, scale, query, keys, values, out, .. } = args;

    let mut pieces = Vec::new();
    let mut work: usize = 0;
    let mut below = Tile::new(out, shape.query_width());
    for sequence in sequences {
        let context = sequence.start + sequence.rows.len();
        work = work.saturating_add(sequence.rows.len() * context * shape.query_width() * 2);
        for first in sequence.rows.clone().step_by(TOKENS) {
            let tokens = first..sequence.rows.end.min(first + TOKENS);
            let mut right;
            (right, below) = below.split_rows(tokens.len());
            for heads in heads(shape) {
                let out;
                (out, right) = right.split_cols(heads.len() * shape.head_dim);
                let tokens = tokens.clone();
                pieces.push(Piece { shape, scale, query, keys, values, sequence, tokens, heads, out });
            }
        }
    }
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
    Ok(())
}

/// Answers the sequences in the order of their rows.
fn check<'a>(args: &Attention<'a>) -> Result<Vec<&'a Sequence<'a>>, OpError> {
    let Attention { shape, query, keys, values, sequences, out, .. } = args;
    shape.check(OP)?;
    let tokens = check_rows(OP, "query", shape.query_width(), query.len())?;
    check_length(OP, "out", query.len(), out.len())?;
    let slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    check_length(OP, "values", keys.len(), values.len())?;

    let mut ordered: Vec<_> = sequences.iter().collect();
    ordered.sort_unstable_by_key(|sequence| (sequence.rows.start, sequence.rows.end));
    let mut covered = 0;
    for sequence in &ordered {
        let Sequence { rows, start, slots: sequence_slots } = sequence;
        if rows.start != covered || rows.end < rows.start {
            let reason = format!("a sequence's rows {rows:?} do not follow the {covered} before them");
            return Err(OpError::unsupported(OP, reason));
        }
        covered = rows.end;
        let context = start.saturating_add(rows.len());
        let Some(visible) = sequence_slots.get(..context) else {
            return Err(OpError::Length {
                op: OP,
                what: "slots",
                expected: context,
                found: sequence_slots.len(),
            });
        };
        check_indices(OP, "slot", visible, slots)?;
    }
    check_length(OP, "the sequences' rows", tokens, covered)?;
    Ok(ordered)
}

/// The query heads in order, cut so that each piece has one key/value head and at most [`HEADS`] query heads.
fn heads(shape: HeadShape) -> impl Iterator<Item = Range<usize>> {
    let sharing = shape.heads / shape.kv_heads;
    (0..shape.heads).step_by(sharing).flat_map(move |first| {
        let end = first + sharing;
        (first..end).step_by(HEADS).map(move |first| first..end.min(first + HEADS))
    })
}

/// Some tokens of a sequence, and some query heads of one key/value head.
struct Piece<'a> {
    shape: HeadShape,
    scale: f32,
    query: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    sequence: &'a Sequence<'a>,
    /// Rows of the batch, at most [`TOKENS`].
    tokens: Range<usize>,
    /// At most [`HEADS`].
    heads: Range<usize>,
    /// `[tokens, heads, head_dim]`
    out: Tile<'a>,
}

/// What the softmax of one token and head has seen.
#[derive(Clone, Copy)]
struct Seen {
    /// Largest score.
    max: f32,
    /// Sum of `exp(score - max)`.
    sum: f32,
}

/// Scores of a group, and then their exponentials.
type Scores = [[f32; GROUP]; HEADS];

impl Kernel for Piece<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut seen = [[Seen { max: f32::NEG_INFINITY, sum: 0.0 }; HEADS]; TOKENS];
        for token in 0..self.tokens.len() {
            self.out.row_mut(token).fill(0.0);
        }
        let context = self.position(self.tokens.end);
        let (mut packed_keys, mut packed_values) = (Vec::new(), Vec::new());
        for first in (0..context).step_by(GROUP) {
            let slots = &self.sequence.slots[first..context.min(first + GROUP)];
            let keys = self.vectors(self.keys, slots, &mut packed_keys);
            let values = self.vectors(self.values, slots, &mut packed_values);
            for (token, seen) in self.tokens.clone().zip(&mut seen) {
                let visible = (self.position(token) + 1).saturating_sub(first).min(GROUP);
                if visible > 0 {
                    self.attend(simd, token, &keys[..visible], &values[..visible], seen);
                }
            }
        }
        for (token, seen) in seen.iter().enumerate().take(self.tokens.len()) {
            for (out, seen) in self.out.row_mut(token).chunks_exact_mut(self.shape.head_dim).zip(seen) {
                out.iter_mut().for_each(|out| *out /= seen.sum);
            }
        }
    }
}

impl Piece<'_> {
    /// Position of a row of the batch in its sequence.
    fn position(&self, token: usize) -> usize {
        self.sequence.start + (token - self.sequence.rows.start)
    }

    /// This key/value head's vectors in some slots.
    ///
    /// In the cache they are a power of two apart, so a few sets of the nearest cache have to hold them all. Where
    /// several tokens read them, they are copied next to each other first.
    #[inline(always)]
    fn vectors<'v>(&self, cache: &'v [f32], slots: &[u32], packed: &'v mut Vec<f32>) -> [&'v [f32]; GROUP] {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let kv_head = self.heads.start / (heads / kv_heads);
        let cached =
            slots.iter().map(|&slot| &cache[(slot as usize * kv_heads + kv_head) * head_dim..][..head_dim]);

        let mut vectors: [&[f32]; GROUP] = [&[]; GROUP];
        if self.tokens.len() > 1 {
            packed.clear();
            cached.for_each(|vector| packed.extend_from_slice(vector));
            vectors
                .iter_mut()
                .zip(packed.chunks_exact(head_dim))
                .for_each(|(vector, packed)| *vector = packed);
        } else {
            vectors.iter_mut().zip(cached).for_each(|(vector, cached)| *vector = cached);
        }
        vectors
    }

    /// Takes one group of keys and values into the result of one token.
    #[inline(always)]
    fn attend<S: Simd>(
        &mut self,
        simd: S,
        token: usize,
        keys: &[&[f32]],
        values: &[&[f32]],
        seen: &mut [Seen; HEADS],
    ) {
        let mut scores: Scores = [[f32::NEG_INFINITY; GROUP]; HEADS];
        match self.heads.len() {
            1 => self.score::<S, 1>(simd, token, keys, &mut scores),
            2 | 4 => self.score::<S, 2>(simd, token, keys, &mut scores),
            _ => self.score::<S, 3>(simd, token, keys, &mut scores),
        }
        let head_dim = self.shape.head_dim;
        let out = self.out.row_mut(token - self.tokens.start);
        for ((out, scores), seen) in out.chunks_exact_mut(head_dim).zip(&mut scores).zip(seen) {
            let fade = weigh(simd, scores, seen);
            add_values(simd, fade, scores, values, out);
        }
    }

    /// Scores of a token's heads, `C` at a time, with the keys, `KEYS` at a time. A tile that reaches beyond the last
    /// key or head repeats it instead, and leaves the results.
    #[inline(always)]
    fn score<S: Simd, const C: usize>(&self, simd: S, token: usize, keys: &[&[f32]], scores: &mut Scores) {
        let HeadShape { heads, head_dim, .. } = self.shape;
        for head in self.heads.clone().step_by(C) {
            let queries: [&[f32]; C] = std::array::from_fn(|c| {
                let head = (head + c).min(self.heads.end - 1);
                &self.query[(token * heads + head) * head_dim..][..head_dim]
            });
            for key in (0..keys.len()).step_by(KEYS) {
                let tile: [&[f32]; KEYS] = std::array::from_fn(|k| keys[(key + k).min(keys.len() - 1)]);
                for (key, products) in (key..keys.len()).zip(dots(simd, tile, queries)) {
                    for (head, product) in (head..self.heads.end).zip(products) {
                        scores[head - self.heads.start][key] = product * self.scale;
                    }
                }
            }
        }
    }
}

/// Turns scores into `exp(score - max)`. Answers the factor by which what was seen before fades, now that the largest
/// score is known better.
#[inline(always)]
fn weigh<S: Simd>(simd: S, scores: &mut [f32; GROUP], seen: &mut Seen) -> f32 {
    let mut maxima = simd.splat(seen.max);
    for scores in scores.chunks_exact(S::LANES) {
        // SAFETY: a chunk fills a register. In this order a score that is not a number leaves the maximum.
        maxima = simd.max(unsafe { scores.load(simd, 0) }, maxima);
    }
    let max = simd.lanes(maxima)[..S::LANES].iter().copied().fold(seen.max, f32::max);

    let mut sum = simd.zero();
    for scores in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk fills a register.
        let register = unsafe { (&*scores).load(simd, 0) };
        let weights = exp(simd, simd.sub(register, simd.splat(max)));
        sum = simd.add(sum, weights);
        simd.write(weights, scores);
    }
    let fade = simd.lanes(exp(simd, simd.splat(seen.max - max)))[0];
    *seen = Seen { max, sum: seen.sum * fade + simd.sum(sum) };
    fade
}

/// `out = out * fade + sum over k of weights[k] * values[k]`, in the order of `k`.
#[inline(always)]
fn add_values<S: Simd>(simd: S, fade: f32, weights: &[f32], values: &[&[f32]], out: &mut [f32]) {
    let mut at = 0;
    let width = out.len();
    while at + 8 * S::LANES <= width {
        add_columns::<S, 8>(simd, fade, weights, values, at, &mut out[at..]);
        at += 8 * S::LANES;
    }
    while at + 4 * S::LANES <= width {
        add_columns::<S, 4>(simd, fade, weights, values, at, &mut out[at..]);
        at += 4 * S::LANES;
    }
    while at + S::LANES <= width {
        add_columns::<S, 1>(simd, fade, weights, values, at, &mut out[at..]);
        at += S::LANES;
    }
    if at < width {
        let out = &mut out[at..];
        let mut sum = simd.mul((&*out).load_tail(simd, 0), simd.splat(fade));
        for (&weight, value) in weights.iter().zip(values) {
            sum = simd.mul_add(simd.splat(weight), value.load_tail(simd, at), sum);
        }
        simd.write(sum, out);
    }
}

/// [`add_values`] for `N` registers from column `at` on, which is where `out` starts.
#[inline(always)]
fn add_columns<S: Simd, const N: usize>(
    simd: S,
    fade: f32,
    weights: &[f32],
    values: &[&[f32]],
    at: usize,
    out: &mut [f32],
) {
    let out = &mut out[..N * S::LANES];
    let mut sums = [simd.zero(); N];
    for (n, sum) in sums.iter_mut().enumerate() {
        // SAFETY: `out` fills N registers.
        let old = unsafe { (&*out).load(simd, n * S::LANES) };
        *sum = simd.mul(old, simd.splat(fade));
    }
    for (&weight, value) in weights.iter().zip(values) {
        let value = &value[at..][..N * S::LANES];
        let weight = simd.splat(weight);
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `value` fills N registers.
            let value = unsafe { value.load(simd, n * S::LANES) };
            *sum = simd.mul_add(weight, value, *sum);
        }
    }
    for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(S::LANES)) {
        simd.write(sum, out);
    }
}
