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

/// Group `g` multiplies its inputs with its rows: `out[t, g, o] = sum over i of input[t, g, i] * weight[g, o, i]`.
///
/// `input`: `[T, groups, inputs]`, `weight`: `[groups * outputs, inputs]`, result: `[T, groups, outputs]`.
pub fn linear_per_head(input: &[f32], weight: &Matrix<'_>, groups: usize) -> Vec<f64> {
    let outputs = weight.rows() / groups;
    let mut out = Vec::new();
    for token in input.chunks_exact(groups * weight.cols()) {
        for (group, token) in token.chunks_exact(weight.cols()).enumerate() {
            for row in group * outputs..(group + 1) * outputs {
                let mut sum = 0.0;
                for (col, &x) in token.iter().enumerate() {
                    sum += f64::from(x) * f64::from(weight.element(row, col));
                }
                out.push(sum);
            }
        }
    }
    out
}
