use crate::Matrix;

/// `out[t] = table[ids[t] - first_id]`, zeros where the table has no such row; `table`: `[ids of this rank, width]`,
/// result: `[T, width]`.
pub fn embedding(table: &Matrix<'_>, ids: &[u32], first_id: u32) -> Vec<f64> {
    let mut out = Vec::with_capacity(ids.len() * table.cols());
    for &id in ids {
        let row = id.checked_sub(first_id).map(|row| row as usize).filter(|&row| row < table.rows());
        for col in 0..table.cols() {
            out.push(row.map_or(0.0, |row| f64::from(table.element(row, col))));
        }
    }
    out
}

/// `x[t] + table[ids[t]]`; `table`: `[rows, width]`, `x`, result: `[T, width]`.
pub fn add_embedding(table: &Matrix<'_>, ids: &[u32], x: &[f32]) -> Vec<f64> {
    let rows = embedding(table, ids, 0);
    x.iter().zip(rows).map(|(&x, row)| f64::from(x) + row).collect()
}
