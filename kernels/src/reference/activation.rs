use std::f64::consts::{FRAC_2_SQRT_PI, PI, SQRT_2};

use crate::{Activation, Gating};

/// The activation of each element. Sources: Elfwing et al. 2017 (silu); Hendrycks and Gimpel 2016 (gelu, section 2).
pub fn activate(activation: Activation, x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| active(activation, f64::from(x))).collect()
}

/// The gated half, element by element. Source: Shazeer 2020 (GLU variants).
pub fn gated(gating: Gating, gate: &[f32], up: &[f32]) -> Vec<f64> {
    gate.iter().zip(up).map(|(&gate, &up)| gate_one(gating, f64::from(gate), f64::from(up))).collect()
}

/// `x * factor`.
pub fn scale(x: &[f32], factor: f32) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x) * f64::from(factor)).collect()
}

/// `x + delta`.
pub fn add(x: &[f32], delta: &[f32]) -> Vec<f64> {
    x.iter().zip(delta).map(|(&x, &delta)| f64::from(x) + f64::from(delta)).collect()
}

/// `x`, but not beyond `-limit` and `limit`.
pub fn clamp(x: &[f32], limit: f32) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x.clamp(-limit, limit))).collect()
}

/// `cap * tanh(x / cap)`. Source: Gemma Team 2024 (Gemma 2), section 2.
pub fn soft_cap(x: &[f32], cap: f32) -> Vec<f64> {
    let cap = f64::from(cap);
    x.iter().map(|&x| cap * (f64::from(x) / cap).tanh()).collect()
}

pub(super) fn gate_one(gating: Gating, gate: f64, up: f64) -> f64 {
    match gating {
        Gating::Activation(activation) => active(activation, gate) * up,
        Gating::ClampedSwiglu { limit, alpha } => {
            let limit = f64::from(limit);
            let gate = gate.min(limit);
            gate * sigmoid(f64::from(alpha) * gate) * (up.clamp(-limit, limit) + 1.0)
        }
    }
}

fn active(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Relu => x.max(0.0),
    }
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The error function, by the series whose terms have one sign: `2 / sqrt(pi) * e^-x^2 * sum of
/// 2^n x^(2n + 1) / (1 * 3 * ... * (2n + 1))`. Source: Abramowitz and Stegun 1964, 7.1.6.
pub(crate) fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        // What is missing to 1 is below 3e-17.
        return x.signum();
    }
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term.abs() > 1e-18 * sum.abs() {
        odd += 2.0;
        term *= 2.0 * x * x / odd;
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::erf;

    #[test]
    fn erf_has_the_values_of_the_tables() {
        for (x, expected) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.5, 0.999_999_256_901_627_7),
            (7.0, 1.0),
        ] {
            assert!((erf(x) - expected).abs() < 4e-15, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
    }
}
