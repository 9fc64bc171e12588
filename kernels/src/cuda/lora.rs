//! What low-rank adapters add to linear layers. Source: Hu et al. 2021 (LoRA).

use super::driver::DevicePtr;
use super::linear::{Input, Product, multiply_here, numbers};
use super::params::{kernels, params};
use super::{Element, Gpu, Grid, Kernel, Matrix, Slice, SliceMut};
use crate::OpError;
use crate::error::{check_length, check_rows};

const OP: &str = "add_low_rank";
const LOW_RANK: [Kernel; 3] = kernels!("lora", "low_rank");
/// As in `lora.cu`, like what follows.
const THREADS: u32 = 128;
/// Rows of a block.
const ROWS: u32 = 8;

params! {
    struct LowRankParams {
        inner: DevicePtr,
        weight: DevicePtr,
        out: DevicePtr,
        rows: u32,
        rank: u32,
        outputs: u32,
        stride: u32,
        scale: f32,
    }
}

/// Arguments of [`add_low_rank`].
#[derive(Debug)]
pub struct LowRank<'a> {
    /// `[rank, inputs]`
    pub a: Matrix<'a>,
    /// `[outputs, rank]`
    pub b: Matrix<'a>,
    /// Multiplies the product.
    pub scale: f32,
    /// `[rows, inputs]`
    pub input: Slice<'a>,
    /// Memory for what is between the two products, which is not rounded there: `[rows, rank]`, f32.
    pub inner: SliceMut<'a>,
    /// `[rows, outputs]`
    pub out: SliceMut<'a>,
}

/// `out += scale * (input * a^T) * b^T`, all but `inner` of one type. A row has the same bits however many there are.
///
/// Errors when the matrices do not fit together, or have no inputs.
pub fn add_low_rank(gpu: &Gpu, args: LowRank<'_>) -> Result<(), OpError> {
    let LowRank { a, b, scale, input, mut inner, out } = args;
    let kernel = Gpu::pick(OP, input.element(), LOW_RANK)?;
    let (inputs, rank, outputs) = (a.cols, a.rows, b.rows);
    if inputs == 0 {
        return Err(OpError::unsupported(OP, "a weight without inputs"));
    }
    a.check(OP, "a", input.element())?;
    b.check(OP, "b", input.element())?;
    check_length(OP, "a row of b", rank, b.cols)?;
    let rows = check_rows(OP, "input", inputs, input.len())?;
    inner.check(OP, "inner", Element::F32, rows.saturating_mul(rank))?;
    out.check(OP, "out", input.element(), rows.saturating_mul(outputs))?;
    if rows == 0 || rank == 0 || outputs == 0 {
        return Ok(());
    }
    let first = Product { weight: a, bias: None, out: inner.reborrow(), add: false };
    multiply_here(gpu, OP, Input { elements: input, rows, heads: 1, inputs }, &mut [first])?;

    let [rows, rank, outputs, stride] =
        numbers(OP, [("rows", rows), ("rank", rank), ("outputs", outputs), ("stride of b", b.stride)])?;
    let params = LowRankParams {
        inner: inner.ptr,
        weight: b.elements.ptr,
        out: out.ptr,
        rows,
        rank,
        outputs,
        stride,
        scale,
    };
    let shared_bytes = u64::from(ROWS * 4) * u64::from(rank.next_multiple_of(8));
    if shared_bytes > u64::from(gpu.properties().shared_bytes_max) {
        return Err(OpError::unsupported(OP, format!("a rank of {rank}")));
    }
    let blocks = [outputs.div_ceil(THREADS), rows.div_ceil(ROWS), 1];
    if blocks[1] > Grid::ACROSS_MAX {
        return Err(OpError::unsupported(OP, format!("{rows} rows")));
    }
    let grid = Grid { blocks, threads: THREADS, shared_bytes: shared_bytes as u32 };
    // SAFETY: the inner rows, the weight and the output have as many elements as the numbers say.
    unsafe { gpu.launch(OP, kernel, grid, &params) }
}
