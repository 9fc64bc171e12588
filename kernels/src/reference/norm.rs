use crate::{Norm, NormKind};

/// `out[i] = (x[i] - mean) / sqrt(mean square of the same + eps) * weight + bias`, where the root-mean-square norm leaves
/// the mean alone; `x`: `[rows, width]`.
///
/// Sources: Zhang and Sennrich 2019 (root mean square layer normalization), equation 4; Ba et al. 2016 (layer
/// normalization), equation 3.
pub fn norm(x: &[f32], norm: &Norm<'_>) -> Vec<f64> {
    let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
    of(&x, norm)
}

/// The new residual `residual + delta`, and its norm.
pub fn add_norm(residual: &[f32], delta: &[f32], norm: &Norm<'_>) -> (Vec<f64>, Vec<f64>) {
    let residual = super::add(residual, delta);
    let normed = of(&residual, norm);
    (residual, normed)
}

fn of(x: &[f64], norm: &Norm<'_>) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for (index, row) in x.chunks_exact(norm.width).enumerate() {
        let width = norm.width as f64;
        let center = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => row.iter().sum::<f64>() / width,
        };
        let mut squares = 0.0;
        for value in row {
            squares += (value - center) * (value - center);
        }
        let root = (squares / width + f64::from(norm.eps)).sqrt();
        for (at, value) in row.iter().enumerate() {
            let weight = norm.weight_of(index).map_or(1.0, |weight| f64::from(weight[at]));
            let bias = norm.bias_of(index).map_or(0.0, |bias| f64::from(bias[at]));
            out.push((value - center) / root * weight + bias);
        }
    }
    out
}
