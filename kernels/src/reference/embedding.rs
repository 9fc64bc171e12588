use crate::Matrix;

/// `out[t] = table[ids[t]]`; `table`: `[vocabulary, width]`, result: `[T, width]`.
pub fn embedding(table: &Matrix<'_>, ids: &[u32]) -> Vec<f64> {
    let mut out = Vec::with_capacity(ids.len() * table.cols());
    for &id in ids {
        for col in 0..table.cols() {
            out.push(f64::from(table.element(id as usize, col)));
        }
    }
    out
}
