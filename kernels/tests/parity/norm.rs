use kernels::cpu::{self, Cpu};
use kernels::{Norm, NormKind, OpError, reference};

use crate::data::{Random, cpus, unwritten};
use crate::{EPSILON, SIZES, assert_close};

const KINDS: [NormKind; 2] = [NormKind::Rms, NormKind::Layer];

/// All three operations on the same rows.
fn check(cpu: &Cpu, x: &[f32], delta: &[f32], norm: &Norm<'_>) {
    let what = format!("{:?} {:?} of {} elements", cpu.isa(), norm.kind, norm.width);
    let tolerance = 32.0 * EPSILON;

    let expected = reference::norm(x, norm);
    let mut out = unwritten(x.len());
    cpu::norm(cpu, x, norm, &mut out).expect("shapes that fit");
    assert_close(&what, &out, &expected, 1.0, tolerance);

    let mut in_place = x.to_vec();
    cpu::norm_in_place(cpu, &mut in_place, norm).expect("shapes that fit");
    assert_eq!(in_place, out, "{what}: in place");

    let (mut residual, mut out) = (x.to_vec(), unwritten(x.len()));
    cpu::add_norm(cpu, &mut residual, delta, norm, &mut out).expect("shapes that fit");
    let (sum, normed) = reference::add_norm(x, delta, norm);
    assert_close(&format!("{what}: residual"), &residual, &sum, 0.0, EPSILON);
    // The norm is of the rounded sum, whose digits a small row does not have.
    assert_close(&format!("{what}: out"), &out, &normed, 1.0, 2.0 * tolerance);
}

#[test]
fn norms_are_their_definition() {
    let mut random = Random::new(12);
    for width in SIZES {
        for tokens in [0, 1, 5, 300] {
            let (x, delta) = (random.numbers(tokens * width), random.numbers(tokens * width));
            let (weight, bias) = (random.numbers(width), random.numbers(width));
            for cpu in cpus(3) {
                for kind in KINDS {
                    for (weight, bias) in [
                        (None, None),
                        (Some(&weight[..]), None),
                        (None, Some(&bias[..])),
                        (Some(&weight), Some(&bias)),
                    ] {
                        check(&cpu, &x, &delta, &Norm { kind, width, weight, bias, eps: 1e-5 });
                    }
                }
            }
        }
    }
}

#[test]
fn every_head_is_normalized_by_its_own_weight_and_bias() {
    let mut random = Random::new(14);
    for (heads, width) in [(1, 128), (3, 7), (32, 64), (5, 1), (1000, 33)] {
        let (weight, bias) = (random.numbers(heads * width), random.numbers(heads * width));
        for tokens in [1, 2, 70] {
            let (x, delta) = (random.numbers(tokens * heads * width), random.numbers(tokens * heads * width));
            for cpu in cpus(4) {
                for kind in KINDS {
                    let norm = Norm { kind, width, weight: Some(&weight), bias: Some(&bias), eps: 1e-6 };
                    check(&cpu, &x, &delta, &norm);
                }
            }
        }
    }
}

#[test]
fn a_layer_norm_far_from_zero_keeps_its_digits() {
    let mut random = Random::new(15);
    let width = 1030;
    let x: Vec<f32> = random.numbers(width).iter().map(|x| 1000.0 + x).collect();
    let norm = Norm { kind: NormKind::Layer, width, weight: None, bias: None, eps: 0.0 };
    for cpu in cpus(1) {
        let mut out = unwritten(width);
        cpu::norm(&cpu, &x, &norm, &mut out).expect("shapes that fit");
        // The mean rounds like numbers of its own magnitude, and deviations are 0.58 on average.
        assert_close("layer norm", &out, &reference::norm(&x, &norm), 1000.0 / 0.58, 4.0 * EPSILON);
    }
}

#[test]
fn a_row_of_zeros_stays_one() {
    for cpu in cpus(1) {
        for kind in KINDS {
            let mut x = vec![0.0; 37];
            let norm = Norm { kind, width: 37, weight: None, bias: None, eps: 1e-5 };
            cpu::norm_in_place(&cpu, &mut x, &norm).expect("shapes that fit");
            assert_eq!(x, [0.0; 37]);
        }
    }
}

#[test]
fn a_norm_of_incomplete_rows_is_an_error() {
    let cpu = &cpus(1)[0];
    let plain = Norm { kind: NormKind::Rms, width: 2, weight: None, bias: None, eps: 0.0 };
    let call = |norm: Norm<'_>, len: usize| cpu::norm(cpu, &vec![0.0; len], &norm, &mut [0.0; 4]);
    let length = |op, what, expected, found| Err(OpError::Length { op, what, expected, found });

    assert_eq!(call(plain, 4), Ok(()));
    assert_eq!(call(plain, 5), length("norm", "x", 4, 5));
    assert_eq!(call(plain, 2), length("norm", "out", 2, 4));
    assert_eq!(call(Norm { width: 0, ..plain }, 4), length("norm", "x", 0, 4));
    assert_eq!(call(Norm { weight: Some(&[1.0; 3]), ..plain }, 4), length("norm", "weight", 2, 3));
    assert_eq!(call(Norm { weight: Some(&[]), ..plain }, 4), length("norm", "weight", 2, 0));
    assert_eq!(
        call(Norm { weight: Some(&[1.0; 4]), bias: Some(&[1.0; 2]), ..plain }, 4),
        length("norm", "bias", 4, 2)
    );
    assert_eq!(cpu::norm_in_place(cpu, &mut [0.0; 3], &plain), length("norm_in_place", "x", 2, 3));
    assert_eq!(
        cpu::add_norm(cpu, &mut [0.0; 2], &[0.0; 4], &plain, &mut [0.0; 2]),
        length("add_norm", "delta", 2, 4)
    );
    assert_eq!(cpu::norm_in_place(cpu, &mut [], &Norm { width: 0, ..plain }), Ok(()));
}
