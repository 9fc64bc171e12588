//! Repeatable inputs for the tests, and every way to run them.

mod mixture;

use std::num::NonZeroUsize;

use half::{bf16, f16};
use kernels::cpu::{Cpu, Isa};
use kernels::{DType, Matrix};
pub(crate) use mixture::Mixture;

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A machine with each instruction set that this one has, with that many threads.
pub(crate) fn cpus(threads: usize) -> Vec<Cpu> {
    let threads = NonZeroUsize::new(threads).expect("tests ask for threads");
    Isa::available().map(|isa| Cpu::with_isa(threads, isa).expect("an available instruction set")).collect()
}

/// An output nobody has written: what is missed shows.
pub(crate) fn unwritten(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

/// Numbers between -1 and 1 that depend on the seed alone (xorshift, Marsaglia 2003).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    pub(crate) fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.number()).collect()
    }

    /// The numbers from 0 to `len`, shuffled.
    pub(crate) fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut items: Vec<u32> = (0..len as u32).collect();
        for last in (1..len).rev() {
            items.swap(last, self.below(last + 1));
        }
        items
    }
}

/// A weight that owns its bytes, which begin at an odd address or not.
pub(crate) struct Weight {
    bytes: Vec<u8>,
    offset: usize,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Weight {
    pub(crate) fn random(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> Self {
        let values = random.numbers(rows * cols);
        let stored: Vec<u8> = values
            .into_iter()
            .flat_map(|value| match dtype {
                DType::F32 => value.to_le_bytes().to_vec(),
                DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            })
            .collect();
        Self::new(&stored, dtype, rows, cols)
    }

    /// Places the bytes so that no element is aligned.
    pub(crate) fn new(stored: &[u8], dtype: DType, rows: usize, cols: usize) -> Self {
        let mut bytes = vec![0; stored.len() + 2];
        let offset = if bytes.as_ptr().addr().is_multiple_of(2) { 1 } else { 2 };
        bytes[offset..][..stored.len()].copy_from_slice(stored);
        bytes.truncate(offset + stored.len());
        Self { bytes, offset, dtype, rows, cols }
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes[self.offset..], self.dtype, self.rows, self.cols)
            .expect("bytes of that shape")
    }
}
