//! Whether hardware and built-in functions mean what the emulation of kernels takes them to mean: results that are known,
//! of kernels that do nothing else. What they find on a GPU tells a wrong kernel from a wrong emulation.
//!
//! - here: votes, shuffles and reductions of a warp; functions of bits; arithmetic
//! - `formats`: number formats, and functions that are approximated
//! - `memory`: copies, matrices, flags, atomics, barriers
//! - `products`: tensor cores
//! - `hopper`: what came with compute capability 9.0

mod formats;
mod hopper;
mod memory;
mod products;

use super::{Checker, Random};
use crate::OpError;
use crate::cuda::probe::Probe;
use crate::cuda::{Buffer, Element, Grid, Kernel};

pub(super) use hopper::check_hopper;

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    warp(c)?;
    of_bits(c)?;
    of_numbers(c)?;
    formats::check(c)?;
    memory::check(c)?;
    products::check(c)
}

/// A probe in one block.
fn probe<'a>(name: &'static str, threads: u32, a: Option<&'a Buffer>, b: Option<&'a Buffer>) -> Probe<'a> {
    let count = a.map_or(0, |a| a.len() as u32);
    Probe { kernel: Kernel { module: "probe", name }, grid: Grid::linear(1, threads), a, b, count }
}

/// The words that a probe writes.
///
/// # Safety
/// It writes so many, and reads what it is given.
unsafe fn words(c: &Checker, probe: Probe<'_>, len: usize) -> Result<Vec<u32>, OpError> {
    let mut out = c.unwritten(Element::U32, len)?;
    // SAFETY: the caller vouches for it.
    unsafe { probe.run(&c.gpu(), &mut out)? };
    out.read()
}

/// Words must be the same; the case says which of them is not.
fn same(c: &mut Checker, case: &str, found: &[u32], expected: &[u32]) {
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    let case = match wrong {
        Some(at) => format!("{case}, word {at}: {:#x}, not {:#x}", found[at], expected[at]),
        None => case.to_owned(),
    };
    c.equal(case, found, expected);
}

fn warp(c: &mut Checker) -> Result<(), OpError> {
    // SAFETY: 24 words per thread.
    let found = unsafe { words(c, probe("probe_warp", 32, None, None), 32 * 24) }?;
    let expected: Vec<u32> = (0..32u32).flat_map(warp_of).collect();
    same(c, "shuffles, votes, matches and reductions of a warp", &found, &expected);
    Ok(())
}

fn warp_of(lane: u32) -> [u32; 24] {
    let unless = |condition: bool, other: u32| if condition { lane } else { other };
    let same_fifth = (0..32).filter(|other| other / 5 == lane / 5).map(|other| 1 << other).sum();
    [
        15,
        (lane / 8 * 8 + 1) * 3,
        unless(lane < 3, lane.wrapping_sub(3)),
        unless(lane % 16 < 3, lane.wrapping_sub(3)),
        unless(lane + 5 > 31, lane + 5),
        unless(lane % 8 + 5 > 7, lane + 5),
        lane ^ 17,
        unless((lane ^ 12) > (lane | 7), lane ^ 12),
        0x4924_9249,
        2,
        same_fifth,
        u32::MAX,
        1,
        496,
        31,
        4,
        0,
        0x509,
        if lane < 16 { (lane ^ 1) + 16 } else { 0xaaaa_0000 },
        ((lane ^ 2) as f32).to_bits(),
        496,
        31,
        (127 + lane) << 23,
        32,
    ]
}

fn of_bits(c: &mut Checker) -> Result<(), OpError> {
    let mut word = |_| c.random().below(1 << 32) as u32;
    let mut a: Vec<u32> = (0..100).map(&mut word).collect();
    let mut b: Vec<u32> = (0..100).map(word).collect();
    a[..4].copy_from_slice(&[0, u32::MAX, 1, 1 << 31]);
    b[..4].copy_from_slice(&[0, u32::MAX, 1 << 31, 1]);
    let (on_a, on_b) = (c.gpu().upload(&a)?, c.gpu().upload(&b)?);
    // SAFETY: 16 words for each pair.
    let found = unsafe { words(c, probe("probe_bits", 64, Some(&on_a), Some(&on_b)), 1600) }?;
    let expected: Vec<u32> = a.iter().zip(&b).flat_map(|(&a, &b)| bits_of(a, b)).collect();
    same(c, "functions of bits", &found, &expected);
    Ok(())
}

fn bits_of(a: u32, b: u32) -> [u32; 16] {
    let wide = u64::from(b) << 32 | u64::from(a);
    // One more than the place of the lowest bit, or zero.
    let first = |bits: u64| if bits == 0 { 0 } else { bits.trailing_zeros() + 1 };
    let high = ((u128::from(wide) * u128::from(!wide)) >> 64) as u64;
    let products: i32 = a
        .to_le_bytes()
        .into_iter()
        .zip(b.to_le_bytes())
        .map(|(a, b)| i32::from(a.cast_signed()) * i32::from(b.cast_signed()))
        .sum();
    let (signed_a, signed_b) = (a.cast_signed(), b.cast_signed());
    [
        a.reverse_bits(),
        a.leading_zeros() | wide.leading_zeros() << 8 | first(u64::from(a)) << 16 | first(wide) << 24,
        a.count_ones() | wide.count_ones() << 8,
        ((i64::from(signed_a) * i64::from(signed_b)) >> 32) as u32,
        ((u64::from(a) * u64::from(b)) >> 32) as u32,
        high as u32 ^ (high >> 32) as u32,
        ((wide << (b & 31)) >> 32) as u32,
        (wide >> (b & 31)) as u32,
        permuted(wide, b & 0x7777),
        permuted(wide, a),
        (products - 5).cast_unsigned(),
        (a & b) | a << 8,
        a ^ b ^ !b << 3,
        a.min(b) ^ signed_a.max(signed_b).cast_unsigned(),
        (a as f32).to_bits(),
        (signed_b as f32).to_bits(),
    ]
}

/// Four of eight bytes, by a selector of four bits each; the fourth bit spreads the byte's sign.
fn permuted(bytes: u64, selector: u32) -> u32 {
    let byte = |i: usize| {
        let select = selector >> (4 * i) & 15;
        let byte = (bytes >> (8 * (select & 7))) as u8;
        if select & 8 == 0 { byte } else { (byte.cast_signed() >> 7).cast_unsigned() }
    };
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

fn of_numbers(c: &mut Checker) -> Result<(), OpError> {
    let mut a: Vec<f32> = c.random().numbers(100).iter().map(|x| x * 50.0).collect();
    let mut b: Vec<f32> = c.random().numbers(100).iter().map(|x| x * 3.0).collect();
    // Halves, a sum that rounds to even, subnormal products and quotients, and what integers cannot hold.
    a[..6].copy_from_slice(&[2.5, 16_777_216.0, 1e-30, 1e-39, 3e9, -3e9]);
    b[..6].copy_from_slice(&[-3.5, 1.0, 3e-9, 7.0, 5e9, 4e9]);
    let (on_a, on_b) = (c.gpu().upload(&a)?, c.gpu().upload(&b)?);
    // SAFETY: 12 words for each pair.
    let found = unsafe { words(c, probe("probe_numbers", 64, Some(&on_a), Some(&on_b)), 1200) }?;
    let expected: Vec<u32> = a.iter().zip(&b).flat_map(|(&a, &b)| numbers_of(a, b)).collect();
    same(c, "arithmetic", &found, &expected);
    Ok(())
}

fn numbers_of(a: f32, b: f32) -> [u32; 12] {
    let both = (f64::from(a) * f64::from(b)).to_bits();
    let int = |x: f32| (x as i32).cast_unsigned();
    [
        (a + b).to_bits(),
        (a - b).to_bits(),
        (a * b).to_bits(),
        (a / b).to_bits(),
        a.mul_add(b, -a).to_bits(),
        a.abs().sqrt().to_bits(),
        a.max(b).to_bits() ^ a.min(-b).to_bits(),
        int(a.round_ties_even()) ^ int(b) << 16,
        int(a.floor()) ^ int(b.ceil()) << 16,
        a.round_ties_even() as u32 ^ (b as u32) << 16,
        a.clamp(0.0, 1.0).to_bits(),
        both as u32 ^ (both >> 32) as u32,
    ]
}

/// Words that depend on the seed alone.
fn random_words(random: &mut Random, len: usize) -> Vec<u32> {
    (0..len).map(|_| random.below(1 << 32) as u32).collect()
}
