//! Rows of a table by their numbers.

use super::driver::{DevicePtr, Grid, Kernel};
use super::params::{fit, kernels, params};
use super::units::{Unit, unit_kernels};
use super::{Element, Gpu, Matrix, Slice, SliceMut};
use crate::OpError;
use crate::error::check_length;

const GATHER_ROWS: [Kernel; 5] = unit_kernels!("embedding", "gather_rows");
const ADD_EMBEDDING: [Kernel; 3] = kernels!("embedding", "add_embedding");
const THREADS_MAX: usize = 256;

params! {
    struct GatherParams {
        table: DevicePtr,
        ids: DevicePtr,
        out: DevicePtr,
        first: u32,
        rows: u32,
        stride: u32,
        width: u32,
    }
}

params! {
    struct AddEmbeddingParams {
        table: DevicePtr,
        ids: DevicePtr,
        out: DevicePtr,
        rows: u32,
        stride: u32,
        width: u32,
    }
}

/// `out[t] = table[ids[t] - first]`, zeros where the table has no such row.
///
/// - `table`: `[rows, width]`, `out`: `[T, width]`, of one type, whichever it is
/// - `ids`: `[T]`, u32
///
/// The vocabulary may be split over ranks: `table` holds the ids from `first` on, and the sum over the ranks is the
/// embedding.
pub fn embedding(
    gpu: &Gpu,
    table: Matrix<'_>,
    first: u32,
    ids: Slice<'_>,
    mut out: SliceMut<'_>,
) -> Result<(), OpError> {
    gather(gpu, "embedding", table, first, ids, &mut out)
}

/// [`embedding`], for other operations too.
pub(super) fn gather(
    gpu: &Gpu,
    op: &'static str,
    table: Matrix<'_>,
    first: u32,
    ids: Slice<'_>,
    out: &mut SliceMut<'_>,
) -> Result<(), OpError> {
    check(op, &table, &ids, out)?;
    if out.is_empty() {
        return Ok(());
    }
    let bytes = |elements: usize| elements * out.element().size();
    let (stride, width) = (bytes(table.stride), bytes(table.cols));
    let unit = Unit::of([table.elements.ptr, out.ptr], [stride, width]);
    let params = GatherParams {
        table: table.elements.ptr,
        ids: ids.ptr,
        out: out.ptr,
        first,
        rows: fit(op, "rows", table.rows)?,
        stride: fit(op, "stride", unit.count(stride))?,
        width: fit(op, "width", unit.count(width))?,
    };
    let grid = Grid::rows(op, ids.len(), unit.count(width), THREADS_MAX)?;
    // SAFETY: the table has `rows` rows, and there is an output row for each id; ids are compared with the rows.
    unsafe { gpu.launch(op, unit.pick(GATHER_ROWS), grid, &params) }
}

/// `out[t] += table[ids[t]]`: learned positions. Nothing is added for an id that the table does not have.
///
/// - `table`: `[rows, width]`, `out`: `[T, width]`, of one type
/// - `ids`: `[T]`, u32
pub fn add_embedding(gpu: &Gpu, table: Matrix<'_>, ids: Slice<'_>, out: SliceMut<'_>) -> Result<(), OpError> {
    const OP: &str = "add_embedding";
    let kernel = Gpu::pick(OP, out.element(), ADD_EMBEDDING)?;
    check(OP, &table, &ids, &out)?;
    if out.is_empty() {
        return Ok(());
    }
    let params = AddEmbeddingParams {
        table: table.elements.ptr,
        ids: ids.ptr,
        out: out.ptr,
        rows: fit(OP, "rows", table.rows)?,
        stride: fit(OP, "stride", table.stride)?,
        width: fit(OP, "width", table.cols)?,
    };
    let grid = Grid::rows(OP, ids.len(), out.element().vectors(table.cols), THREADS_MAX)?;
    // SAFETY: the table has `rows` rows, and there is an output row for each id; ids are compared with the rows.
    unsafe { gpu.launch(OP, kernel, grid, &params) }
}

fn check(op: &'static str, table: &Matrix<'_>, ids: &Slice<'_>, out: &SliceMut<'_>) -> Result<(), OpError> {
    table.check(op, "table", out.element())?;
    ids.check(op, "ids", Element::U32, ids.len())?;
    check_length(op, "out", ids.len().saturating_mul(table.cols), out.len())
}
