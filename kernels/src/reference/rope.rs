use crate::{RopeLayout, RopeTable};

/// Rotates each pair of each head by its angle in the token's row of the table.
///
/// `x`: `[T, any number of heads, head_dim]`, `angles`: `[T]`. Source: Su et al. 2021 (RoFormer), section 3.4.2.
pub fn rope(x: &[f32], head_dim: usize, angles: &[u32], table: &RopeTable<'_>) -> Vec<f64> {
    let mut out: Vec<f64> = x.iter().copied().map(f64::from).collect();
    let width = x.len() / angles.len();
    let half = table.rotary_dim / 2;
    for (token, &angle) in out.chunks_exact_mut(width).zip(angles) {
        for head in token.chunks_exact_mut(head_dim) {
            let head = &mut head[table.start..];
            for pair in 0..half {
                let (first, second) = match table.layout {
                    RopeLayout::HalfSplit => (pair, pair + half),
                    RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                };
                let cos = f64::from(table.cos[angle as usize * half + pair]);
                let sin = f64::from(table.sin[angle as usize * half + pair]);
                let (a, b) = (head[first], head[second]);
                head[first] = a * cos - b * sin;
                head[second] = b * cos + a * sin;
            }
        }
    }
    out
}

/// Stores row `t` in slot `slots[t]` of the cache: `rows`: `[T, width]`, `cache`: `[slots, width]`.
///
/// Where a slot is named twice, the last row stays.
pub fn write_cache(cache: &mut [f64], rows: &[f64], slots: &[u32]) {
    let width = rows.len() / slots.len();
    for (row, &slot) in rows.chunks_exact(width).zip(slots) {
        cache[slot as usize * width..][..width].copy_from_slice(row);
    }
}
