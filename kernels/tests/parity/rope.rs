use kernels::cpu::{self, Cpu, RopeCacheWrite};
use kernels::{HeadShape, OpError, RopeLayout, RopeTable, reference};

use crate::data::{Random, cpus};
use crate::{EPSILON, assert_close};

/// What is rotated: `rotary_dim` elements from `start` on.
#[derive(Clone, Copy)]
struct Rotated {
    rotary_dim: usize,
    start: usize,
    layout: RopeLayout,
}

/// Values of `value_dim` elements per head; a key/value cache without values when it is zero.
fn check_rope(cpu: &Cpu, shape: HeadShape, rotated: Option<Rotated>, value_dim: usize, tokens: usize) {
    let rotary_dim = rotated.map_or(0, |rotated| rotated.rotary_dim);
    let mut random = Random::new((rotary_dim + tokens) as u64);
    let (rows, cache_slots) = (50, tokens + 9);
    let radians: Vec<f32> = (0..rows * rotary_dim / 2).map(|_| random.number() * 3.0).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = radians.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let table = rotated.map(|Rotated { rotary_dim, start, layout }| RopeTable {
        cos: &cos,
        sin: &sin,
        rotary_dim,
        start,
        layout,
    });

    let angles: Vec<u32> = (0..tokens).map(|_| random.below(rows) as u32).collect();
    let slots = random.permutation(cache_slots)[..tokens].to_vec();
    let value_width = shape.kv_heads * value_dim;
    let query = random.numbers(tokens * shape.query_width());
    let key = random.numbers(tokens * shape.kv_width());
    let value = random.numbers(tokens * value_width);
    let cached_keys = random.numbers(cache_slots * shape.kv_width());
    let cached_values = random.numbers(cache_slots * value_width);

    let (mut query_out, mut key_out) = (query.clone(), key.clone());
    let (mut keys, mut values) = (cached_keys.clone(), cached_values.clone());
    let args = RopeCacheWrite {
        table,
        shape,
        angles: if table.is_some() { &angles } else { &[] },
        slots: &slots,
        query: &mut query_out,
        key: &mut key_out,
        value: &value,
        value_width,
        keys: &mut keys,
        values: &mut values,
    };
    cpu::rope_cache_write(cpu, args).expect("shapes that fit");

    let wide = |values: &[f32]| -> Vec<f64> { values.iter().copied().map(f64::from).collect() };
    let rotate = |x: &[f32]| match &table {
        Some(table) => reference::rope(x, shape.head_dim, &angles, table),
        None => wide(x),
    };
    let key_expected = rotate(&key);
    let (mut keys_expected, mut values_expected) = (wide(&cached_keys), wide(&cached_values));
    reference::write_cache(&mut keys_expected, &key_expected, &slots);
    if value_width > 0 {
        reference::write_cache(&mut values_expected, &wide(&value), &slots);
    }
    assert_close("rope: query", &query_out, &rotate(&query), 2.0, EPSILON);
    assert_close("rope: key", &key_out, &key_expected, 2.0, EPSILON);
    assert_close("rope: keys", &keys, &keys_expected, 2.0, EPSILON);
    assert_close("rope: values", &values, &values_expected, 0.0, 0.0);
}

const LAYOUTS: [RopeLayout; 2] = [RopeLayout::HalfSplit, RopeLayout::Interleaved];

#[test]
fn rope_is_its_definition_in_both_layouts_whole_and_partial() {
    for cpu in cpus(3) {
        for layout in LAYOUTS {
            for (head_dim, rotary_dim) in [(2, 2), (7, 6), (48, 48), (64, 16), (112, 112), (17, 0)] {
                for tokens in [1, 3, 500] {
                    let shape = HeadShape { heads: 6, kv_heads: 2, head_dim };
                    let rotated = Rotated { rotary_dim, start: 0, layout };
                    check_rope(&cpu, shape, Some(rotated), head_dim, tokens);
                }
            }
        }
    }
}

#[test]
fn rope_is_its_definition_when_the_rotated_part_comes_last_and_only_keys_are_cached() {
    for cpu in cpus(3) {
        for layout in LAYOUTS {
            for (head_dim, rotary_dim, start) in [(576, 64, 512), (20, 6, 13), (9, 2, 7), (96, 32, 5)] {
                for tokens in [1, 300] {
                    let shape = HeadShape { heads: 16, kv_heads: 1, head_dim };
                    check_rope(&cpu, shape, Some(Rotated { rotary_dim, start, layout }), 0, tokens);
                }
            }
        }
    }
}

#[test]
fn without_a_table_keys_and_values_are_stored_as_they_are() {
    for cpu in cpus(2) {
        for (head_dim, value_dim) in [(64, 64), (192, 128), (20, 33), (576, 0)] {
            check_rope(&cpu, HeadShape { heads: 6, kv_heads: 3, head_dim }, None, value_dim, 7);
        }
    }
}

#[test]
fn rope_refuses_what_does_not_fit_and_writes_nothing() {
    let cpu = &cpus(1)[0];
    let call = |start, rotary_dim, angles: &[u32], slot, value_width| {
        let shape = HeadShape { heads: 1, kv_heads: 1, head_dim: 4 };
        let (mut query, mut key, mut keys, mut values) = ([1.0; 4], [2.0; 4], [0.0; 8], [0.0; 6]);
        let layout = RopeLayout::HalfSplit;
        let table = Some(RopeTable { cos: &[0.5; 6], sin: &[0.5; 6], rotary_dim, start, layout });
        let args = RopeCacheWrite {
            table,
            shape,
            angles,
            slots: &[slot],
            query: &mut query,
            key: &mut key,
            value: &[3.0; 3],
            value_width,
            keys: &mut keys,
            values: &mut values,
        };
        let result = cpu::rope_cache_write(cpu, args);
        let untouched = (query, key, keys, values) == ([1.0; 4], [2.0; 4], [0.0; 8], [0.0; 6]);
        assert_eq!(untouched, result.is_err());
        result
    };
    const OP: &str = "rope_cache_write";
    let index = |what, index, limit| Err(OpError::Index { op: OP, what, index, limit });
    let length = |what, expected, found| Err(OpError::Length { op: OP, what, expected, found });

    assert_eq!(call(0, 4, &[2], 1, 3), Ok(()));
    assert_eq!(call(0, 4, &[3], 1, 3), index("angle", 3, 3));
    assert_eq!(call(0, 4, &[2], 2, 3), index("slot", 2, 2));
    assert_eq!(call(0, 4, &[0, 1], 0, 3), length("angles", 1, 2));
    assert_eq!(call(0, 4, &[0], 0, 4), length("value", 4, 3));
    assert_eq!(call(0, 4, &[0], 0, 0), length("value", 0, 3));
    for (start, rotary_dim) in [(0, 3), (0, 6), (2, 4), (usize::MAX, 2)] {
        let result = call(start, rotary_dim, &[0], 0, 3);
        assert!(matches!(result, Err(OpError::Unsupported { .. })), "{rotary_dim} from {start}");
    }
}
