//! Random numbers without a state: Philox4x32-10, a function of key and counter.
//!
//! Source: Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3; constants
//! from the authors' Random123 library.

/// The random number of a token in the draw with this seed and index: uniform in the open interval (0, 1), in steps of
/// 2^-52. Two neighbours share a block of random words.
pub fn uniform(seed: u64, index: u64, id: u32) -> f64 {
    let [a, b, c, d] = philox([id / 2, 0, low(index), high(index)], [low(seed), high(seed)]);
    let bits = if id.is_multiple_of(2) { join(b, a) } else { join(d, c) };
    ((bits >> 12) as f64 + 0.5) / 2_f64.powi(52)
}

/// A hash of `(key, value)` that is uniform over 64 bits.
pub fn keyed_hash(key: u64, value: u32) -> u64 {
    let [a, b, ..] = philox([value, 0, 0, 0], [low(key), high(key)]);
    join(b, a)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = 0xd251_1f53 * u64::from(counter[0]);
        let second = 0xcd9e_8d57 * u64::from(counter[2]);
        counter =
            [high(second) ^ counter[1] ^ key[0], low(second), high(first) ^ counter[3] ^ key[1], low(first)];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

fn low(value: u64) -> u32 {
    value as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn join(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
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
    fn the_numbers_are_those_of_the_shards_sampler() {
        for (seed, index, id, bits) in [
            (0x0, 0x0, 0, 0x3fec_2d38_b1ac_c4fd),
            (0x0, 0x0, 1, 0x3fe3_601b_7b17_8af5),
            (0x0, 0x0, 2, 0x3fd7_2c80_36fe_3932),
            (0x7, 0x3, 50_256, 0x3fe0_8251_8cff_5d11),
            (0x7, 0x3, 50_257, 0x3fe0_9e6a_d1ff_40a3),
            (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 262_143, 0x3fee_96bf_3fb5_530b),
            (u64::MAX, 1 << 32, 5, 0x3fcc_905c_9bbd_5424),
        ] {
            assert_eq!(uniform(seed, index, id).to_bits(), bits, "{seed:#x}, {index:#x}, {id}");
        }
        assert_eq!(keyed_hash(0, 0), 0xe169_c58d_6627_e8d5);
        assert_eq!(keyed_hash(15_485_863 * 50_256, 17), 0x5ac1_f99f_3f11_0d8c);
        assert_eq!(keyed_hash(u64::MAX, u32::MAX), 0x7c03_af71_c256_72de);
    }
}
