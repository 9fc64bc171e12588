use crate::Matrix;

/// `out[t, o] = sum over i of input[t, i] * weight[o, i] + bias[o]`.
///
/// `input`: `[T, inputs]`, `weight`: `[outputs, inputs]`, `bias`: `[outputs]`, result: `[T, outputs]`.
pub fn linear(input: &[f32], weight: &Matrix<'_>, bias: Option<&[f32]>) -> Vec<f64> {
    let mut out = Vec::new();
    for token in input.chunks_exact(weight.cols()) {
        for row in 0..weight.rows() {
            let mut sum = bias.map_or(0.0, |bias| f64::from(bias[row]));
            for (col, &x) in token.iter().enumerate() {
                sum += f64::from(x) * f64::from(weight.element(row, col));
            }
            out.push(sum);
        }
    }
    out
}
