//! Every operation, on every instruction set of this machine, against its definition in f64.

mod data;

use data::{DTYPES, Random, Weight, cpus, unwritten};
use kernels::cpu::{self, Attention, Cpu, Product, RopeCacheWrite};
use kernels::{DType, HeadShape, OpError, RopeLayout, RopeTable, Sequence, reference};

const SIZES: [usize; 10] = [1, 3, 7, 8, 17, 48, 112, 257, 512, 1030];

/// Each element must be as close to the definition as `tolerance` times `magnitude`, where the magnitude is what the
/// rounding errors of the sum are relative to: the sum of the absolute values of its terms.
fn assert_close(what: &str, found: &[f32], expected: &[f64], magnitude: f64, tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * magnitude.max(expected.abs()),
            "{what}: element {at} is {found}, expected {expected}, error {error:e}"
        );
    }
}

/// Of one rounding.
const EPSILON: f64 = f32::EPSILON as f64;

fn check_linear(cpu: &Cpu, dtype: DType, tokens: usize, inputs: usize, outputs: usize) {
    let mut random = Random::new((tokens * 31 + inputs * 7 + outputs) as u64);
    let weight = Weight::random(&mut random, dtype, outputs, inputs);
    let (input, bias) = (random.numbers(tokens * inputs), random.numbers(outputs));
    let mut out = unwritten(tokens * outputs);
    let products = &mut [Product { weight: weight.matrix(), bias: Some(&bias), out: &mut out }];
    cpu::linear(cpu, &input, products).expect("shapes that fit");

    let what = format!("{:?} {dtype:?} [{tokens}, {inputs}] x [{outputs}, {inputs}]", cpu.isa());
    let expected = reference::linear(&input, &weight.matrix(), Some(&bias));
    // Terms are at most 1, and half that on average; each rounds once per step of its lane at worst.
    assert_close(&what, &out, &expected, 1.0 + inputs as f64 / 4.0, 16.0 * EPSILON);
}

#[test]
fn linear_is_its_definition_at_all_inner_sizes() {
    for cpu in cpus(2) {
        for dtype in DTYPES {
            for inputs in SIZES {
                for tokens in [1, 2, 5, 9] {
                    check_linear(&cpu, dtype, tokens, inputs, 19);
                }
            }
        }
    }
}

#[test]
fn linear_is_its_definition_at_all_outer_sizes() {
    for cpu in cpus(2) {
        for dtype in DTYPES {
            for outputs in SIZES {
                for tokens in [1, 3, 6, 7, 49, 100] {
                    check_linear(&cpu, dtype, tokens, 33, outputs);
                }
            }
        }
    }
}

#[test]
fn linear_computes_several_products_without_mixing_them() {
    let mut random = Random::new(5);
    let (tokens, inputs) = (3, 130);
    let input = random.numbers(tokens * inputs);
    let weights: Vec<Weight> = [(DType::F16, 65), (DType::BF16, 1), (DType::F32, 0), (DType::F32, 300)]
        .map(|(dtype, outputs)| Weight::random(&mut random, dtype, outputs, inputs))
        .into();
    for cpu in cpus(3) {
        let mut outs: Vec<_> =
            weights.iter().map(|weight| unwritten(tokens * weight.matrix().rows())).collect();
        let mut products: Vec<_> = weights
            .iter()
            .zip(&mut outs)
            .map(|(weight, out)| Product { weight: weight.matrix(), bias: None, out })
            .collect();
        cpu::linear(&cpu, &input, &mut products).expect("shapes that fit");
        for (weight, out) in weights.iter().zip(&outs) {
            let expected = reference::linear(&input, &weight.matrix(), None);
            assert_close("products", out, &expected, inputs as f64 / 4.0, 16.0 * EPSILON);
        }
    }
}

#[test]
fn every_half_is_widened_exactly() {
    let stored: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [DType::F16, DType::BF16] {
        // 1027 columns leave a tail for every register.
        let table = Weight::new(&stored[..63 * 1027 * 2], dtype, 63, 1027);
        let last = Weight::new(&stored[63 * 1027 * 2..], dtype, 1, 65536 - 63 * 1027);
        for cpu in cpus(1) {
            for table in [&table, &last] {
                let table = table.matrix();
                let ids: Vec<u32> = (0..table.rows() as u32).rev().collect();
                let mut out = unwritten(table.rows() * table.cols());
                cpu::embedding(&cpu, &table, &ids, &mut out).expect("ids of the table");
                for (found, expected) in out.iter().zip(reference::embedding(&table, &ids)) {
                    let same = found.to_bits() == (expected as f32).to_bits();
                    assert!(same || (found.is_nan() && expected.is_nan()), "{found} is not {expected}");
                }
            }
        }
    }
}

#[test]
fn linear_carries_infinities_and_nan() {
    let stored: Vec<u8> =
        [0x7c00u16, 0xfc00, 0x7e00, 0x0001].into_iter().flat_map(u16::to_le_bytes).collect();
    let weight = Weight::new(&stored, DType::F16, 4, 1);
    for cpu in cpus(1) {
        let mut out = unwritten(4);
        let products = &mut [Product { weight: weight.matrix(), bias: None, out: &mut out }];
        cpu::linear(&cpu, &[2.0], products).expect("shapes that fit");
        assert_eq!((out[0], out[1], out[3]), (f32::INFINITY, f32::NEG_INFINITY, 2.0f32.powi(-23)));
        assert!(out[2].is_nan());
    }
}

#[test]
fn embedding_is_its_definition() {
    let mut random = Random::new(11);
    for dtype in DTYPES {
        for width in SIZES {
            let table = Weight::random(&mut random, dtype, 29, width);
            let ids: Vec<u32> = (0..40).map(|_| random.below(29) as u32).collect();
            for cpu in cpus(1) {
                let mut out = unwritten(ids.len() * width);
                cpu::embedding(&cpu, &table.matrix(), &ids, &mut out).expect("ids of the table");
                assert_close("embedding", &out, &reference::embedding(&table.matrix(), &ids), 0.0, 0.0);
            }
        }
    }
}

#[test]
fn norms_are_their_definition() {
    let mut random = Random::new(12);
    for width in SIZES {
        for tokens in [0, 1, 5, 300] {
            let (x, delta) = (random.numbers(tokens * width), random.numbers(tokens * width));
            let weight = random.numbers(width);
            for cpu in cpus(3) {
                let mut out = unwritten(x.len());
                cpu::rms_norm(&cpu, &x, &weight, 1e-5, &mut out).expect("shapes that fit");
                assert_close("rms_norm", &out, &reference::rms_norm(&x, &weight, 1e-5), 0.01, 16.0 * EPSILON);

                let (mut residual, mut out) = (x.clone(), unwritten(x.len()));
                cpu::add_rms_norm(&cpu, &mut residual, &delta, &weight, 1e-5, &mut out)
                    .expect("shapes that fit");
                let (sum, normed) = reference::add_rms_norm(&x, &delta, &weight, 1e-5);
                assert_close("add_rms_norm: residual", &residual, &sum, 0.0, EPSILON);
                assert_close("add_rms_norm: out", &out, &normed, 1.0, 16.0 * EPSILON);
            }
        }
    }
}

fn check_rope(cpu: &Cpu, shape: HeadShape, rotary_dim: usize, layout: RopeLayout, tokens: usize) {
    let mut random = Random::new((rotary_dim + tokens) as u64);
    let (positions_max, cache_slots) = (50, tokens + 9);
    let angles: Vec<f32> = (0..positions_max * rotary_dim / 2).map(|_| random.number() * 3.0).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let table = RopeTable { cos: &cos, sin: &sin, rotary_dim, layout };

    let positions: Vec<u32> = (0..tokens).map(|_| random.below(positions_max) as u32).collect();
    let slots = random.permutation(cache_slots)[..tokens].to_vec();
    let query = random.numbers(tokens * shape.query_width());
    let key = random.numbers(tokens * shape.kv_width());
    let value = random.numbers(tokens * shape.kv_width());
    let cache = random.numbers(cache_slots * shape.kv_width());

    let (mut query_out, mut key_out) = (query.clone(), key.clone());
    let (mut keys, mut values) = (cache.clone(), cache.clone());
    let args = RopeCacheWrite {
        table,
        shape,
        positions: &positions,
        slots: &slots,
        query: &mut query_out,
        key: &mut key_out,
        value: &value,
        keys: &mut keys,
        values: &mut values,
    };
    cpu::rope_cache_write(cpu, args).expect("shapes that fit");

    let wide = |values: &[f32]| -> Vec<f64> { values.iter().copied().map(f64::from).collect() };
    let rotated = reference::rope(&key, shape.head_dim, &positions, &table);
    let (mut keys_expected, mut values_expected) = (wide(&cache), wide(&cache));
    reference::write_cache(&mut keys_expected, &rotated, &slots);
    reference::write_cache(&mut values_expected, &wide(&value), &slots);
    let query_expected = reference::rope(&query, shape.head_dim, &positions, &table);
    assert_close("rope: query", &query_out, &query_expected, 2.0, EPSILON);
    assert_close("rope: key", &key_out, &rotated, 2.0, EPSILON);
    assert_close("rope: keys", &keys, &keys_expected, 2.0, EPSILON);
    assert_close("rope: values", &values, &values_expected, 0.0, 0.0);
}

#[test]
fn rope_is_its_definition_in_both_layouts_whole_and_partial() {
    for cpu in cpus(3) {
        for layout in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
            for (head_dim, rotary_dim) in [(2, 2), (7, 6), (48, 48), (64, 16), (112, 112), (17, 0)] {
                for tokens in [1, 3, 500] {
                    let shape = HeadShape { heads: 6, kv_heads: 2, head_dim };
                    check_rope(&cpu, shape, rotary_dim, layout, tokens);
                }
            }
        }
    }
}

/// Sequences of `(tokens, start)` over a shuffled cache whose unused slots are NaN, and rows in reverse order.
fn check_attention(cpu: &Cpu, shape: HeadShape, lengths: &[(usize, usize)]) {
    let mut random = Random::new((shape.heads + shape.head_dim) as u64);
    let used: usize = lengths.iter().map(|(tokens, start)| tokens + start).sum();
    let cache_slots = used + 13;
    let order = random.permutation(cache_slots);
    let mut caches = [unwritten(cache_slots * shape.kv_width()), unwritten(cache_slots * shape.kv_width())];
    for cache in &mut caches {
        for &slot in &order[..used] {
            cache[slot as usize * shape.kv_width()..][..shape.kv_width()]
                .copy_from_slice(&random.numbers(shape.kv_width()));
        }
    }
    let [keys, values] = &caches;

    let total: usize = lengths.iter().map(|(tokens, _)| tokens).sum();
    let (mut row, mut slot) = (total, 0);
    let mut sequences = Vec::new();
    for &(tokens, start) in lengths {
        row -= tokens;
        sequences.push(Sequence { rows: row..row + tokens, start, slots: &order[slot..] });
        slot += tokens + start;
    }
    let query: Vec<f32> = random.numbers(total * shape.query_width()).iter().map(|x| x * 4.0).collect();
    let scale = (shape.head_dim as f32).powf(-0.5);
    let mut out = unwritten(query.len());
    let args = Attention { shape, scale, query: &query, keys, values, sequences: &sequences, out: &mut out };
    cpu::attention(cpu, args).expect("shapes that fit");

    let expected = reference::attention(shape, scale, &query, (keys, values), &sequences);
    // Values are at most 1, and so is each result. A score's error is a relative error of its weight.
    let score = 4.0 * f64::from(scale) * shape.head_dim as f64;
    assert_close(&format!("{:?} {shape:?}", cpu.isa()), &out, &expected, 1.0 + score, 8.0 * EPSILON);
}

#[test]
fn attention_is_its_definition_for_all_ways_to_share_heads() {
    for cpu in cpus(2) {
        for (heads, kv_heads) in [(1, 1), (4, 2), (6, 2), (4, 1), (15, 3), (9, 1), (17, 1)] {
            let shape = HeadShape { heads, kv_heads, head_dim: 24 };
            check_attention(&cpu, shape, &[(3, 40), (1, 0)]);
        }
    }
}

#[test]
fn attention_is_its_definition_at_all_head_sizes() {
    for cpu in cpus(2) {
        for head_dim in [1, 3, 7, 8, 17, 48, 64, 80, 112, 128, 257] {
            check_attention(&cpu, HeadShape { heads: 4, kv_heads: 2, head_dim }, &[(2, 30), (1, 100)]);
        }
    }
}

#[test]
fn attention_is_its_definition_for_decode_prefill_and_chunks() {
    for cpu in cpus(2) {
        let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 16 };
        for lengths in [
            &[(1, 0)][..],
            &[(1, 31), (1, 32), (1, 33)],
            &[(70, 0)],
            &[(0, 5), (33, 31), (0, 0), (1, 300), (9, 64), (8, 0)],
        ] {
            check_attention(&cpu, shape, lengths);
        }
    }
}

#[test]
fn activations_are_their_definition() {
    let mut random = Random::new(13);
    for len in SIZES.into_iter().chain([0, 300_000]) {
        let gate: Vec<f32> = random.numbers(len).iter().map(|x| x * 30.0).collect();
        let up = random.numbers(len);
        for cpu in cpus(3) {
            let mut out = gate.clone();
            cpu::gated_silu(&cpu, &mut out, &up).expect("equal lengths");
            assert_close("gated_silu", &out, &reference::gated_silu(&gate, &up), 1e-30, 8.0 * EPSILON);

            let mut out = gate.clone();
            cpu::add(&cpu, &mut out, &up).expect("equal lengths");
            assert_close("add", &out, &reference::add(&gate, &up), 0.0, EPSILON);
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error_that_names_it() {
    let cpu = &cpus(1)[0];
    let bytes = [0; 24];
    let matrix =
        |rows, cols| kernels::Matrix::new(&bytes[..rows * cols * 4], DType::F32, rows, cols).expect("fits");
    let length = |op, what, expected, found| Err(OpError::Length { op, what, expected, found });

    assert_eq!(cpu::add(cpu, &mut [0.0; 3], &[0.0; 2]), length("add", "delta", 3, 2));
    assert_eq!(cpu::gated_silu(cpu, &mut [], &[0.0]), length("gated_silu", "up", 0, 1));
    assert_eq!(
        cpu::embedding(cpu, &matrix(3, 2), &[0, 3], &mut [0.0; 4]),
        Err(OpError::Index { op: "embedding", what: "id", index: 3, limit: 3 })
    );
    assert_eq!(cpu::rms_norm(cpu, &[0.0; 5], &[0.0; 2], 0.0, &mut [0.0; 5]), length("rms_norm", "x", 4, 5));
    assert_eq!(cpu::rms_norm(cpu, &[], &[], 0.0, &mut [0.0]), length("rms_norm", "out", 0, 1));

    let mut out = [0.0; 3];
    let products = &mut [Product { weight: matrix(3, 2), bias: Some(&[0.0]), out: &mut out }];
    assert_eq!(cpu::linear(cpu, &[0.0; 2], products), length("linear", "bias", 3, 1));
    assert_eq!(cpu::linear(cpu, &[0.0; 3], products), length("linear", "input", 2, 3));
    let products = &mut [Product { weight: matrix(3, 0), bias: None, out: &mut [] }];
    assert!(matches!(cpu::linear(cpu, &[], products), Err(OpError::Unsupported { op: "linear", .. })));
    assert_eq!(cpu::linear(cpu, &[], &mut []), Ok(()));
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let cpu = &cpus(1)[0];
    let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 2 };
    let call = |shape, tokens: usize, sequences: &[Sequence<'_>]| {
        let (query, cache) = (vec![0.0; tokens * 4], [0.0; 6]);
        let mut out = query.clone();
        let (keys, values) = (&cache, &cache);
        let args = Attention { shape, scale: 1.0, query: &query, keys, values, sequences, out: &mut out };
        cpu::attention(cpu, args)
    };
    let sequence = |rows, start, slots| Sequence { rows, start, slots };
    let slot_error = Err(OpError::Index { op: "attention", what: "slot", index: 3, limit: 3 });

    assert_eq!(call(shape, 2, &[sequence(1..2, 0, &[1]), sequence(0..1, 1, &[2, 0, 99])]), Ok(()));
    assert_eq!(call(shape, 1, &[sequence(0..1, 1, &[2, 3])]), slot_error);
    for sequences in [
        &[sequence(0..1, 0, &[0]), sequence(0..1, 0, &[0])][..],
        &[sequence(1..2, 0, &[0])],
        &[sequence(0..3, 0, &[0, 1, 2])],
        &[sequence(0..2, 0, &[0])],
        &[sequence(0..2, usize::MAX, &[0])],
        &[],
    ] {
        assert!(call(shape, 2, sequences).is_err(), "{sequences:?}");
    }
    for shape in [
        HeadShape { heads: 0, ..shape },
        HeadShape { kv_heads: 3, ..shape },
        HeadShape { head_dim: 0, ..shape },
    ] {
        assert!(matches!(call(shape, 0, &[]), Err(OpError::Unsupported { .. })), "{shape:?}");
    }
    let huge = HeadShape { heads: usize::MAX, kv_heads: 1, head_dim: usize::MAX };
    assert!(call(huge, 1, &[]).is_err());
}

#[test]
fn rope_refuses_what_does_not_fit_and_writes_nothing() {
    let cpu = &cpus(1)[0];
    let call = |rotary_dim, position, slot| {
        let shape = HeadShape { heads: 1, kv_heads: 1, head_dim: 4 };
        let (mut query, mut key, mut keys, mut values) = ([1.0; 4], [2.0; 4], [0.0; 8], [0.0; 8]);
        let table = RopeTable { cos: &[0.5; 6], sin: &[0.5; 6], rotary_dim, layout: RopeLayout::HalfSplit };
        let args = RopeCacheWrite {
            table,
            shape,
            positions: &[position],
            slots: &[slot],
            query: &mut query,
            key: &mut key,
            value: &[3.0; 4],
            keys: &mut keys,
            values: &mut values,
        };
        let result = cpu::rope_cache_write(cpu, args);
        let untouched = (query, key, keys, values) == ([1.0; 4], [2.0; 4], [0.0; 8], [0.0; 8]);
        assert_eq!(untouched, result.is_err());
        result
    };
    let index = |what, index, limit| Err(OpError::Index { op: "rope_cache_write", what, index, limit });

    assert_eq!(call(4, 2, 1), Ok(()));
    assert_eq!(call(4, 3, 1), index("position", 3, 3));
    assert_eq!(call(4, 2, 2), index("slot", 2, 2));
    assert!(matches!(call(3, 0, 0), Err(OpError::Unsupported { .. })));
    assert!(matches!(call(6, 0, 0), Err(OpError::Unsupported { .. })));
}
