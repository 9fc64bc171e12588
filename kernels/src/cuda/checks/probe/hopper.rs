use super::memory::{halves, rows};
use super::products::{Product, floats};
use super::{probe, random_words, same, words};
use crate::OpError;
use crate::cuda::checks::Checker;
use crate::cuda::{E4M3, E5M2};

const MODULE: &str = "probe_hopper";

/// Products of eight bits are summed with some fourteen digits.
const PRODUCTS: [Product; 2] = [
    Product {
        name: "probe_multiply_e4m3",
        bits: 8,
        encode: |x| u32::from(E4M3::from_f32(x).0),
        decode: |bits| E4M3(bits as u8).to_f32(),
        roundings: 4096.0,
    },
    Product {
        name: "probe_multiply_e5m2",
        bits: 8,
        encode: |x| u32::from(E5M2::from_f32(x).0),
        decode: |bits| E5M2(bits as u8).to_f32(),
        roundings: 4096.0,
    },
];

/// Nothing on a GPU that is older.
pub(in crate::cuda::checks) fn check_hopper(c: &mut Checker) -> Result<(), OpError> {
    // An emulated one can do all of it.
    if (1..9).contains(&c.gpu().properties().capability.0) {
        return Ok(());
    }
    for product in PRODUCTS {
        floats(c, MODULE, product)?;
    }
    let halves = halves();
    let on_device = c.gpu().upload(&rows(&halves))?;
    let mut store = probe("probe_store_matrix", 32, Some(&on_device), None);
    store.kernel.module = MODULE;
    // SAFETY: 48 rows, from 32.
    let found = unsafe { words(c, store, 48 * 4) }?;
    same(c, "stmatrix", &found, &rows(&[&halves[..], &halves[..128]].concat()));
    for rows in [1, 2, 3, 7] {
        pipeline(c, rows)?;
    }
    Ok(())
}

fn pipeline(c: &mut Checker, rows: usize) -> Result<(), OpError> {
    let given = random_words(c.random(), rows * 64);
    let on_device = c.gpu().upload(&given)?;
    let mut pipeline = probe("probe_pipeline", 64, Some(&on_device), None);
    (pipeline.kernel.module, pipeline.count) = (MODULE, rows as u32);
    // SAFETY: one word for each lane, from `rows` rows of 64 words.
    let found = unsafe { words(c, pipeline, 32) }?;
    let of_lane = |lane: usize| given.iter().skip(lane).step_by(32).fold(0u32, |sum, x| sum.wrapping_add(*x));
    let expected: Vec<u32> = (0..32).map(of_lane).collect();
    same(c, &format!("bulk copies on mbarriers, {rows} rows"), &found, &expected);
    Ok(())
}
