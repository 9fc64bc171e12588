use half::{bf16, f16};

use super::{probe, same, words};
use crate::OpError;
use crate::cuda::Element;
use crate::cuda::checks::Checker;

/// A probe of 16 x K by K x 8.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) name: &'static str,
    /// Of an element.
    pub(super) bits: u32,
    /// Into an element's bits, from a number up to one.
    pub(super) encode: fn(f32) -> u32,
    pub(super) decode: fn(u32) -> f32,
    /// Of f32, of the largest error: tensor cores cut off more digits than they would round.
    pub(super) roundings: f64,
}

const PRODUCTS: [Product; 3] = [
    Product {
        name: "probe_multiply_bf16",
        bits: 16,
        encode: |x| u32::from(bf16::from_f32(x).to_bits()),
        decode: |bits| bf16::from_bits(bits as u16).to_f32(),
        roundings: 16.0,
    },
    Product {
        name: "probe_multiply_f16",
        bits: 16,
        encode: |x| u32::from(f16::from_f32(x).to_bits()),
        decode: |bits| f16::from_bits(bits as u16).to_f32(),
        roundings: 16.0,
    },
    Product {
        name: "probe_multiply_tf32",
        bits: 32,
        encode: f32::to_bits,
        // What is behind ten digits is not looked at.
        decode: |bits| f32::from_bits(bits & 0xffff_e000),
        roundings: 16.0,
    },
];

const INTEGERS: Product = Product {
    name: "probe_multiply_s8",
    bits: 8,
    encode: |x| u32::from(((x * 128.0) as i8).cast_unsigned()),
    decode: |bits| f32::from((bits as u8).cast_signed()),
    roundings: 0.0,
};

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for product in PRODUCTS {
        floats(c, "probe", product)?;
    }
    let (a, b) = (given(c, INTEGERS, 128), given(c, INTEGERS, 64));
    let (on_a, on_b) = (c.gpu().upload(&a)?, c.gpu().upload(&b)?);
    // SAFETY: 16 rows and 8 rows of eight words, 16 x 8 sums.
    let found = unsafe { words(c, probe(INTEGERS.name, 32, Some(&on_a), Some(&on_b)), 128) }?;
    let sums = exact(&a, &b, INTEGERS).into_iter().map(|sum| (sum as i32).cast_unsigned());
    same(c, INTEGERS.name, &found, &sums.collect::<Vec<_>>());
    Ok(())
}

pub(super) fn floats(c: &mut Checker, module: &'static str, product: Product) -> Result<(), OpError> {
    let (a, b) = (given(c, product, 128), given(c, product, 64));
    let (on_a, on_b) = (c.gpu().upload(&a)?, c.gpu().upload(&b)?);
    let mut multiply = probe(product.name, 32, Some(&on_a), Some(&on_b));
    multiply.kernel.module = module;
    let mut out = c.unwritten(Element::F32, 128)?;
    // SAFETY: 16 rows and 8 rows of eight words, 16 x 8 sums.
    unsafe { multiply.run(&c.gpu(), &mut out)? };
    c.close(product.name, &out, &exact(&a, &b, product), product.roundings)
}

/// Words of elements, the first in the lowest bits.
fn given(c: &mut Checker, product: Product, words: usize) -> Vec<u32> {
    let per_word = (32 / product.bits) as usize;
    let numbers = c.random().numbers(words * per_word);
    let word = |word: &[f32]| {
        word.iter().rev().fold(0, |word, &x| word << (product.bits % 32) | (product.encode)(x))
    };
    numbers.chunks_exact(per_word).map(word).collect()
}

/// Rows of eight words each; the sums of products of every row of `a` with every row of `b`.
fn exact(a: &[u32], b: &[u32], product: Product) -> Vec<f64> {
    let element = |word: u32, i: u32| {
        let bits = word >> (i * product.bits) & (u32::MAX >> (32 - product.bits));
        f64::from((product.decode)(bits))
    };
    let row = |words: &[u32]| -> Vec<f64> {
        words.iter().flat_map(|&word| (0..32 / product.bits).map(move |i| element(word, i))).collect()
    };
    let (rows, columns) = (a.chunks_exact(8).map(row), b.chunks_exact(8).map(row).collect::<Vec<_>>());
    let sums = |row: Vec<f64>| -> Vec<f64> {
        columns.iter().map(|column| row.iter().zip(column).map(|(a, b)| a * b).sum()).collect()
    };
    rows.flat_map(sums).collect()
}
