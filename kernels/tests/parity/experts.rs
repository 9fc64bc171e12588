use kernels::cpu::{self, Cpu, ExpertScratch, Experts};
use kernels::{Activation, DType, Expert, Gating, OpError, Projection, Routes, reference};

use crate::data::{DTYPES, Mixture, Random, cpus, unwritten};
use crate::{EPSILON, assert_close};

const SILU: Gating = Gating::Activation(Activation::Silu);

fn run(cpu: &Cpu, experts: &[Expert<'_>], gating: Gating, input: &[f32], routes: &Routes) -> Vec<f32> {
    let mut out = unwritten(input.len());
    let scratch = &mut ExpertScratch::default();
    cpu::experts(cpu, Experts { input, routes, experts, gating, scratch, out: &mut out })
        .expect("shapes that fit");
    out
}

fn check(layer: &Mixture, gating: Gating, tokens: usize, per_token: usize) {
    let mut random = Random::new((tokens * 5 + per_token) as u64);
    let input = random.numbers(tokens * layer.width);
    let routes = layer.routes(&mut random, tokens, per_token);
    let experts = layer.experts();
    let expected = reference::experts(&input, &routes, &experts, gating);
    // How far sums can drift: terms are at most 1, those of the inner layer at most its width and a bias.
    let inner = layer.width as f64 / 4.0 + 1.0;
    let magnitude = inner * inner * experts[0].down.weight.cols() as f64 * per_token as f64 / 16.0;
    for cpu in cpus(3) {
        let found = run(&cpu, &experts, gating, &input, &routes);
        let what = format!("{:?} {tokens} tokens, {per_token} experts each", cpu.isa());
        assert_close(&what, &found, &expected, magnitude.max(1.0), 8.0 * EPSILON);
    }
}

#[test]
fn experts_are_their_definition_in_all_sizes() {
    for dtype in DTYPES {
        for (count, width, inner) in [(1, 1, 1), (4, 17, 3), (8, 48, 65), (3, 130, 33)] {
            for biased in [false, true] {
                let layer = Mixture::new(dtype, count, width, inner, biased);
                for tokens in [0, 1, 2, 3, 9, 40] {
                    for per_token in [1, count] {
                        check(&layer, SILU, tokens, per_token);
                    }
                }
            }
        }
    }
}

#[test]
fn few_and_many_of_many_experts_are_their_definition() {
    let layer = Mixture::new(DType::BF16, 64, 96, 40, false);
    for (tokens, per_token) in [(1, 8), (2, 8), (33, 6), (150, 2)] {
        check(&layer, SILU, tokens, per_token);
    }
}

#[test]
fn experts_are_gated_as_told() {
    let layer = Mixture::new(DType::F32, 5, 40, 24, true);
    for gating in [Gating::Activation(Activation::Gelu), Gating::ClampedSwiglu { limit: 1.5, alpha: 1.702 }] {
        check(&layer, gating, 11, 3);
    }
}

#[test]
fn an_expert_that_is_named_twice_counts_twice() {
    let layer = Mixture::new(DType::F32, 2, 19, 10, true);
    let experts = layer.experts();
    let input = Random::new(3).numbers(layer.width);
    let routes =
        |experts: &[u32], weights: &[f32]| Routes { experts: experts.into(), weights: weights.into() };
    for cpu in cpus(2) {
        let once = run(&cpu, &experts, SILU, &input, &routes(&[1], &[0.5]));
        let twice = run(&cpu, &experts, SILU, &input, &routes(&[1, 1], &[0.25, 0.25]));
        let once: Vec<f64> = once.into_iter().map(f64::from).collect();
        assert_close("twice", &twice, &once, 1.0, 2.0 * EPSILON);
    }
}

#[test]
fn a_layer_without_tokens_or_experts_computes_nothing() {
    let cpu = &cpus(1)[0];
    let layer = Mixture::new(DType::F32, 2, 4, 3, false);
    assert_eq!(run(cpu, &layer.experts(), SILU, &[], &Routes::default()), []);
    assert_eq!(run(cpu, &[], SILU, &[], &Routes::default()), []);
}

#[test]
fn experts_and_routes_that_do_not_fit_are_errors() {
    let cpu = &cpus(1)[0];
    let (layer, other) = (Mixture::new(DType::F32, 2, 4, 3, true), Mixture::new(DType::F32, 2, 4, 5, true));
    let (fitting, others) = (layer.experts(), other.experts());
    let call = |experts: &[Expert<'_>], ids: &[u32], weights: usize, input: usize, out: usize| {
        let routes = Routes { experts: ids.into(), weights: vec![1.0; weights] };
        let (input, mut out) = (vec![0.0; input], vec![0.0; out]);
        let scratch = &mut ExpertScratch::default();
        let args = Experts { input: &input, routes: &routes, experts, gating: SILU, scratch, out: &mut out };
        cpu::experts(cpu, args)
    };
    let length = |what, expected, found| Err(OpError::Length { op: "experts", what, expected, found });

    assert_eq!(call(&fitting, &[0, 1], 2, 8, 8), Ok(()));
    assert_eq!(call(&fitting, &[0, 1], 2, 8, 7), length("out", 8, 7));
    assert_eq!(call(&fitting, &[0, 1], 3, 8, 8), length("weights of the routes", 2, 3));
    assert_eq!(call(&fitting, &[0, 1, 1], 3, 8, 8), length("routes", 2, 3));
    assert_eq!(call(&fitting, &[0, 1], 2, 7, 7), length("input", 4, 7));
    assert_eq!(call(&[], &[], 0, 7, 7), length("input", 0, 7));
    assert!(matches!(call(&fitting, &[], 0, 8, 8), Err(OpError::Unsupported { .. })));
    assert_eq!(
        call(&fitting, &[0, 2], 2, 8, 8),
        Err(OpError::Index { op: "experts", what: "expert", index: 2, limit: 2 })
    );
    let mixed = [fitting[0], others[1]];
    assert_eq!(call(&mixed, &[0, 0], 2, 8, 8), length("rows of a weight", 3, 5));
    let swapped = [Expert { down: fitting[0].up, ..fitting[0] }];
    assert_eq!(call(&swapped, &[0, 0], 2, 8, 8), length("rows of a weight", 4, 3));
    let bias = Some(&[0.0; 2][..]);
    let biased = [Expert { up: Projection { bias, ..fitting[0].up }, ..fitting[0] }];
    assert_eq!(call(&biased, &[0, 0], 2, 8, 8), length("bias", 3, 2));
}
