//! Random numbers without a state: Philox4x32-10, a function of key and counter.
//!
//! Source: Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3; constants and
//! test vectors from the authors' Random123 library.

/// A block of four random words.
type Block = [u32; 4];

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// The golden ratio and the square root of three minus one, as fractions of 2^32.
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// The random numbers of one draw: of one generated token of one request.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    seed: u64,
    index: u64,
    /// The block of the last answer, and its number.
    last: (u32, Block),
}

impl Draw {
    /// `index` counts the generated tokens of the request, from 0.
    pub fn new(seed: u64, index: u64) -> Self {
        let mut draw = Self { seed, index, last: (0, [0; 4]) };
        draw.last.1 = draw.block(0);
        draw
    }

    /// The number of this entry of the vocabulary: uniform in the open interval (0, 1), in steps of 2^-52.
    pub fn uniform(&mut self, id: u32) -> f64 {
        // A block serves two neighbours.
        let number = id / 2;
        if number != self.last.0 {
            self.last = (number, self.block(number));
        }
        let [a, b, c, d] = self.last.1;
        let bits = if id.is_multiple_of(2) { join(b, a) } else { join(d, c) };
        ((bits >> 12) as f64 + 0.5) / (1_u64 << 52) as f64
    }

    fn block(&self, number: u32) -> Block {
        let [high, low] = split(self.index);
        philox([number, 0, low, high], key(self.seed))
    }
}

/// A hash of `(key, value)` that is uniform over 64 bits.
pub fn keyed_hash(key_value: u64, value: u32) -> u64 {
    let [low, high, ..] = philox([value, 0, 0, 0], key(key_value));
    join(high, low)
}

fn join(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn split(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

fn key(value: u64) -> [u32; 2] {
    let [high, low] = split(value);
    [low, high]
}

fn philox(mut counter: Block, mut key: [u32; 2]) -> Block {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let [high0, low0] = split(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let [high1, low1] = split(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authors_test_vectors_hold() {
        let zeros = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        assert_eq!(philox([0; 4], [0; 2]), zeros);
        let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), ones);
        let pi = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn every_part_of_the_key_and_the_counter_matters() {
        let value = |seed, index, id| Draw::new(seed, index).uniform(id).to_bits();
        let values = [
            value(0, 0, 0),
            value(1, 0, 0),
            value(1 << 32, 0, 0),
            value(0, 1, 0),
            value(0, 1 << 32, 0),
            value(0, 0, 1),
            value(0, 0, 2),
        ];
        let distinct: std::collections::BTreeSet<_> = values.into_iter().collect();
        assert_eq!(distinct.len(), values.len());
    }

    #[test]
    fn numbers_are_uniform_inside_the_interval_and_do_not_depend_on_the_order_of_asking() {
        let count = 100_000;
        let mut draw = Draw::new(7, 3);
        let values: Vec<f64> = (0..count).map(|id| draw.uniform(id)).collect();
        assert!(values.iter().all(|value| *value > 0.0 && *value < 1.0));
        let mean = values.iter().sum::<f64>() / f64::from(count);
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / f64::from(count);
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        assert!((variance - 1.0 / 12.0).abs() < 0.002, "{variance}");
        let backwards = (0..count).rev().map(|id| draw.uniform(id));
        assert!(backwards.eq(values.iter().rev().copied()));
    }
}
