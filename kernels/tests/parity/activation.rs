use kernels::{OpError, cpu, reference};

use crate::data::{Random, cpus};
use crate::{EPSILON, SIZES, assert_close};

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
fn different_lengths_are_an_error_that_names_them() {
    let cpu = &cpus(1)[0];
    let length = |op, what, expected, found| Err(OpError::Length { op, what, expected, found });
    assert_eq!(cpu::add(cpu, &mut [0.0; 3], &[0.0; 2]), length("add", "delta", 3, 2));
    assert_eq!(cpu::gated_silu(cpu, &mut [], &[0.0]), length("gated_silu", "up", 0, 1));
}
