//! Weights that no file holds: seeded random numbers in the shapes that the configuration asks for, to measure a model
//! without its checkpoint.

use std::hash::{DefaultHasher, Hash, Hasher};

use kernels::DType;

use super::Weight;
use super::region::Region;

/// Random weights. An element depends on the seed, the tensor's name and its place alone, so that ranks agree.
#[derive(Clone, Copy, Debug)]
pub struct RandomWeights {
    /// Other seeds, other weights.
    pub seed: u64,
    /// Element type of matrices.
    pub dtype: DType,
}

impl RandomWeights {
    /// A matrix whose products keep the size of what goes in: uniform, with variance `1 / cols`.
    pub(super) fn matrix(self, name: &str, region: &Region) -> Weight {
        let scale = (3.0 / region.whole[1] as f32).sqrt();
        let key = self.key(name);
        Weight::from_rows(self.dtype, region.shape(), |row| {
            let row = region.rows.stored(row) * region.whole[1];
            let first = region.offset() + row + region.cols.start;
            move |col| scale * uniform(key, first + col)
        })
    }

    /// Norm weights near one, biases near zero.
    pub(super) fn vector(self, name: &str, length: usize) -> Vec<f32> {
        const SPREAD: f32 = 0.02;
        let middle = if name.ends_with("bias") { 0.0 } else { 1.0 };
        let key = self.key(name);
        (0..length).map(|at| middle + SPREAD * uniform(key, at)).collect()
    }

    fn key(self, name: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.seed, name).hash(&mut hasher);
        hasher.finish()
    }
}

/// Between -1 and 1: four numbers of 16 bits from each output of the SplitMix64 finalizer (Steele et al. 2014).
fn uniform(key: u64, at: usize) -> f32 {
    let mut bits = key.wrapping_add((at as u64 / 4).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    let number = (bits >> (16 * (at % 4))) as u16;
    (f32::from(number) - 32_767.5) / 32_767.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::region::Rows;

    const RANDOM: RandomWeights = RandomWeights { seed: 3, dtype: DType::F32 };

    #[test]
    fn a_slice_has_the_elements_of_the_whole() {
        let whole = RANDOM.matrix("a", &Region::all(7, 5));
        let slice = Region::all(7, 5).with_rows(Rows::range(2..6)).with_cols(1..4);
        let part = RANDOM.matrix("a", &slice);
        for (row, col) in (0..4).flat_map(|row| (0..3).map(move |col| (row, col))) {
            assert_eq!(part.matrix().element(row, col), whole.matrix().element(row + 2, col + 1));
        }
    }

    #[test]
    fn names_and_seeds_make_different_weights() {
        let first = |random: RandomWeights, name| random.vector(name, 4);
        assert_eq!(first(RANDOM, "a"), first(RANDOM, "a"));
        assert_ne!(first(RANDOM, "a"), first(RANDOM, "b"));
        assert_ne!(first(RANDOM, "a"), first(RandomWeights { seed: 4, ..RANDOM }, "a"));
    }

    #[test]
    fn matrices_have_the_variance_that_keeps_sizes() {
        let weight = RANDOM.matrix("a", &Region::all(64, 64));
        let squares: f32 = (0..64 * 64).map(|at| weight.matrix().element(at / 64, at % 64).powi(2)).sum();
        assert!((squares / 64.0 - 1.0).abs() < 0.05, "{squares}");
    }
}
