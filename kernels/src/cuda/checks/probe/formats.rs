use half::{bf16, f16};

use super::{probe, random_words, same, words};
use crate::OpError;
use crate::cuda::checks::{Checker, Finding};
use crate::cuda::{E4M3, E5M2};

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    rounding(c)?;
    widening(c)?;
    functions(c)
}

/// Ties, the ends of every format, and anything else.
fn floats(c: &mut Checker) -> Vec<f32> {
    let largest =
        [448.0, 464.0, 464.1, 480.0, 57_344.0, 61_440.0, 65_504.0, 65_519.9, 65_520.0, 3.39e38, f32::MAX];
    let smallest = [1e-3, 9.8e-4, 7.7e-6, 7.6e-6, 6e-8, 2.9e-8, 1e-40, f32::MIN_POSITIVE, 0.0, 1.0];
    let special = [f32::INFINITY, f32::NAN];
    let mut floats: Vec<f32> = largest.into_iter().chain(smallest).chain(special).collect();
    floats.extend(floats.clone().iter().map(|x| -x));
    for word in random_words(c.random(), 300) {
        // The digits behind each format's last: half, more and less than half, none.
        for digits in [20, 21, 13, 12, 16, 17] {
            let tail = 1 << (digits - 1);
            let head = word >> digits << digits;
            floats.extend([head | tail, head | tail | 1, head | (tail - 1), head].map(f32::from_bits));
        }
    }
    floats
}

/// NaN has many patterns: `largest` is the last that is a number.
fn one_nan(bits: u32, largest: u32, sign: u32) -> u32 {
    if bits & !sign > largest { u32::MAX } else { bits }
}

fn rounding(c: &mut Checker) -> Result<(), OpError> {
    let floats = floats(c);
    let on_device = c.gpu().upload(&floats)?;
    // SAFETY: five words for each.
    let found = unsafe { words(c, probe("probe_round", 64, Some(&on_device), None), floats.len() * 5) }?;
    let expected: Vec<u32> = floats.iter().flat_map(|&x| rounded(x)).collect();
    let plain = |words: &[u32]| -> Vec<u32> {
        let rows = words.as_chunks::<5>().0;
        rows.iter()
            .flat_map(|&[half, brain, e4m3, e5m2, tf32]| {
                [
                    one_nan(half, 0x7c00, 0x8000),
                    one_nan(brain, 0x7f80, 0x8000),
                    one_nan(e4m3, 0x7e, 0x80),
                    one_nan(e5m2, 0x7c, 0x80),
                    one_nan(tf32, 0x7f80_0000, 1 << 31),
                ]
            })
            .collect()
    };
    same(c, "rounding to shorter formats", &plain(&found), &plain(&expected));
    Ok(())
}

fn rounded(x: f32) -> [u32; 5] {
    let bits = x.to_bits();
    // To the nearest of ten digits; ties go away from zero.
    let tf32 = if x.is_nan() { bits } else { (bits + 0x1000) & 0xffff_e000 };
    [
        u32::from(f16::from_f32(x).to_bits()),
        u32::from(bf16::from_f32(x).to_bits()),
        u32::from(E4M3::from_f32(x).0),
        u32::from(E5M2::from_f32(x).0),
        tf32,
    ]
}

fn widening(c: &mut Checker) -> Result<(), OpError> {
    // Every pattern of eight bits, and many of sixteen.
    let patterns: Vec<u32> = (0..256).chain((256..1 << 16).step_by(37)).collect();
    let on_device = c.gpu().upload(&patterns)?;
    // SAFETY: four words for each.
    let found = unsafe { words(c, probe("probe_widen", 64, Some(&on_device), None), patterns.len() * 4) }?;
    let expected: Vec<u32> = patterns
        .iter()
        .flat_map(|&pattern| {
            let infinite = if pattern & 0x80 == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
            let e5m2 = if pattern & 0x7f == 0x7c { infinite } else { E5M2(pattern as u8).to_f32() };
            [
                f16::from_bits(pattern as u16).to_f32(),
                bf16::from_bits(pattern as u16).to_f32(),
                E4M3(pattern as u8).to_f32(),
                e5m2,
            ]
        })
        .map(f32::to_bits)
        .collect();
    let plain = |words: &[u32]| -> Vec<u32> {
        words.iter().map(|&word| one_nan(word, 0x7f80_0000, 1 << 31)).collect()
    };
    same(c, "widening of shorter formats", &plain(&found), &plain(&expected));
    Ok(())
}

/// Each within so many roundings of its exact value, as the vendor's manual has them and a little more.
fn functions(c: &mut Checker) -> Result<(), OpError> {
    type Exact = fn(f64, f64) -> f64;
    const FUNCTIONS: [(&str, f64, Exact); 7] = [
        ("expf", 4.0, |a, _| a.exp()),
        ("tanhf", 6.0, |a, _| a.tanh()),
        ("rsqrtf", 6.0, |a, _| 1.0 / a.abs().sqrt()),
        ("powf", 20.0, |a, b| a.abs().powf(b)),
        ("logf", 4.0, |a, _| a.abs().ln()),
        ("ex2.approx", 6.0, |a, _| a.exp2()),
        ("__expf", 100.0, |a, _| a.exp()),
    ];
    let a: Vec<f32> = c.random().numbers(300).iter().map(|x| x * 20.0 + 1e-3).collect();
    let b: Vec<f32> = c.random().numbers(300).iter().map(|x| x * 8.0).collect();
    let (on_a, on_b) = (c.gpu().upload(&a)?, c.gpu().upload(&b)?);
    // SAFETY: seven words for each pair.
    let found = unsafe { words(c, probe("probe_functions", 64, Some(&on_a), Some(&on_b)), 2100) }?;
    for (column, (name, roundings, exact)) in FUNCTIONS.into_iter().enumerate() {
        let errors = found.as_chunks::<7>().0.iter().zip(a.iter().zip(&b)).map(|(row, (&a, &b))| {
            let (found, exact) = (f64::from(f32::from_bits(row[column])), exact(f64::from(a), f64::from(b)));
            (found - exact).abs() / exact.abs().max(1e-30) / 2f64.powi(-24) / roundings
        });
        // NaN is the worst of all.
        let error = errors.fold(0.0, |worst, error| if error <= worst { worst } else { error });
        c.findings.push(Finding { case: name.to_owned(), error });
    }
    Ok(())
}
