use kernels::cpu::{self, Cpu, Product};
use kernels::{DType, Matrix, OpError, reference};

use crate::data::{DTYPES, Random, Weight, cpus, unwritten};
use crate::{EPSILON, SIZES, assert_close};

fn check_linear(cpu: &Cpu, dtype: DType, tokens: usize, inputs: usize, outputs: usize) {
    let mut random = Random::new((tokens * 31 + inputs * 7 + outputs) as u64);
    let weight = Weight::random(&mut random, dtype, outputs, inputs);
    let (input, bias) = (random.numbers(tokens * inputs), random.numbers(outputs));
    let mut out = unwritten(tokens * outputs);
    let products = &mut [Product { weight: weight.matrix(), bias: Some(&bias), out: &mut out, add: false }];
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
            .map(|(weight, out)| Product { weight: weight.matrix(), bias: None, out, add: false })
            .collect();
        cpu::linear(&cpu, &input, &mut products).expect("shapes that fit");
        for (weight, out) in weights.iter().zip(&outs) {
            let expected = reference::linear(&input, &weight.matrix(), None);
            assert_close("products", out, &expected, inputs as f64 / 4.0, 16.0 * EPSILON);
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
        let products = &mut [Product { weight: weight.matrix(), bias: None, out: &mut out, add: false }];
        cpu::linear(&cpu, &[2.0], products).expect("shapes that fit");
        assert_eq!((out[0], out[1], out[3]), (f32::INFINITY, f32::NEG_INFINITY, 2.0f32.powi(-23)));
        assert!(out[2].is_nan());
    }
}

#[test]
fn linear_adds_to_what_is_there_where_asked() {
    let mut random = Random::new(6);
    let (inputs, outputs) = (130, 77);
    let weight = Weight::random(&mut random, DType::BF16, outputs, inputs);
    let bias = random.numbers(outputs);
    for tokens in [1, 2, 9] {
        let (input, before) = (random.numbers(tokens * inputs), random.numbers(tokens * outputs));
        for bias in [None, Some(&bias[..])] {
            let product = reference::linear(&input, &weight.matrix(), bias);
            let expected: Vec<f64> = before.iter().zip(product).map(|(&x, y)| f64::from(x) + y).collect();
            for cpu in cpus(2) {
                let mut out = before.clone();
                let products = &mut [Product { weight: weight.matrix(), bias, out: &mut out, add: true }];
                cpu::linear(&cpu, &input, products).expect("shapes that fit");
                assert_close("linear: add", &out, &expected, 2.0 + inputs as f64 / 4.0, 16.0 * EPSILON);
            }
        }
    }
}

#[test]
fn linear_per_head_is_its_definition() {
    let mut random = Random::new(7);
    for (groups, inputs, outputs) in [(1, 33, 70), (3, 20, 1), (5, 129, 9), (16, 512, 128), (4, 7, 0)] {
        for dtype in DTYPES {
            let weight = Weight::random(&mut random, dtype, groups * outputs, inputs);
            for tokens in [0, 1, 2, 7] {
                let input = random.numbers(tokens * groups * inputs);
                let expected = reference::linear_per_head(&input, &weight.matrix(), groups);
                for cpu in cpus(3) {
                    let mut out = unwritten(expected.len());
                    cpu::linear_per_head(&cpu, &input, weight.matrix(), groups, &mut out)
                        .expect("shapes that fit");
                    let magnitude = 1.0 + inputs as f64 / 4.0;
                    assert_close("linear_per_head", &out, &expected, magnitude, 16.0 * EPSILON);
                }
            }
        }
    }
}

#[test]
fn linear_refuses_what_does_not_fit() {
    let cpu = &cpus(1)[0];
    let bytes = [0; 24];
    let matrix = |rows, cols| Matrix::new(&bytes[..rows * cols * 4], DType::F32, rows, cols).expect("fits");
    let length = |op, what, expected, found| Err(OpError::Length { op, what, expected, found });

    let mut out = [0.0; 3];
    let products = &mut [Product { weight: matrix(3, 2), bias: Some(&[0.0]), out: &mut out, add: false }];
    assert_eq!(cpu::linear(cpu, &[0.0; 2], products), length("linear", "bias", 3, 1));
    assert_eq!(cpu::linear(cpu, &[0.0; 3], products), length("linear", "input", 2, 3));
    let products = &mut [Product { weight: matrix(3, 0), bias: None, out: &mut [], add: false }];
    assert!(matches!(cpu::linear(cpu, &[], products), Err(OpError::Unsupported { op: "linear", .. })));
    assert_eq!(cpu::linear(cpu, &[], &mut []), Ok(()));

    const OP: &str = "linear_per_head";
    let mut call = |input: &[f32], weight, groups| cpu::linear_per_head(cpu, input, weight, groups, &mut out);
    assert_eq!(call(&[0.0; 6], matrix(3, 2), 3), Ok(()));
    assert_eq!(call(&[0.0; 5], matrix(3, 2), 3), length(OP, "input", 0, 5));
    assert_eq!(call(&[0.0; 12], matrix(3, 2), 3), length(OP, "out", 6, 3));
    for (weight, groups) in [(matrix(3, 2), 2), (matrix(3, 2), 0), (matrix(3, 0), 3)] {
        let result = call(&[], weight, groups);
        assert!(matches!(result, Err(OpError::Unsupported { op: OP, .. })), "{groups} groups");
    }
    assert!(call(&[], matrix(3, 2), usize::MAX).is_err());
}
