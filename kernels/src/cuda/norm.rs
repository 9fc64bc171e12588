//! Norms over rows.

use super::driver::DevicePtr;
use super::params::{kernels, params};
use super::{Element, Gpu, Grid, Kernel, Slice, SliceMut};
use crate::error::check_rows;
use crate::{NormKind, OpError};

const NORM: [Kernel; 3] = kernels!("norm", "norm");
/// What is normalized is f32; for a result of f32 that is nothing special.
const NORM_WIDE: [Kernel; 3] = [
    NORM[0],
    Kernel { module: "norm", name: "norm_wide_f16" },
    Kernel { module: "norm", name: "norm_wide_bf16" },
];
const THREADS_MAX: usize = 512;

params! {
    struct NormParams {
        x: DevicePtr,
        residual: DevicePtr,
        out: DevicePtr,
        weight: DevicePtr,
        bias: DevicePtr,
        width: u32,
        period: u32,
        eps: f32,
        centered: u32,
    }
}

/// Parameters of a norm over rows of `width` elements.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Which norm.
    pub kind: NormKind,
    /// Elements that are normalized together.
    pub width: usize,
    /// `[width]`, or several of them that take turns, row by row; f32. All ones if absent.
    pub weight: Option<Slice<'a>>,
    /// Like `weight`, added.
    pub bias: Option<Slice<'a>>,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// `out = norm(x)`; both `[rows, width]`, of one type, or `x` of f32.
pub fn norm(gpu: &Gpu, x: Slice<'_>, norm: Norm<'_>, mut out: SliceMut<'_>) -> Result<(), OpError> {
    run(gpu, "norm", x, None, norm, &mut out)
}

/// `x = norm(x)`; `[rows, width]`.
pub fn norm_in_place(gpu: &Gpu, mut x: SliceMut<'_>, norm: Norm<'_>) -> Result<(), OpError> {
    let from = Slice::of(&x);
    run(gpu, "norm", from, None, norm, &mut x)
}

/// `residual += delta`, then `out = norm(residual)`; all `[rows, width]`, of one type, or the residual of f32.
pub fn add_norm(
    gpu: &Gpu,
    mut residual: SliceMut<'_>,
    delta: Slice<'_>,
    norm: Norm<'_>,
    mut out: SliceMut<'_>,
) -> Result<(), OpError> {
    run(gpu, "add_norm", delta, Some(&mut residual), norm, &mut out)
}

fn run(
    gpu: &Gpu,
    op: &'static str,
    x: Slice<'_>,
    residual: Option<&mut SliceMut<'_>>,
    norm: Norm<'_>,
    out: &mut SliceMut<'_>,
) -> Result<(), OpError> {
    // What is normalized may be f32, whatever the rest is.
    let source = residual.as_ref().map_or(x.element(), |residual| residual.element());
    let kernels = if source == out.element() { NORM } else { NORM_WIDE };
    let kernel = Gpu::pick(op, out.element(), kernels)?;
    if kernels == NORM_WIDE {
        Slice::check_element(op, "residual", source, Element::F32)?;
    }
    let rows = check_rows(op, "x", norm.width, x.len())?;
    out.check(op, "out", out.element(), x.len())?;
    if let Some(residual) = &residual {
        residual.check(op, "residual", source, x.len())?;
        x.check(op, "x", out.element(), x.len())?;
    }
    let weights = norm.weight.or(norm.bias).map_or(norm.width, |weights| weights.len());
    for (what, weights_of) in [("weight", norm.weight), ("bias", norm.bias)] {
        if let Some(of) = weights_of {
            of.check(op, what, Element::F32, weights)?;
            check_rows(op, what, norm.width, of.len())?;
        }
    }
    if rows == 0 {
        return Ok(());
    }
    let params = NormParams {
        x: x.ptr,
        residual: residual.map_or(DevicePtr::NULL, |residual| residual.ptr),
        out: out.ptr,
        weight: Slice::ptr_or_null(norm.weight),
        bias: Slice::ptr_or_null(norm.bias),
        width: norm.width as u32,
        period: (weights / norm.width) as u32,
        eps: norm.eps,
        centered: u32::from(norm.kind == NormKind::Layer),
    };
    // A multiple of a warp, so many that each thread has 16 bytes where that can be.
    let threads = (norm.width * source.size()).div_ceil(16).next_multiple_of(32).min(THREADS_MAX);
    // SAFETY: all slices have `rows` rows of `width` elements, and the weights `period`.
    unsafe { gpu.launch(op, kernel, Grid::linear(rows as u32, threads as u32), &params) }
}
