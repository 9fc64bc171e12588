//! Norms over rows.

use super::driver::DevicePtr;
use super::params::{kernels, params};
use super::{Gpu, Grid, Kernel, Slice, SliceMut};
use crate::error::check_rows;
use crate::{NormKind, OpError};

const NORM: [Kernel; 3] = kernels!("norm", "norm");
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

/// `out = norm(x)`; both `[rows, width]`, of one type.
pub fn norm(gpu: &Gpu, x: Slice<'_>, norm: Norm<'_>, mut out: SliceMut<'_>) -> Result<(), OpError> {
    run(gpu, "norm", x, None, norm, &mut out)
}

/// `x = norm(x)`; `[rows, width]`.
pub fn norm_in_place(gpu: &Gpu, mut x: SliceMut<'_>, norm: Norm<'_>) -> Result<(), OpError> {
    let from = Slice::of(&x);
    run(gpu, "norm", from, None, norm, &mut x)
}

/// `residual += delta`, then `out = norm(residual)`; all `[rows, width]`, of one type.
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
    let kernel = Gpu::pick(op, x.element(), NORM)?;
    let rows = check_rows(op, "x", norm.width, x.len())?;
    out.check(op, "out", x.element(), x.len())?;
    if let Some(residual) = &residual {
        residual.check(op, "residual", x.element(), x.len())?;
    }
    let weights = norm.weight.or(norm.bias).map_or(norm.width, |weights| weights.len());
    for (what, weights_of) in [("weight", norm.weight), ("bias", norm.bias)] {
        if let Some(of) = weights_of {
            of.check(op, what, crate::cuda::Element::F32, weights)?;
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
    let threads = (norm.width * x.element().size()).div_ceil(16).next_multiple_of(32).min(THREADS_MAX);
    // SAFETY: all slices have `rows` rows of `width` elements, and the weights `period`.
    unsafe { gpu.launch(op, kernel, Grid::linear(rows as u32, threads as u32), &params) }
}
