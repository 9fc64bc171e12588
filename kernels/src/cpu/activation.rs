use super::Cpu;
use super::simd::{Kernel, Row, Simd, exp};
use crate::OpError;
use crate::error::check_length;

/// `gate = silu(gate) * up`, element by element.
pub fn gated_silu(cpu: &Cpu, gate: &mut [f32], up: &[f32]) -> Result<(), OpError> {
    /// One exponential and one division, in multiply-adds.
    const WORK: usize = 12;
    check_length("gated_silu", "up", gate.len(), up.len())?;
    cpu.for_each(gate.len() * WORK, pieces(gate, up), |(gate, up)| cpu.isa().run(GatedSilu { gate, up }));
    Ok(())
}

/// `x += delta`.
pub fn add(cpu: &Cpu, x: &mut [f32], delta: &[f32]) -> Result<(), OpError> {
    /// Three streams of memory, in multiply-adds.
    const WORK: usize = 4;
    check_length("add", "delta", x.len(), delta.len())?;
    cpu.for_each(x.len() * WORK, pieces(x, delta), |(x, delta)| sum_into(x, delta));
    Ok(())
}

/// Cuts both into pieces of the same lengths.
fn pieces<'a>(x: &'a mut [f32], y: &'a [f32]) -> Vec<(&'a mut [f32], &'a [f32])> {
    const PIECE: usize = 16 * 1024;
    x.chunks_mut(PIECE).zip(y.chunks(PIECE)).collect()
}

/// `x += delta`, of equal lengths.
pub(super) fn sum_into(x: &mut [f32], delta: &[f32]) {
    for (x, delta) in x.iter_mut().zip(delta) {
        *x += delta;
    }
}

struct GatedSilu<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for GatedSilu<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let whole = self.gate.len() - self.gate.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: a whole register is left at `at`, of `up` as of `gate`.
            let (gate, up) = unsafe { ((&*self.gate).load(simd, at), self.up.load(simd, at)) };
            simd.write(gated(simd, gate, up), &mut self.gate[at..]);
        }
        if whole < self.gate.len() {
            let (gate, up) = ((&*self.gate).load_tail(simd, whole), self.up.load_tail(simd, whole));
            simd.write(gated(simd, gate, up), &mut self.gate[whole..]);
        }
    }
}

#[inline(always)]
fn gated<S: Simd>(simd: S, gate: S::Register, up: S::Register) -> S::Register {
    let one = simd.splat(1.0);
    let decay = exp(simd, simd.sub(simd.zero(), gate));
    simd.mul(simd.div(gate, simd.add(one, decay)), up)
}
