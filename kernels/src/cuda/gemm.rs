//! Products with many rows: see `kernels/cuda/gemm.cu`.

use super::driver::DevicePtr;
use super::linear::{Input, Product, numbers};
use super::params::params;
use super::{Element, Gpu, Grid, Kernel, Slice};
use crate::OpError;

/// Weights of a block, as in `tile.cuh`, like what follows.
const WEIGHTS: usize = 128;
const DEPTH: usize = 64;
const STAGES: usize = 3;
/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// Bytes of shared memory of a block with this many rows.
pub(super) fn tile_bytes(rows: usize) -> u32 {
    (STAGES * (rows + WEIGHTS) * DEPTH * 2) as u32
}

params! {
    struct GemmParams {
        input: DevicePtr,
        weight: DevicePtr,
        bias: DevicePtr,
        out: DevicePtr,
        rows: u32,
        outputs: u32,
        inputs: u32,
        input_stride: u32,
        weight_stride: u32,
        out_stride: u32,
        input_head: u32,
        weight_head: u32,
        out_head: u32,
        is_float: u32,
        add: u32,
    }
}

/// A product of 16-bit elements on tensor cores. Shapes are right, and there are rows and inputs.
pub(super) fn gemm(
    gpu: &Gpu,
    op: &'static str,
    input: Input<'_>,
    product: &mut Product<'_>,
) -> Result<(), OpError> {
    /// Rows up to which blocks of 32 are better than blocks of 128, half of which would be empty.
    const ROWS_FEW: usize = 64;
    let Input { elements, rows, heads, inputs } = input;
    let Product { weight, bias, out, add } = product;
    let (name, rows_of_block) = match (elements.element(), rows <= ROWS_FEW) {
        (Element::F16, true) => ("gemm_32_f16", 32),
        (Element::F16, false) => ("gemm_128_f16", 128),
        (Element::BF16, true) => ("gemm_32_bf16", 32),
        (Element::BF16, false) => ("gemm_128_bf16", 128),
        (element, _) => return Err(super::buffer::wrong_element(op, element)),
    };
    let outputs = weight.rows / heads;
    let across = [outputs.div_ceil(WEIGHTS), heads];
    if across.into_iter().any(|blocks| blocks > Grid::ACROSS_MAX as usize) {
        return Err(OpError::unsupported(op, format!("{outputs} outputs, {heads} heads")));
    }
    let weight_head = if heads == 1 { 0 } else { outputs * weight.stride };
    let [rows, outputs, inputs, input_stride, weight_stride, out_stride, weight_head] = numbers(
        op,
        [
            ("rows", rows),
            ("outputs", outputs),
            ("inputs", inputs),
            ("stride of the input", heads * inputs),
            ("stride of a weight", weight.stride),
            ("stride of the output", weight.rows),
            ("weight of a head", weight_head),
        ],
    )?;
    if outputs == 0 {
        return Ok(());
    }
    let params = GemmParams {
        input: elements.ptr,
        weight: weight.elements.ptr,
        bias: Slice::ptr_or_null(*bias),
        out: out.ptr,
        rows,
        outputs,
        inputs,
        input_stride,
        weight_stride,
        out_stride,
        input_head: inputs,
        weight_head,
        out_head: outputs,
        is_float: u32::from(out.element() == Element::F32),
        add: u32::from(*add),
    };
    let [across, heads] = across.map(|blocks| blocks as u32);
    let blocks = [rows.div_ceil(rows_of_block), across, heads];
    let grid = Grid { blocks, threads: THREADS, shared_bytes: tile_bytes(rows_of_block as usize) };
    // SAFETY: input, weight, bias and output have as many elements as the numbers say.
    unsafe { gpu.launch(op, Kernel { module: "gemm", name }, grid, &params) }
}
