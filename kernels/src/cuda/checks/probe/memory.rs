use super::{probe, random_words, same, words};
use crate::OpError;
use crate::cuda::checks::Checker;
use crate::cuda::probe::Probe;
use crate::cuda::{Buffer, Grid};

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    matrices(c)?;
    copies(c)?;
    flags(c)?;
    atomics(c)?;
    barriers(c)?;
    cached(c)
}

/// Rows of eight half-words, as words.
pub(super) fn rows(halves: &[u16]) -> Vec<u32> {
    halves.as_chunks().0.iter().map(|&[low, high]| u32::from(low) | u32::from(high) << 16).collect()
}

/// All different, in both bytes.
pub(super) fn halves() -> Vec<u16> {
    (0..256).map(|i| (i * 257) ^ 3).collect()
}

fn matrices(c: &mut Checker) -> Result<(), OpError> {
    let halves = halves();
    let on_device = c.gpu().upload(&rows(&halves))?;
    // SAFETY: 14 words for each thread, from 32 rows.
    let found = unsafe { words(c, probe("probe_load_matrix", 32, Some(&on_device), None), 32 * 14) }?;
    let mut expected = Vec::new();
    for lane in 0..32 {
        for (matrices, transposed) in [(1, false), (1, true), (2, false), (2, true), (4, false), (4, true)] {
            for matrix in 0..matrices {
                let element = |half: usize| {
                    let (row, column) = (lane / 4, lane % 4 * 2 + half);
                    let (row, column) = if transposed { (column, row) } else { (row, column) };
                    u32::from(halves[(matrix * 8 + row) * 8 + column])
                };
                expected.push(element(0) | element(1) << 16);
            }
        }
    }
    same(c, "ldmatrix", &found, &expected);
    Ok(())
}

fn copies(c: &mut Checker) -> Result<(), OpError> {
    let given = random_words(c.random(), 448);
    let on_device = c.gpu().upload(&given)?;
    let mut copy = probe("probe_copy", 64, Some(&on_device), None);
    copy.grid.shared_bytes = 448 * 4;
    // SAFETY: as many words out as in.
    let found = unsafe { words(c, copy, 448) }?;
    let expected: Vec<u32> = (0..448)
        .map(|i| {
            let from = if i < 64 { i } else { 64 + ((i - 64) ^ 1) };
            let thread = match from {
                0..64 => from,
                64..192 => (from - 64) / 2,
                _ => (from - 192) / 4,
            };
            if thread % 2 == 0 { given[from] } else { 0 }
        })
        .collect();
    same(c, "cp.async of 4, 8 and 16 bytes, with zeros", &found, &expected);
    Ok(())
}

/// Runs a probe over words that have values before.
///
/// # Safety
/// They are as many as it reads and writes.
unsafe fn over(c: &Checker, probe: Probe<'_>, before: &[u32]) -> Result<Vec<u32>, OpError> {
    let mut out: Buffer = c.gpu().upload(before)?;
    // SAFETY: the caller vouches for it.
    unsafe { probe.run(&c.gpu(), &mut out)? };
    out.read()
}

fn flags(c: &mut Checker) -> Result<(), OpError> {
    // SAFETY: six words.
    let found = unsafe { over(c, probe("probe_flags", 64, None, None), &[0; 6]) }?;
    same(c, "flags in global memory", &found, &[1, 7, 11, 20, 31, 11]);
    Ok(())
}

fn atomics(c: &mut Checker) -> Result<(), OpError> {
    const BLOCKS: u32 = 3;
    const THREADS: u32 = 71;
    let mut probe = probe("probe_atomics", THREADS, None, None);
    probe.grid = Grid::linear(BLOCKS, THREADS);
    let before = [0, 5, 1, 0, 0, u32::MAX, 0, u32::MAX, 0, 0, 0, 0];
    // SAFETY: twelve words.
    let found = unsafe { over(c, probe, &before) }?;
    let sum = (BLOCKS * THREADS) as f32 / 2.0;
    let expected = [
        sum.to_bits(),
        (-70i32).cast_unsigned(),
        0,
        70 << 1,
        BLOCKS * THREADS % 7,
        1 + (BLOCKS - 1) * 2,
        (1 << 20) - 1,
        !((1 << 20) - 1),
        35,
        1,
        1,
        THREADS,
    ];
    same(c, "atomics, and barriers that count", &found, &expected);
    Ok(())
}

fn barriers(c: &mut Checker) -> Result<(), OpError> {
    // SAFETY: 34 words.
    let found = unsafe { words(c, probe("probe_barriers", 96, None, None), 34) }?;
    let sums = (0..32).map(|lane| lane * 5 + (lane + 32) * 5);
    let expected: Vec<u32> = sums.chain([95 * 96 / 2, 95]).collect();
    same(c, "barriers of some threads and of all", &found, &expected);
    Ok(())
}

fn cached(c: &mut Checker) -> Result<(), OpError> {
    let given = random_words(c.random(), 128);
    let on_device = c.gpu().upload(&given)?;
    // SAFETY: three words for each thread, from four.
    let found = unsafe { words(c, probe("probe_cached", 32, Some(&on_device), None), 96) }?;
    let sums = given[64..96].iter().zip(&given[96..]).map(|(a, b)| a.wrapping_add(*b));
    let expected: Vec<u32> = given[..64].iter().copied().chain(sums).collect();
    same(c, "cached loads and stores", &found, &expected);
    Ok(())
}
