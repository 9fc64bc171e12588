//! Exact causal attention with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1).
//!
//! Keys are taken in groups of [`GROUP`] consecutive positions, counted from the start of the sequence. A token's result
//! is built group by group in this order, so it does not matter in how many chunks its prompt came, and there is no
//! buffer as long as the context. The result itself, in `out`, is the running weighted sum of values.
//!
//! A window leaves out the groups that no token of a piece sees; a token skips what it does not see of the others, so its
//! result is built from the same groups whatever the piece.

mod piece;
mod softmax;
mod values;

use std::ops::Range;

use piece::Piece;

use super::Cpu;
use super::tile::Tile;
use crate::error::{check_indices, check_length, check_rows};
use crate::{AttentionRules, HeadShape, OpError, Sequence, Values};

const OP: &str = "attention";

/// Positions that are scored, and then weighted, together.
const GROUP: usize = 32;
/// Keys of a tile of scores.
const KEYS: usize = 4;
/// Keys of a group that stay in the nearest cache, beside the queries: half of what it holds.
const NEAR_BYTES: usize = 16 * 1024;
/// Tokens of a piece: they read a group of keys and values together.
const TOKENS: usize = 8;
/// Query heads of a piece; all share one key/value head.
const HEADS: usize = 8;

/// Scores of the heads of a piece with a group of keys, and then their exponentials.
type Scores = [[f32; GROUP]; HEADS];

/// Inputs of [`attention`].
#[derive(Debug)]
pub struct Attention<'a> {
    /// Heads of the queries and keys.
    pub shape: HeadShape,
    /// Elements per value, and per head of the result.
    pub value_dim: usize,
    /// Multiplies the scores; usually `head_dim^-0.5`.
    pub scale: f32,
    /// `[T, heads, head_dim]`
    pub query: &'a [f32],
    /// `[slots, kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// As many as the keys.
    pub values: Values<'a>,
    /// What differs from causal attention.
    pub rules: AttentionRules<'a>,
    /// The requests of the batch; their rows cover `0 .. T` without overlap.
    pub sequences: &'a [Sequence<'a>],
    /// `[T, heads, value_dim]`
    pub out: &'a mut [f32],
}

/// What all pieces read.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    shape: HeadShape,
    value_dim: usize,
    scale: f32,
    query: &'a [f32],
    keys: &'a [f32],
    values: Values<'a>,
    rules: AttentionRules<'a>,
}

/// Causal attention: each token over the cached keys and values of its own sequence, up to and including its position.
///
/// Errors when the sequences do not cover the batch, a slot is not in the cache, or a rule makes no sense.
pub fn attention(cpu: &Cpu, args: Attention<'_>) -> Result<(), OpError> {
    let sequences = check(&args)?;
    let Attention { shape, value_dim, scale, query, keys, values, rules, out, .. } = args;
    let inputs = Inputs { shape, value_dim, scale, query, keys, values, rules };

    let mut pieces = Vec::new();
    let mut work: usize = 0;
    let mut below = Tile::new(out, shape.heads * value_dim);
    for sequence in sequences {
        let context = sequence.start + sequence.rows.len();
        let visible = rules.window.map_or(context, |window| context.min(window));
        work =
            work.saturating_add(sequence.rows.len() * visible * shape.heads * (shape.head_dim + value_dim));
        for first in sequence.rows.clone().step_by(TOKENS) {
            let tokens = first..sequence.rows.end.min(first + TOKENS);
            let mut right;
            (right, below) = below.split_rows(tokens.len());
            for heads in heads(shape) {
                let out;
                (out, right) = right.split_cols(heads.len() * value_dim);
                pieces.push(Piece { inputs, sequence, tokens: tokens.clone(), heads, out });
            }
        }
    }
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
    Ok(())
}

/// Answers the sequences in the order of their rows.
fn check<'a>(args: &Attention<'a>) -> Result<Vec<&'a Sequence<'a>>, OpError> {
    let Attention { shape, value_dim, query, keys, values, rules, sequences, out, .. } = args;
    shape.check(OP)?;
    check_rules(rules, shape.heads)?;
    let tokens = check_rows(OP, "query", shape.query_width(), query.len())?;
    let out_width = shape.heads.saturating_mul(*value_dim);
    check_length(OP, "out", tokens.saturating_mul(out_width), out.len())?;
    let slots = check_rows(OP, "keys", shape.kv_width(), keys.len())?;
    match values {
        _ if *value_dim == 0 => return Err(OpError::unsupported(OP, "values without elements")),
        Values::Own(values) => {
            let width = shape.kv_heads.saturating_mul(*value_dim);
            check_length(OP, "values", slots.saturating_mul(width), values.len())?;
        }
        Values::InKeys if *value_dim > shape.head_dim => {
            let reason = format!("values of {value_dim} elements in keys of {}", shape.head_dim);
            return Err(OpError::unsupported(OP, reason));
        }
        Values::InKeys => {}
    }
    check_sequences(sequences, tokens, slots)
}

fn check_rules(rules: &AttentionRules<'_>, heads: usize) -> Result<(), OpError> {
    if rules.window == Some(0) {
        return Err(OpError::unsupported(OP, "a window of no tokens"));
    }
    if let Some(cap) = rules.soft_cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return Err(OpError::unsupported(OP, format!("a soft cap of {cap}")));
    }
    check_length(OP, "slopes", heads, rules.slopes.map_or(heads, <[f32]>::len))?;
    check_length(OP, "sinks", heads, rules.sinks.map_or(heads, <[f32]>::len))
}

/// Answers the sequences in the order of their rows, which must cover all `tokens`.
fn check_sequences<'a>(
    sequences: &'a [Sequence<'a>],
    tokens: usize,
    slots: usize,
) -> Result<Vec<&'a Sequence<'a>>, OpError> {
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
