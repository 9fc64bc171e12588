use std::ops::Range;

use super::Scores;
use crate::cpu::simd::{Row, Simd};

/// Weighted sums of a group's values, one per head: `out = out * fade + sum over k of weights[k] * values[k]`, in the
/// order of `k` and `H` heads at a time.
///
/// - `fades`: at least one per head
/// - `weights`: of each head, those in `visible` count
/// - `values`: one per visible weight, `[width]`
/// - `out`: `[heads, width]`
///
/// A few columns are summed for all heads before the next ones, so that values come from far away only once.
#[inline(always)]
pub(super) fn add_values<S: Simd, const H: usize>(
    simd: S,
    fades: &[f32],
    weights: &Scores,
    visible: Range<usize>,
    values: &[&[f32]],
    out: &mut [f32],
) {
    let mut at = 0;
    let width = values[0].len();
    // One head alone needs more columns to hide the latency of an addition.
    while H == 1 && at + 8 * S::LANES <= width {
        at = columns::<S, H, 8>(simd, fades, weights, visible.clone(), values, at, out);
    }
    while at + 4 * S::LANES <= width {
        at = columns::<S, H, 4>(simd, fades, weights, visible.clone(), values, at, out);
    }
    while at + S::LANES <= width {
        at = columns::<S, H, 1>(simd, fades, weights, visible.clone(), values, at, out);
    }
    if at < width {
        for ((out, weights), &fade) in out.chunks_exact_mut(width).zip(weights).zip(fades) {
            let out = &mut out[at..];
            let mut sum = simd.mul((&*out).load_tail(simd, 0), simd.splat(fade));
            for (&weight, value) in weights[visible.clone()].iter().zip(values) {
                sum = simd.mul_add(simd.splat(weight), value.load_tail(simd, at), sum);
            }
            simd.write(sum, out);
        }
    }
}

/// [`add_values`] for `N` registers from column `at` on. Answers the column after them.
#[inline(always)]
fn columns<S: Simd, const H: usize, const N: usize>(
    simd: S,
    fades: &[f32],
    weights: &Scores,
    visible: Range<usize>,
    values: &[&[f32]],
    at: usize,
    out: &mut [f32],
) -> usize {
    let width = values[0].len();
    for first in (0..out.len() / width).step_by(H) {
        // Where fewer heads are left, the last one is summed repeatedly, and written once.
        let out = &mut out[first * width..];
        let left = (out.len() / width).min(H);
        let head = |h: usize| h.min(left - 1);
        let weights: [&[f32]; H] = std::array::from_fn(|h| &weights[first + head(h)][visible.clone()]);

        let mut sums = [[simd.zero(); N]; H];
        for (h, sums) in sums.iter_mut().enumerate() {
            let old = &out[head(h) * width + at..][..N * S::LANES];
            for (n, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `old` fills N registers.
                let old = unsafe { old.load(simd, n * S::LANES) };
                *sum = simd.mul(old, simd.splat(fades[first + head(h)]));
            }
        }
        for (k, value) in values.iter().enumerate() {
            let value = &value[at..][..N * S::LANES];
            let mut splat = [simd.zero(); H];
            for (splat, weights) in splat.iter_mut().zip(&weights) {
                *splat = simd.splat(weights[k]);
            }
            for n in 0..N {
                // SAFETY: `value` fills N registers.
                let value = unsafe { value.load(simd, n * S::LANES) };
                for (sums, &weight) in sums.iter_mut().zip(&splat) {
                    sums[n] = simd.mul_add(weight, value, sums[n]);
                }
            }
        }
        for (h, sums) in sums.iter().enumerate().take(left) {
            for (sum, out) in sums.iter().zip(out[h * width + at..].chunks_exact_mut(S::LANES)) {
                simd.write(*sum, out);
            }
        }
    }
    at + N * S::LANES
}
