//! Many dot products at a time: the inner loop of linear layers and of attention scores.
//!
//! The order of summation, which every caller and every tile shape shares: lane `j` of a register sums the elements
//! `j`, `j + LANES`, `j + 2 LANES`, ... one after the other; [`Simd::sums`] adds the lanes. Zeros complete the last
//! register. So a dot product depends on its two rows only, and cutting it at a multiple of `LANES` changes nothing.

use super::simd::{Row, Simd};

/// The dot products of `R` rows with `C` inputs, all of one length: `result[r][c]`.
#[inline(always)]
pub(super) fn dots<S: Simd, W: Row, const R: usize, const C: usize>(
    simd: S,
    rows: [W; R],
    inputs: [&[f32]; C],
) -> [[f32; C]; R] {
    let len = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == len) && inputs.iter().all(|input| input.len() == len));

    let mut sums = [[simd.zero(); C]; R];
    let whole = len - len % S::LANES;
    let mut at = 0;
    while at < whole {
        let mut registers = [simd.zero(); C];
        for (register, input) in registers.iter_mut().zip(&inputs) {
            // SAFETY: a whole register is left at `at`, of this row as of all.
            *register = unsafe { input.load(simd, at) };
        }
        for (sums, row) in sums.iter_mut().zip(&rows) {
            // SAFETY: as above.
            let weight = unsafe { row.load(simd, at) };
            for (sum, register) in sums.iter_mut().zip(&registers) {
                *sum = simd.mul_add(weight, *register, *sum);
            }
        }
        at += S::LANES;
    }
    if whole < len {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let weight = row.load_tail(simd, whole);
            for (sum, input) in sums.iter_mut().zip(inputs) {
                *sum = simd.mul_add(weight, input.load_tail(simd, whole), *sum);
            }
        }
    }
    reduce(simd, sums)
}

/// The sum of a row, in the same order.
#[inline(always)]
pub(super) fn sum<S: Simd>(simd: S, row: impl Row) -> f32 {
    let mut sum = simd.zero();
    let whole = row.len() - row.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: a whole register is left at `at`.
        sum = simd.add(sum, unsafe { row.load(simd, at) });
    }
    if whole < row.len() {
        sum = simd.add(sum, row.load_tail(simd, whole));
    }
    simd.sum(sum)
}

/// The sum of each register's lanes. They are added four registers at a time, down each column.
#[inline(always)]
fn reduce<S: Simd, const R: usize, const C: usize>(simd: S, sums: [[S::Register; C]; R]) -> [[f32; C]; R] {
    let mut dots = [[0.0; C]; R];
    for first in (0..R).step_by(4) {
        for c in 0..C {
            let mut four = [simd.zero(); 4];
            for (four, sums) in four.iter_mut().zip(&sums[first..]) {
                *four = sums[c];
            }
            for (dots, dot) in dots[first..].iter_mut().zip(simd.sums(four)) {
                dots[c] = dot;
            }
        }
    }
    dots
}
