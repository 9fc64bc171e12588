//! Many dot products at a time: the inner loop of linear layers and of attention scores.
//!
//! The order of summation, which every caller and every tile shape shares: lane `j` of a register sums the elements
//! `j`, `j + LANES`, `j + 2 LANES`, ... one after the other; [`Simd::sums`] adds the lanes. Zeros complete the last
//! register. So a dot product depends on its two rows only, and cutting it at a multiple of `LANES` changes nothing.

use super::simd::{Row, Simd};

/// Running sums of `R` rows times `C` inputs, lane by lane.
pub(super) type Sums<S, const R: usize, const C: usize> = [[<S as Simd>::Register; C]; R];

/// `sums[r][c] += rows[r] * inputs[c]`. All are of one length.
#[inline(always)]
pub(super) fn accumulate<S: Simd, W: Row, const R: usize, const C: usize>(
    simd: S,
    rows: [W; R],
    inputs: [&[f32]; C],
    sums: &mut Sums<S, R, C>,
) {
    let len = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == len) && inputs.iter().all(|input| input.len() == len));

    let whole = len - len % S::LANES;
    let mut at = 0;
    while at < whole {
        let mut registers = [simd.zero(); C];
        for (register, input) in registers.iter_mut().zip(inputs) {
            // SAFETY: a whole register is left at `at`, of this row as of all.
            *register = unsafe { input.load(simd, at) };
        }
        for (sums, row) in sums.iter_mut().zip(rows) {
            // SAFETY: as above.
            let weight = unsafe { row.load(simd, at) };
            for (sum, register) in sums.iter_mut().zip(registers) {
                *sum = simd.mul_add(weight, register, *sum);
            }
        }
        at += S::LANES;
    }
    if whole < len {
        for (sums, row) in sums.iter_mut().zip(rows) {
            let weight = row.load_tail(simd, whole);
            for (sum, input) in sums.iter_mut().zip(inputs) {
                *sum = simd.mul_add(weight, input.load_tail(simd, whole), *sum);
            }
        }
    }
}

/// The dot products of `R` rows with `C` inputs: `result[r][c]`.
#[inline(always)]
pub(super) fn dots<S: Simd, W: Row, const R: usize, const C: usize>(
    simd: S,
    rows: [W; R],
    inputs: [&[f32]; C],
) -> [[f32; C]; R] {
    let mut sums = [[simd.zero(); C]; R];
    accumulate(simd, rows, inputs, &mut sums);
    let mut dots = [[0.0; C]; R];
    for (dots, sums) in dots.as_flattened_mut().chunks_mut(4).zip(sums.as_flattened().chunks(4)) {
        let mut four = [simd.zero(); 4];
        four[..sums.len()].copy_from_slice(sums);
        dots.copy_from_slice(&simd.sums(four)[..dots.len()]);
    }
    dots
}
