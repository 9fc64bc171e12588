use kernels::{Activation, Gating, OpError, cpu, reference};

use crate::data::{Random, cpus};
use crate::{EPSILON, SIZES, assert_close};

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu];

/// Numbers up to `largest`, and for the second half of them small ones.
fn numbers(random: &mut Random, len: usize, largest: f32) -> Vec<f32> {
    let mut numbers = random.numbers(len);
    let (wide, small) = numbers.split_at_mut(len / 2);
    wide.iter_mut().for_each(|x| *x *= largest);
    small.iter_mut().for_each(|x| *x *= 1e-3);
    numbers
}

fn lengths() -> impl Iterator<Item = usize> {
    SIZES.into_iter().chain([0, 300_000])
}

#[test]
fn activations_are_their_definition() {
    let mut random = Random::new(13);
    for len in lengths() {
        let x = numbers(&mut random, len, 30.0);
        for cpu in cpus(3) {
            for activation in ACTIVATIONS {
                let mut out = x.clone();
                cpu::activate(&cpu, activation, &mut out).expect("any length");
                let what = format!("{:?} {activation:?}", cpu.isa());
                let expected = reference::activate(activation, &x);
                // A millionth absolutely, and nearly all digits of what is larger.
                assert_close(&what, &out, &expected, 1.0, 8.0 * EPSILON);
                for ((x, found), expected) in x.iter().zip(&out).zip(&expected) {
                    // Of small results too: half of x near zero, and far less on the way to minus infinity.
                    let error = (f64::from(*found) - expected).abs();
                    // The definition itself takes the error function from 1.
                    let relative = if *x > -5.0 { 3e-6 } else { 1e-4 };
                    assert!(
                        error <= relative * expected.abs() + 1e-14,
                        "{what} of {x}: {found}, not {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn gates_are_their_definition() {
    let mut random = Random::new(16);
    let limited = [(7.0, 1.702), (0.5, 1.0), (0.0, 1.702), (f32::INFINITY, -1.0)]
        .map(|(limit, alpha)| Gating::ClampedSwiglu { limit, alpha });
    let gatings: Vec<_> = ACTIVATIONS.map(Gating::Activation).into_iter().chain(limited).collect();
    for len in lengths() {
        let (gate, up) = (numbers(&mut random, len, 20.0), numbers(&mut random, len, 20.0));
        for cpu in cpus(3) {
            for &gating in &gatings {
                let mut out = gate.clone();
                cpu::gated(&cpu, gating, &mut out, &up).expect("equal lengths");
                let what = format!("{:?} {gating:?}", cpu.isa());
                // The other half multiplies the error of the gate.
                assert_close(&what, &out, &reference::gated(gating, &gate, &up), 20.0, 8.0 * EPSILON);
            }
        }
    }
}

#[test]
fn sums_multiples_and_caps_are_their_definition() {
    let mut random = Random::new(17);
    for len in lengths() {
        let (x, delta) = (numbers(&mut random, len, 100.0), random.numbers(len));
        for cpu in cpus(3) {
            let after = |run: &dyn Fn(&mut [f32]) -> Result<(), OpError>| {
                let mut out = x.clone();
                run(&mut out).expect("equal lengths");
                out
            };
            let sum = after(&|x| cpu::add(&cpu, x, &delta));
            assert_close("add", &sum, &reference::add(&x, &delta), 0.0, EPSILON);
            let multiple = after(&|x| cpu::scale(&cpu, x, 0.37));
            assert_close("scale", &multiple, &reference::scale(&x, 0.37), 0.0, EPSILON);
            let clamped = after(&|x| cpu::clamp(&cpu, x, 8.0));
            assert_close("clamp", &clamped, &reference::clamp(&x, 8.0), 0.0, 0.0);
            let capped = after(&|x| cpu::soft_cap(&cpu, x, 30.0));
            // Relative to the result: what is small is hardly changed, and keeps its digits.
            assert_close("soft_cap", &capped, &reference::soft_cap(&x, 30.0), 0.0, 10.0 * EPSILON);
        }
    }
}

#[test]
fn activations_of_the_largest_numbers_are_finite_and_nan_stays() {
    for cpu in cpus(1) {
        for activation in ACTIVATIONS {
            let mut x = [1e38, -1e38, 0.0, -0.0, 1e30, -1e30, f32::NAN];
            cpu::activate(&cpu, activation, &mut x).expect("any length");
            assert_eq!(x[..6], [1e38, 0.0, 0.0, 0.0, 1e30, 0.0], "{:?} {activation:?}", cpu.isa());
            assert!(x[6].is_nan(), "{:?} {activation:?}", cpu.isa());
        }
        let mut x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
        cpu::soft_cap(&cpu, &mut x, 50.0).expect("any length");
        assert_eq!(x[1..], [50.0, -50.0, 50.0]);
        assert!(x[0].is_nan());
        cpu::clamp(&cpu, &mut x, 3.0).expect("any length");
        assert_eq!(x[1..], [3.0, -3.0, 3.0]);
        assert!(x[0].is_nan());
    }
}

#[test]
fn lengths_and_limits_that_make_no_sense_are_errors() {
    let cpu = &cpus(1)[0];
    let length = |op, what, expected, found| Err(OpError::Length { op, what, expected, found });
    assert_eq!(cpu::add(cpu, &mut [0.0; 3], &[0.0; 2]), length("add", "delta", 3, 2));
    let silu = Gating::Activation(Activation::Silu);
    assert_eq!(cpu::gated(cpu, silu, &mut [], &[0.0]), length("gated", "up", 0, 1));
    for limit in [-1.0, f32::NAN] {
        assert!(matches!(cpu::clamp(cpu, &mut [1.0], limit), Err(OpError::Unsupported { op: "clamp", .. })));
        let gating = Gating::ClampedSwiglu { limit, alpha: 1.0 };
        assert!(cpu::gated(cpu, gating, &mut [1.0], &[1.0]).is_err());
    }
    for cap in [-1.0, 0.0, f32::NAN] {
        let error = cpu::soft_cap(cpu, &mut [1.0], cap).expect_err("no cap").to_string();
        assert_eq!(error, format!("soft_cap: a cap of {cap}"));
    }
}
