use super::Cpu;
use super::activation::sum_into;
use super::dot::dots;
use super::simd::{Kernel, Simd};
use crate::OpError;
use crate::error::{check_length, check_rows};

/// `out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight`; `x`, `out`: `[T, width]`, `weight`: `[width]`.
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<(), OpError> {
    const OP: &str = "rms_norm";
    check_rows(OP, "x", weight.len(), x.len())?;
    check_length(OP, "out", x.len(), out.len())?;
    let piece = piece(cpu, x.len(), weight.len());
    let pieces: Vec<_> = x.chunks(piece).zip(out.chunks_mut(piece)).collect();
    cpu.for_each(x.len() * WORK, pieces, |(x, out)| cpu.isa().run(Norm { x, weight, eps, out }));
    Ok(())
}

/// `residual += delta`, then `out = rms_norm(residual)`.
pub fn add_rms_norm(
    cpu: &Cpu,
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> Result<(), OpError> {
    const OP: &str = "add_rms_norm";
    check_rows(OP, "residual", weight.len(), residual.len())?;
    check_length(OP, "delta", residual.len(), delta.len())?;
    check_length(OP, "out", residual.len(), out.len())?;
    let piece = piece(cpu, residual.len(), weight.len());
    let work = residual.len() * WORK;
    let pieces: Vec<_> =
        residual.chunks_mut(piece).zip(delta.chunks(piece)).zip(out.chunks_mut(piece)).collect();
    cpu.for_each(work, pieces, |((residual, delta), out)| {
        sum_into(residual, delta);
        cpu.isa().run(Norm { x: residual, weight, eps, out });
    });
    Ok(())
}

/// Per element, in multiply-adds: a norm reads twice and writes once.
const WORK: usize = 4;

/// Elements of a piece: whole tokens, of which there are `elements / width`.
fn piece(cpu: &Cpu, elements: usize, width: usize) -> usize {
    let tokens = elements.checked_div(width).unwrap_or(0);
    let pieces = cpu.pieces(elements * WORK);
    // Chunks cannot be empty, even where there is nothing to cut.
    (tokens.div_ceil(pieces) * width).max(1)
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let [[squares]] = dots(simd, [x], [x]);
            let factor = 1.0 / (squares / width as f32 + self.eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * factor * weight;
            }
        }
    }
}
