/// `out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight`; `x`: `[T, width]`, `weight`: `[width]`.
///
/// Source: Zhang and Sennrich 2019 (root mean square layer normalization), equation 4.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
    norm(&x, weight, eps)
}

/// The new residual `residual + delta`, and its norm.
pub fn add_rms_norm(residual: &[f32], delta: &[f32], weight: &[f32], eps: f32) -> (Vec<f64>, Vec<f64>) {
    let residual = super::add(residual, delta);
    let normed = norm(&residual, weight, eps);
    (residual, normed)
}

fn norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for token in x.chunks_exact(weight.len()) {
        let mut squares = 0.0;
        for value in token {
            squares += value * value;
        }
        let root = (squares / token.len() as f64 + f64::from(eps)).sqrt();
        for (value, &weight) in token.iter().zip(weight) {
            out.push(value / root * f64::from(weight));
        }
    }
    out
}
