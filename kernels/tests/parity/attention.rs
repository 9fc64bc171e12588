use kernels::cpu::{self, Attention, Cpu};
use kernels::{AttentionRules, HeadShape, OpError, Sequence, Values, reference};

use crate::data::{Random, cpus, unwritten};
use crate::{EPSILON, assert_close};

/// A layer whose values are as long as its keys, in a cache of their own, and without rules.
fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Layer<'static> {
    let shape = HeadShape { heads, kv_heads, head_dim };
    Layer { shape, value_dim: head_dim, in_keys: false, rules: AttentionRules::default() }
}

#[derive(Clone, Copy, Debug)]
struct Layer<'a> {
    shape: HeadShape,
    value_dim: usize,
    /// Whether the values are part of the keys.
    in_keys: bool,
    rules: AttentionRules<'a>,
}

/// A cache of random vectors in some slots, and NaN in the others.
fn cache(random: &mut Random, slots: usize, used: &[u32], width: usize) -> Vec<f32> {
    let mut cache = unwritten(slots * width);
    for &slot in used {
        cache[slot as usize * width..][..width].copy_from_slice(&random.numbers(width));
    }
    cache
}

/// Sequences of `(tokens, start)` over a shuffled cache, with rows in reverse order. What no token sees is NaN.
fn check_attention(cpu: &Cpu, layer: Layer<'_>, lengths: &[(usize, usize)]) {
    let Layer { shape, value_dim, in_keys, rules } = layer;
    let mut random = Random::new((shape.heads + shape.head_dim) as u64);
    let used: usize = lengths.iter().map(|(tokens, start)| tokens + start).sum();
    let cache_slots = used + 13;
    let order = random.permutation(cache_slots);

    let total: usize = lengths.iter().map(|(tokens, _)| tokens).sum();
    let (mut row, mut slot) = (total, 0);
    let (mut sequences, mut visible) = (Vec::new(), Vec::new());
    for &(tokens, start) in lengths {
        row -= tokens;
        sequences.push(Sequence { rows: row..row + tokens, start, slots: &order[slot..] });
        let forgotten = rules.window.map_or(0, |window| (start + 1).saturating_sub(window));
        visible.extend_from_slice(&order[slot + forgotten.min(start)..slot + tokens + start]);
        slot += tokens + start;
    }
    let keys = cache(&mut random, cache_slots, &visible, shape.kv_width());
    let own = cache(&mut random, cache_slots, &visible, shape.kv_heads * value_dim);
    let query: Vec<f32> = random.numbers(total * shape.query_width()).iter().map(|x| x * 4.0).collect();
    let scale = (shape.head_dim as f32).powf(-0.5);
    let mut out = unwritten(total * shape.heads * value_dim);
    let args = Attention {
        shape,
        value_dim,
        scale,
        query: &query,
        keys: &keys,
        values: if in_keys { Values::InKeys } else { Values::Own(&own) },
        rules,
        sequences: &sequences,
        out: &mut out,
    };
    let expected = reference::attention(&args);
    cpu::attention(cpu, args).expect("shapes that fit");

    // Values are at most 1, and so is each result. A score's error is a relative error of its weight.
    let score = 4.0 * f64::from(scale) * shape.head_dim as f64;
    let what = format!("{:?} {layer:?} {lengths:?}", cpu.isa());
    assert_close(&what, &out, &expected, 1.0 + score, 8.0 * EPSILON);
}

#[test]
fn attention_is_its_definition_for_all_ways_to_share_heads() {
    for cpu in cpus(2) {
        for (heads, kv_heads) in [(1, 1), (4, 2), (6, 2), (4, 1), (15, 3), (9, 1), (17, 1)] {
            check_attention(&cpu, plain(heads, kv_heads, 24), &[(3, 40), (1, 0)]);
        }
    }
}

#[test]
fn attention_is_its_definition_at_all_head_sizes() {
    for cpu in cpus(2) {
        for head_dim in [1, 3, 7, 8, 17, 20, 48, 64, 80, 96, 112, 128, 192, 256, 257] {
            check_attention(&cpu, plain(4, 2, head_dim), &[(2, 30), (1, 100)]);
        }
    }
}

#[test]
fn attention_is_its_definition_for_decode_prefill_and_chunks() {
    for cpu in cpus(2) {
        for lengths in [
            &[(1, 0)][..],
            &[(1, 31), (1, 32), (1, 33)],
            &[(70, 0)],
            &[(0, 5), (33, 31), (0, 0), (1, 300), (9, 64), (8, 0)],
        ] {
            check_attention(&cpu, plain(4, 2, 16), lengths);
        }
    }
}

#[test]
fn values_may_be_shorter_or_longer_than_keys() {
    for cpu in cpus(2) {
        for (head_dim, value_dim) in [(192, 128), (20, 33), (96, 1), (1, 80), (576, 512)] {
            for (heads, kv_heads) in [(4, 2), (5, 1)] {
                let layer = Layer { value_dim, ..plain(heads, kv_heads, head_dim) };
                check_attention(&cpu, layer, &[(10, 30), (1, 70)]);
            }
        }
    }
}

#[test]
fn values_may_be_a_part_of_the_keys() {
    for cpu in cpus(2) {
        for (head_dim, value_dim) in [(576, 512), (192, 128), (20, 17), (64, 64), (9, 1)] {
            for (heads, kv_heads) in [(16, 1), (128, 1), (6, 3)] {
                let layer = Layer { value_dim, in_keys: true, ..plain(heads, kv_heads, head_dim) };
                check_attention(&cpu, layer, &[(9, 40), (1, 64)]);
            }
        }
    }
}

/// Sequences of all kinds: decode, prefill, chunks, on both sides of the borders between groups of keys.
const MIXED: [(usize, usize); 7] = [(1, 0), (1, 31), (1, 150), (70, 0), (33, 31), (9, 100), (1, 33)];

#[test]
fn a_token_sees_no_more_than_its_window() {
    for cpu in cpus(2) {
        for window in [1, 2, 5, 31, 32, 33, 64, 100, 10_000, usize::MAX] {
            let rules = AttentionRules { window: Some(window), ..AttentionRules::default() };
            for layer in [plain(4, 2, 20), plain(3, 3, 96)] {
                check_attention(&cpu, Layer { rules, ..layer }, &MIXED);
            }
        }
    }
}

#[test]
fn scores_are_capped() {
    for cpu in cpus(2) {
        for soft_cap in [0.01, 1.0, 50.0, 1e6] {
            let rules = AttentionRules { soft_cap: Some(soft_cap), ..AttentionRules::default() };
            for layer in [plain(4, 2, 64), plain(8, 1, 256)] {
                check_attention(&cpu, Layer { rules, ..layer }, &MIXED);
            }
        }
    }
}

#[test]
fn slopes_make_distant_keys_fade() {
    // Also a slope that makes them grow, and one that leaves a single key.
    let slopes = [0.5, 0.062_5, 0.003_9, 0.0, -0.25, 40.0];
    for cpu in cpus(2) {
        for kv_heads in [1, 2, 6] {
            let rules = AttentionRules { slopes: Some(&slopes), ..AttentionRules::default() };
            check_attention(&cpu, Layer { rules, ..plain(6, kv_heads, 80) }, &MIXED);
        }
    }
}

#[test]
fn sinks_take_their_part_of_each_softmax() {
    // The last ones take nothing and nearly all.
    let sinks = [0.3, -1.5, 2.0, 5.0, f32::NEG_INFINITY, 30.0];
    for cpu in cpus(2) {
        for kv_heads in [1, 2, 6] {
            let rules = AttentionRules { sinks: Some(&sinks), ..AttentionRules::default() };
            check_attention(&cpu, Layer { rules, ..plain(6, kv_heads, 64) }, &MIXED);
        }
    }
}

#[test]
fn all_rules_together_are_their_definition() {
    let mut random = Random::new(21);
    let (slopes, sinks) = (random.numbers(12), random.numbers(12));
    for cpu in cpus(2) {
        for window in [1, 7, 40] {
            let rules = AttentionRules {
                window: Some(window),
                soft_cap: Some(3.0),
                slopes: Some(&slopes),
                sinks: Some(&sinks),
            };
            for (value_dim, in_keys) in [(112, false), (128, false), (96, true)] {
                check_attention(&cpu, Layer { rules, value_dim, in_keys, ..plain(12, 1, 112) }, &MIXED);
            }
        }
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let cpu = &cpus(1)[0];
    let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 2 };
    let call = |shape, tokens: usize, sequences: &[Sequence<'_>]| {
        let (query, cache) = (vec![0.0; tokens * 4], [0.0; 6]);
        let mut out = query.clone();
        let args = Attention {
            shape,
            value_dim: 2,
            scale: 1.0,
            query: &query,
            keys: &cache,
            values: Values::Own(&cache),
            rules: AttentionRules::default(),
            sequences,
            out: &mut out,
        };
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
fn attention_refuses_rules_and_values_that_make_no_sense() {
    let cpu = &cpus(1)[0];
    let sequences = [Sequence { rows: 0..1, start: 0, slots: &[1] }];
    let call = |value_dim, values, rules| {
        let mut out = vec![0.0; 2 * value_dim];
        let args = Attention {
            shape: HeadShape { heads: 2, kv_heads: 1, head_dim: 2 },
            value_dim,
            scale: 1.0,
            query: &[0.0; 4],
            keys: &[0.0; 6],
            values,
            rules,
            sequences: &sequences,
            out: &mut out,
        };
        cpu::attention(cpu, args)
    };
    let plain = AttentionRules::default();
    let length = |what, expected, found| Err(OpError::Length { op: "attention", what, expected, found });

    assert_eq!(call(2, Values::Own(&[0.0; 6]), plain), Ok(()));
    assert_eq!(call(1, Values::InKeys, plain), Ok(()));
    assert_eq!(call(1, Values::Own(&[0.0; 6]), plain), length("values", 3, 6));
    let sinks = AttentionRules { sinks: Some(&[0.0]), ..plain };
    assert_eq!(call(2, Values::InKeys, sinks), length("sinks", 2, 1));
    let slopes = AttentionRules { slopes: Some(&[0.0; 3]), ..plain };
    assert_eq!(call(2, Values::InKeys, slopes), length("slopes", 2, 3));
    for (value_dim, rules) in [
        (0, plain),
        (3, plain),
        (2, AttentionRules { window: Some(0), ..plain }),
        (2, AttentionRules { soft_cap: Some(0.0), ..plain }),
        (2, AttentionRules { soft_cap: Some(f32::NAN), ..plain }),
    ] {
        let result = call(value_dim, Values::InKeys, rules);
        assert!(matches!(result, Err(OpError::Unsupported { .. })), "{value_dim} {rules:?}");
    }
}
