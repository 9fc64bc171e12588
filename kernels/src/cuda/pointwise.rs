//! What happens element by element or row by row, in place. Elements are f32, f16 or bf16, whatever the model's type is;
//! they are computed in f32.

use super::activation::{GatingParams, activation_number, check_limit};
use super::buffer::wrong_element;
use super::driver::{DevicePtr, Grid, Kernel};
use super::embedding;
use super::params::{fit, kernels, params};
use super::units::{Unit, unit_kernels};
use super::{Element, Gpu, Matrix, Slice, SliceMut};
use crate::error::{check_length, check_rows};
use crate::{Activation, Gating, OpError};

const MAP: [Kernel; 3] = kernels!("pointwise", "map");
const JOIN: [Kernel; 3] = kernels!("pointwise", "join");
/// Where what is added to is f32; to f32 that is nothing special.
const ADD_WIDE: [Kernel; 3] = [
    JOIN[0],
    Kernel { module: "pointwise", name: "add_wide_f16" },
    Kernel { module: "pointwise", name: "add_wide_bf16" },
];
const ADD_BIAS: [Kernel; 3] = kernels!("pointwise", "add_bias");
const SCALE_ROWS: [Kernel; 3] = kernels!("pointwise", "scale_rows");
const COPY_PARTS: [Kernel; 5] = unit_kernels!("pointwise", "copy_parts");
const THREADS: usize = 256;

// Functions of `map` and of `join` behind the activations and gatings.
const SCALE: u32 = 5;
const CLAMP: u32 = 6;
const SOFT_CAP: u32 = 7;
const ADD: u32 = 6;

params! {
    struct MapParams {
        x: DevicePtr,
        len: u64,
        operand: f32,
        function: u32,
    }
}

params! {
    struct JoinParams {
        x: DevicePtr,
        y: DevicePtr,
        len: u64,
        limit: f32,
        alpha: f32,
        function: u32,
    }
}

params! {
    struct RowsParams {
        x: DevicePtr,
        with: DevicePtr,
        width: u32,
    }
}

params! {
    struct CopyPartsParams {
        from: DevicePtr,
        to: DevicePtr,
        from_width: u32,
        out_of: u32,
        to_width: u32,
        into: u32,
        width: u32,
    }
}

params! {
    struct ConvertParams {
        from: DevicePtr,
        to: DevicePtr,
        len: u64,
    }
}

/// `x = activation(x)`.
pub fn activate(gpu: &Gpu, activation: Activation, x: SliceMut<'_>) -> Result<(), OpError> {
    map(gpu, "activate", x, activation_number(activation), 0.0)
}

/// `gate = gating(gate, up)`: the activation of the gate, times the other half.
///
/// Errors when a limit is negative or not a number.
pub fn gated(gpu: &Gpu, gating: Gating, gate: SliceMut<'_>, up: Slice<'_>) -> Result<(), OpError> {
    const OP: &str = "gated";
    let gating = GatingParams::new(OP, gating)?;
    up.check(OP, "up", gate.element(), gate.len())?;
    let kernel = Gpu::pick(OP, gate.element(), JOIN)?;
    join(gpu, OP, kernel, gate, up, gating)
}

/// `x *= factor`.
pub fn scale(gpu: &Gpu, x: SliceMut<'_>, factor: f32) -> Result<(), OpError> {
    map(gpu, "scale", x, SCALE, factor)
}

/// `x += delta`; both of one type, or `x` of f32.
pub fn add(gpu: &Gpu, x: SliceMut<'_>, delta: Slice<'_>) -> Result<(), OpError> {
    const OP: &str = "add";
    let add = GatingParams { number: ADD, limit: 0.0, alpha: 0.0 };
    let kernels = match (x.element(), delta.element()) {
        (Element::F32, Element::F16 | Element::BF16) => ADD_WIDE,
        (element, _) => {
            delta.check(OP, "delta", element, x.len())?;
            JOIN
        }
    };
    let kernel = Gpu::pick(OP, delta.element(), kernels)?;
    delta.check(OP, "delta", delta.element(), x.len())?;
    join(gpu, OP, kernel, x, delta, add)
}

/// `x`, but not beyond `-limit` and `limit`.
///
/// Errors when the limit is negative or not a number.
pub fn clamp(gpu: &Gpu, x: SliceMut<'_>, limit: f32) -> Result<(), OpError> {
    const OP: &str = "clamp";
    check_limit(OP, limit)?;
    map(gpu, OP, x, CLAMP, limit)
}

/// `x = cap * tanh(x / cap)`: nearly `x` when small, never beyond `-cap` and `cap`.
///
/// Errors when the cap is not positive.
pub fn soft_cap(gpu: &Gpu, x: SliceMut<'_>, cap: f32) -> Result<(), OpError> {
    const OP: &str = "soft_cap";
    if cap.is_nan() || cap <= 0.0 {
        return Err(OpError::unsupported(OP, format!("a cap of {cap}")));
    }
    map(gpu, OP, x, SOFT_CAP, cap)
}

/// `x[row] += bias`; `x`: `[rows, width]`, `bias`: `[width]`, f32.
pub fn add_bias(gpu: &Gpu, x: SliceMut<'_>, bias: Slice<'_>) -> Result<(), OpError> {
    const OP: &str = "add_bias";
    let kernel = Gpu::pick(OP, x.element(), ADD_BIAS)?;
    bias.check(OP, "bias", Element::F32, bias.len())?;
    let rows = check_rows(OP, "x", bias.len(), x.len())?;
    over_rows(gpu, OP, kernel, x, bias, rows, bias.len())
}

/// `x[row] *= sigmoid(gate[row])`; `x`: `[rows, width]`, `gate`: `[rows]`, of one type.
pub fn scale_rows(gpu: &Gpu, x: SliceMut<'_>, gate: Slice<'_>) -> Result<(), OpError> {
    const OP: &str = "scale_rows";
    let kernel = Gpu::pick(OP, x.element(), SCALE_ROWS)?;
    gate.check(OP, "gate", x.element(), gate.len())?;
    let width = check_rows(OP, "x", gate.len(), x.len())?;
    over_rows(gpu, OP, kernel, x, gate, gate.len(), width)
}

/// Arguments of [`copy_parts`]: `to[row, part, into ..] = from[row, part, out_of ..]`.
#[derive(Debug)]
pub struct CopyParts<'a> {
    /// Rows of both.
    pub rows: usize,
    /// Equal parts of a row, in both.
    pub parts: usize,
    /// `[rows, parts, any width]`
    pub from: Slice<'a>,
    /// Where it begins in each part.
    pub out_of: usize,
    /// `[rows, parts, any width]`, of the same type.
    pub to: SliceMut<'a>,
    /// Where it goes in each part.
    pub into: usize,
    /// Elements that are copied of each part.
    pub width: usize,
}

/// Copies a piece of every part of every row. Any type.
///
/// Errors when a piece does not lie within its part.
pub fn copy_parts(gpu: &Gpu, args: CopyParts<'_>) -> Result<(), OpError> {
    const OP: &str = "copy_parts";
    let CopyParts { rows, parts, from, out_of, to, into, width } = args;
    from.check(OP, "from", to.element(), from.len())?;
    let all = rows.saturating_mul(parts);
    if all == 0 {
        check_length(OP, "from", 0, from.len())?;
        return check_length(OP, "to", 0, to.len());
    }
    let from_width = check_rows(OP, "from", all, from.len())?;
    let to_width = check_rows(OP, "to", all, to.len())?;
    for (what, start, limit) in [("source", out_of, from_width), ("target", into, to_width)] {
        let end = start.saturating_add(width);
        if end > limit {
            return Err(OpError::Index { op: OP, what, index: end, limit });
        }
    }
    if width == 0 {
        return Ok(());
    }
    let [from_width, out_of, to_width, into, width] =
        [from_width, out_of, to_width, into, width].map(|elements| elements * to.element().size());
    let unit = Unit::of([from.ptr, to.ptr], [from_width, out_of, to_width, into, width]);
    let units = |what, bytes| fit(OP, what, unit.count(bytes));
    let params = CopyPartsParams {
        from: from.ptr,
        to: to.ptr,
        from_width: units("from", from_width)?,
        out_of: units("from", out_of)?,
        to_width: units("to", to_width)?,
        into: units("to", into)?,
        width: units("width", width)?,
    };
    let grid = Grid::rows(OP, all, unit.count(width), THREADS)?;
    // SAFETY: both slices have `rows * parts` parts, and the piece lies within each.
    unsafe { gpu.launch(OP, unit.pick(COPY_PARTS), grid, &params) }
}

/// `out[i] = x[rows[i]]`, zeros where `x` has no such row; `x`: `[any rows, width]`, `rows`: `[n]`, u32, `out`: `[n, width]`.
/// Any type.
pub fn select_rows(
    gpu: &Gpu,
    x: Slice<'_>,
    width: usize,
    rows: Slice<'_>,
    mut out: SliceMut<'_>,
) -> Result<(), OpError> {
    const OP: &str = "select_rows";
    let x = Matrix { elements: x, rows: check_rows(OP, "x", width, x.len())?, cols: width, stride: width };
    embedding::gather(gpu, OP, x, 0, rows, &mut out)
}

/// `to = from`, rounded to the nearest where its type has fewer digits; f32, f16 and bf16.
pub fn convert(gpu: &Gpu, from: Slice<'_>, to: SliceMut<'_>) -> Result<(), OpError> {
    const OP: &str = "convert";
    check_length(OP, "to", from.len(), to.len())?;
    let name = match (from.element(), to.element()) {
        (from, to) if from == to => None,
        (Element::F32, Element::F16) => Some("convert_f32_f16"),
        (Element::F32, Element::BF16) => Some("convert_f32_bf16"),
        (Element::F16, Element::F32) => Some("convert_f16_f32"),
        (Element::F16, Element::BF16) => Some("convert_f16_bf16"),
        (Element::BF16, Element::F32) => Some("convert_bf16_f32"),
        (Element::BF16, Element::F16) => Some("convert_bf16_f16"),
        (Element::F32 | Element::F16 | Element::BF16, to) => return Err(wrong_element(OP, to)),
        (from, _) => return Err(wrong_element(OP, from)),
    };
    if from.is_empty() {
        return Ok(());
    }
    let Some(name) = name else {
        // SAFETY: both have as many elements of one type, and `to` is borrowed alone.
        return unsafe { gpu.driver().copy(from.ptr, to.ptr, from.len() * from.element().size()) };
    };
    let params = ConvertParams { from: from.ptr, to: to.ptr, len: from.len() as u64 };
    let vectors = from.element().vectors(from.len()).max(to.element().vectors(from.len()));
    let grid = Grid::of(OP, vectors, THREADS)?;
    // SAFETY: both have `len` elements, of the types in the kernel's name.
    unsafe { gpu.launch(OP, Kernel { module: "pointwise", name }, grid, &params) }
}

fn map(gpu: &Gpu, op: &'static str, x: SliceMut<'_>, function: u32, operand: f32) -> Result<(), OpError> {
    let kernel = Gpu::pick(op, x.element(), MAP)?;
    if x.is_empty() {
        return Ok(());
    }
    let params = MapParams { x: x.ptr, len: x.len() as u64, operand, function };
    let grid = Grid::of(op, x.element().vectors(x.len()), THREADS)?;
    // SAFETY: `x` has `len` elements.
    unsafe { gpu.launch(op, kernel, grid, &params) }
}

fn join(
    gpu: &Gpu,
    op: &'static str,
    kernel: Kernel,
    x: SliceMut<'_>,
    y: Slice<'_>,
    GatingParams { number, limit, alpha }: GatingParams,
) -> Result<(), OpError> {
    if x.is_empty() {
        return Ok(());
    }
    let params = JoinParams { x: x.ptr, y: y.ptr, len: x.len() as u64, limit, alpha, function: number };
    let grid = Grid::of(op, x.element().vectors(x.len()), THREADS)?;
    // SAFETY: both were found to have `len` elements of the kernel's types.
    unsafe { gpu.launch(op, kernel, grid, &params) }
}

fn over_rows(
    gpu: &Gpu,
    op: &'static str,
    kernel: Kernel,
    x: SliceMut<'_>,
    with: Slice<'_>,
    rows: usize,
    width: usize,
) -> Result<(), OpError> {
    if x.is_empty() {
        return Ok(());
    }
    let params = RowsParams { x: x.ptr, with: with.ptr, width: fit(op, "x", width)? };
    let grid = Grid::rows(op, rows, x.element().vectors(width), THREADS)?;
    // SAFETY: `x` has `rows` rows of `width` elements, and `with` one for each column or row, as the kernel needs.
    unsafe { gpu.launch(op, kernel, grid, &params) }
}
