use crate::{HeadShape, Sequence};

/// Causal attention over the paged cache.
///
/// `query`: `[T, heads, head_dim]`, `keys`, `values`: `[slots, kv_heads, head_dim]`, result: `[T, heads, head_dim]`.
/// Source: Vaswani et al. 2017, section 3.2.1; shared key/value heads as in Ainslie et al. 2023.
pub fn attention(
    shape: HeadShape,
    scale: f32,
    query: &[f32],
    (keys, values): (&[f32], &[f32]),
    sequences: &[Sequence<'_>],
) -> Vec<f64> {
    let mut out = vec![0.0; query.len()];
    for sequence in sequences {
        for (offset, token) in sequence.rows.clone().enumerate() {
            let visible = &sequence.slots[..=sequence.start + offset];
            for head in 0..shape.heads {
                let kv_head = head / (shape.heads / shape.kv_heads);
                let query = vector(query, shape.heads, shape.head_dim, token, head);
                let at = (token * shape.heads + head) * shape.head_dim;
                let out = &mut out[at..][..shape.head_dim];

                let row =
                    |cache, slot: u32| vector(cache, shape.kv_heads, shape.head_dim, slot as usize, kv_head);
                let scores: Vec<f64> =
                    visible.iter().map(|&slot| dot(query, row(keys, slot)) * f64::from(scale)).collect();
                for (weight, &slot) in softmax(&scores).into_iter().zip(visible) {
                    for (out, &value) in out.iter_mut().zip(row(values, slot)) {
                        *out += weight * f64::from(value);
                    }
                }
            }
        }
    }
    out
}

/// `data[outer, inner]`, where `data`: `[_, inners, width]`.
fn vector(data: &[f32], inners: usize, width: usize, outer: usize, inner: usize) -> &[f32] {
    &data[(outer * inners + inner) * width..][..width]
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The largest score is taken off first, so that no exponential overflows.
fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|exponential| exponential / sum).collect()
}
