use crate::cpu::simd::{Row, Simd};

/// `out = out * fade + sum over k of weights[k] * values[k]`, in the order of `k`.
#[inline(always)]
pub(super) fn add_values<S: Simd>(simd: S, fade: f32, weights: &[f32], values: &[&[f32]], out: &mut [f32]) {
    let mut at = 0;
    let width = out.len();
    while at + 8 * S::LANES <= width {
        add_columns::<S, 8>(simd, fade, weights, values, at, &mut out[at..]);
        at += 8 * S::LANES;
    }
    while at + 4 * S::LANES <= width {
        add_columns::<S, 4>(simd, fade, weights, values, at, &mut out[at..]);
        at += 4 * S::LANES;
    }
    while at + S::LANES <= width {
        add_columns::<S, 1>(simd, fade, weights, values, at, &mut out[at..]);
        at += S::LANES;
    }
    if at < width {
        let out = &mut out[at..];
        let mut sum = simd.mul((&*out).load_tail(simd, 0), simd.splat(fade));
        for (&weight, value) in weights.iter().zip(values) {
            sum = simd.mul_add(simd.splat(weight), value.load_tail(simd, at), sum);
        }
        simd.write(sum, out);
    }
}

/// [`add_values`] for `N` registers from column `at` on, which is where `out` starts.
#[inline(always)]
fn add_columns<S: Simd, const N: usize>(
    simd: S,
    fade: f32,
    weights: &[f32],
    values: &[&[f32]],
    at: usize,
    out: &mut [f32],
) {
    let out = &mut out[..N * S::LANES];
    let mut sums = [simd.zero(); N];
    for (n, sum) in sums.iter_mut().enumerate() {
        // SAFETY: `out` fills N registers.
        let old = unsafe { (&*out).load(simd, n * S::LANES) };
        *sum = simd.mul(old, simd.splat(fade));
    }
    for (&weight, value) in weights.iter().zip(values) {
        let value = &value[at..][..N * S::LANES];
        let weight = simd.splat(weight);
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `value` fills N registers.
            let value = unsafe { value.load(simd, n * S::LANES) };
            *sum = simd.mul_add(weight, value, *sum);
        }
    }
    for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(S::LANES)) {
        simd.write(sum, out);
    }
}
