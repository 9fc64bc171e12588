/// `silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`. Source: Shazeer 2020 (GLU variants), SwiGLU.
pub fn gated_silu(gate: &[f32], up: &[f32]) -> Vec<f64> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    gate.iter().zip(up).map(|(&gate, &up)| silu(f64::from(gate)) * f64::from(up)).collect()
}

/// `x + delta`.
pub fn add(x: &[f32], delta: &[f32]) -> Vec<f64> {
    x.iter().zip(delta).map(|(&x, &delta)| f64::from(x) + f64::from(delta)).collect()
}
