use kernels::{OpError, cpu, reference};

use crate::data::{Random, cpus, unwritten};
use crate::{EPSILON, SIZES, assert_close};

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

#[test]
fn a_norm_of_incomplete_rows_is_an_error() {
    let cpu = &cpus(1)[0];
    let length = |what, expected, found| Err(OpError::Length { op: "rms_norm", what, expected, found });
    assert_eq!(cpu::rms_norm(cpu, &[0.0; 5], &[0.0; 2], 0.0, &mut [0.0; 5]), length("x", 4, 5));
    assert_eq!(cpu::rms_norm(cpu, &[], &[], 0.0, &mut [0.0]), length("out", 0, 1));
}
