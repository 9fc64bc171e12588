use super::activation::gate_one;
use crate::{Expert, Gating, Projection, Routes};

/// `out[t] = sum over j of weights[t, j] * experts[routes[t, j]](input[t])`; `input`, result: `[T, H]`.
///
/// Source: Shazeer et al. 2017 (sparsely-gated mixture of experts), equation 1.
pub fn experts(input: &[f32], routes: &Routes, experts: &[Expert<'_>], gating: Gating) -> Vec<f64> {
    let Some(width) = experts.first().map(|expert| expert.gate.weight.cols()) else {
        return Vec::new();
    };
    let mut out = vec![0.0; input.len()];
    let tokens = input.len() / width;
    for token in 0..tokens {
        let x: Vec<f64> = input[token * width..][..width].iter().copied().map(f64::from).collect();
        let per_token = routes.experts.len() / tokens;
        for route in token * per_token..(token + 1) * per_token {
            let expert = &experts[routes.experts[route] as usize];
            let (gate, up) = (product(&expert.gate, &x), product(&expert.up, &x));
            let inner: Vec<f64> =
                gate.iter().zip(&up).map(|(&gate, &up)| gate_one(gating, gate, up)).collect();
            for (out, y) in out[token * width..].iter_mut().zip(product(&expert.down, &inner)) {
                *out += f64::from(routes.weights[route]) * y;
            }
        }
    }
    out
}

/// One token's [`linear`](super::linear).
fn product(projection: &Projection<'_>, x: &[f64]) -> Vec<f64> {
    let mut out = Vec::new();
    for row in 0..projection.weight.rows() {
        let mut sum = projection.bias.map_or(0.0, |bias| f64::from(bias[row]));
        for (col, x) in x.iter().enumerate() {
            sum += x * f64::from(projection.weight.element(row, col));
        }
        out.push(sum);
    }
    out
}
