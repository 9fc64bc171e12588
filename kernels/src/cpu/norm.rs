use super::Cpu;
use super::activation::sum_into;
use super::dot::{dots, sum};
use super::simd::{Kernel, Simd};
use crate::error::check_length;
use crate::{Norm, NormKind, OpError};

/// `out[i] = norm(x[i])`; `x`, `out`: `[rows, width]`.
pub fn norm(cpu: &Cpu, x: &[f32], norm: &Norm<'_>, out: &mut [f32]) -> Result<(), OpError> {
    const OP: &str = "norm";
    norm.check(OP, "x", x.len())?;
    check_length(OP, "out", x.len(), out.len())?;
    let (piece, rows) = piece(cpu, x.len(), norm.width);
    let pieces: Vec<_> = x
        .chunks(piece)
        .zip(out.chunks_mut(piece))
        .zip((0..).step_by(rows))
        .map(|((x, out), first)| Rows { norm, first, x: Some(x), out })
        .collect();
    cpu.for_each(x.len() * WORK, pieces, |piece| cpu.isa().run(piece));
    Ok(())
}

/// `x[i] = norm(x[i])`; `x`: `[rows, width]`.
pub fn norm_in_place(cpu: &Cpu, x: &mut [f32], norm: &Norm<'_>) -> Result<(), OpError> {
    norm.check("norm_in_place", "x", x.len())?;
    let work = x.len() * WORK;
    let (piece, rows) = piece(cpu, x.len(), norm.width);
    let pieces: Vec<_> = x
        .chunks_mut(piece)
        .zip((0..).step_by(rows))
        .map(|(out, first)| Rows { norm, first, x: None, out })
        .collect();
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
    Ok(())
}

/// `residual += delta`, then `out = norm(residual)`; all `[rows, width]`.
pub fn add_norm(
    cpu: &Cpu,
    residual: &mut [f32],
    delta: &[f32],
    norm: &Norm<'_>,
    out: &mut [f32],
) -> Result<(), OpError> {
    const OP: &str = "add_norm";
    norm.check(OP, "residual", residual.len())?;
    check_length(OP, "delta", residual.len(), delta.len())?;
    check_length(OP, "out", residual.len(), out.len())?;
    let work = residual.len() * WORK;
    let (piece, rows) = piece(cpu, residual.len(), norm.width);
    let pieces: Vec<_> = residual
        .chunks_mut(piece)
        .zip(delta.chunks(piece))
        .zip(out.chunks_mut(piece))
        .zip((0..).step_by(rows))
        .collect();
    cpu.for_each(work, pieces, |(((residual, delta), out), first)| {
        sum_into(residual, delta);
        cpu.isa().run(Rows { norm, first, x: Some(residual), out });
    });
    Ok(())
}

/// Per element, in multiply-adds: a norm reads twice and writes once.
const WORK: usize = 4;

/// Elements and rows of a piece: whole rows, of which there are `elements / width`.
fn piece(cpu: &Cpu, elements: usize, width: usize) -> (usize, usize) {
    let rows = elements.checked_div(width).unwrap_or(0);
    // Chunks cannot be empty, even where there is nothing to cut.
    let rows = rows.div_ceil(cpu.pieces(elements * WORK)).max(1);
    ((rows * width).max(1), rows)
}

/// Some rows of a call.
struct Rows<'a> {
    norm: &'a Norm<'a>,
    /// Place of the first one among all, which says what of the weight is its own.
    first: usize,
    /// What is normalized; absent where it is in `out`.
    x: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.norm.width;
        for (index, out) in self.out.chunks_exact_mut(width).enumerate() {
            let x = self.x.map(|x| &x[index * width..][..width]);
            normalize(simd, self.norm, self.first + index, x, out);
        }
    }
}

/// Normalizes `x`, or `out` where there is none, to `out`.
#[inline(always)]
fn normalize<S: Simd>(simd: S, norm: &Norm<'_>, index: usize, mut x: Option<&[f32]>, out: &mut [f32]) {
    let width = norm.width as f32;
    if norm.kind == NormKind::Layer {
        // The mean goes first: the mean square less the square of the mean would lose its digits.
        let mean = sum(simd, x.unwrap_or(out)) / width;
        match x {
            Some(x) => out.iter_mut().zip(x).for_each(|(out, x)| *out = x - mean),
            None => out.iter_mut().for_each(|out| *out -= mean),
        }
        x = None;
    }
    let [[squares]] = dots(simd, [x.unwrap_or(out)], [x.unwrap_or(out)]);
    let factor = 1.0 / (squares / width + norm.eps).sqrt();
    match (x, norm.weight_of(index)) {
        (Some(x), Some(weight)) => {
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * factor * weight;
            }
        }
        (Some(x), None) => out.iter_mut().zip(x).for_each(|(out, x)| *out = x * factor),
        (None, Some(weight)) => {
            out.iter_mut().zip(weight).for_each(|(out, weight)| *out = *out * factor * weight);
        }
        (None, None) => out.iter_mut().for_each(|out| *out *= factor),
    }
    if let Some(bias) = norm.bias_of(index) {
        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    }
}
