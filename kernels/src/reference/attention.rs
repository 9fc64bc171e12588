use crate::cpu::Attention;
use crate::{HeadShape, Values};

/// Causal attention over the paged cache, by its rules; `args.out` is not touched. Result: `[T, heads, value_dim]`.
///
/// Source: Vaswani et al. 2017, section 3.2.1; shared key/value heads as in Ainslie et al. 2023; those of the rules are
/// at [`AttentionRules`](crate::AttentionRules).
pub fn attention(args: &Attention<'_>) -> Vec<f64> {
    let Attention { shape, value_dim, query, .. } = *args;
    let HeadShape { heads, head_dim, .. } = shape;
    let tokens = query.len() / shape.query_width();
    let mut out = vec![0.0; tokens * heads * value_dim];
    for sequence in args.sequences {
        for (offset, token) in sequence.rows.clone().enumerate() {
            let position = sequence.start + offset;
            let first = args.rules.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let query = vector(query, heads, head_dim, token, head);
                let scores: Vec<f64> = (first..=position)
                    .map(|key| score(args, head, query, sequence.slots[key], key as f64 - position as f64))
                    .collect();
                let sink = args.rules.sinks.map(|sinks| f64::from(sinks[head]));
                let out = &mut out[(token * heads + head) * value_dim..][..value_dim];
                for (weight, key) in softmax(&scores, sink).into_iter().zip(first..) {
                    for (out, &element) in out.iter_mut().zip(value(args, head, sequence.slots[key])) {
                        *out += weight * f64::from(element);
                    }
                }
            }
        }
    }
    out
}

/// The score of the key in `slot`, `distance` positions from the query: never more than zero.
fn score(args: &Attention<'_>, head: usize, query: &[f32], slot: u32, distance: f64) -> f64 {
    let HeadShape { heads, kv_heads, head_dim } = args.shape;
    let key = vector(args.keys, kv_heads, head_dim, slot as usize, head / (heads / kv_heads));
    let mut score = dot(query, key) * f64::from(args.scale);
    if let Some(cap) = args.rules.soft_cap.map(f64::from) {
        score = cap * (score / cap).tanh();
    }
    if let Some(slopes) = args.rules.slopes {
        score += f64::from(slopes[head]) * distance;
    }
    score
}

fn value<'a>(args: &Attention<'a>, head: usize, slot: u32) -> &'a [f32] {
    let HeadShape { heads, kv_heads, head_dim } = args.shape;
    let kv_head = head / (heads / kv_heads);
    match args.values {
        Values::Own(values) => vector(values, kv_heads, args.value_dim, slot as usize, kv_head),
        Values::InKeys => &vector(args.keys, kv_heads, head_dim, slot as usize, kv_head)[..args.value_dim],
    }
}

/// `data[outer, inner]`, where `data`: `[_, inners, width]`.
fn vector(data: &[f32], inners: usize, width: usize, outer: usize, inner: usize) -> &[f32] {
    &data[(outer * inners + inner) * width..][..width]
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Without the part of the sink, if there is one. The largest score is taken off first, so that no exponential overflows.
pub(super) fn softmax(scores: &[f64], sink: Option<f64>) -> Vec<f64> {
    let largest = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let exponential = |score: &f64| (score - largest).exp();
    let sum: f64 = scores.iter().chain(&sink).map(exponential).sum();
    scores.iter().map(|score| exponential(score) / sum).collect()
}
