//! Products with few rows: see `kernels/cuda/gemv.cu`.

use super::driver::DevicePtr;
use super::linear::{Input, Product, numbers};
use super::params::params;
use super::{Element, Gpu, Grid, Kernel, Slice};
use crate::OpError;

/// Rows up to which this is the fastest way: a step of the tensor cores has as many.
pub(super) const ROWS_MAX: usize = 16;
/// Products of a launch.
pub(super) const PRODUCTS: usize = 4;

/// Warps of a block: each has a slice of the inputs. As in `product.cuh`, like what follows.
const SLICES: usize = 8;

/// Inputs of a slice.
fn slice_length(inputs: usize) -> usize {
    inputs.div_ceil(64 * SLICES) * 64
}

/// Threads of a block whose warps have a slice each.
pub(super) fn threads(inputs: usize) -> u32 {
    32 * inputs.div_ceil(slice_length(inputs)) as u32
}

/// Bytes of shared memory through which the warps of such a block get 8 * `tiles` weights.
pub(super) fn ring_bytes(inputs: usize, tiles: u32) -> u32 {
    let steps = if tiles == 1 { 8 } else { 4 };
    threads(inputs) * steps * tiles * 16
}

params! {
    struct GemvParams {
        input: DevicePtr,
        weight: [DevicePtr; PRODUCTS],
        bias: [DevicePtr; PRODUCTS],
        out: [DevicePtr; PRODUCTS],
        outputs: [u32; PRODUCTS],
        weight_stride: [u32; PRODUCTS],
        first_block: [u32; PRODUCTS],
        is_float: [u32; PRODUCTS],
        add: [u32; PRODUCTS],
        out_stride: [u32; PRODUCTS],
        rows: u32,
        inputs: u32,
        input_stride: u32,
        input_head: u32,
        weight_head: u32,
        out_head: u32,
    }
}

/// A kernel, with the rows and the weights of a block.
#[derive(Clone, Copy)]
struct Shape {
    kernel: Kernel,
    rows: usize,
    tiles: u32,
}

macro_rules! shapes {
    ($element:literal, $(($rows:literal, $tiles:literal)),* $(,)?) => {
        [$(Shape {
            kernel: Kernel {
                module: "gemv",
                name: concat!("gemv_", $rows, "x", $tiles, "_", $element),
            },
            rows: $rows,
            tiles: $tiles,
        }),*]
    };
}
const F16: [Shape; 6] = shapes!("f16", (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4));
const BF16: [Shape; 6] = shapes!("bf16", (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4));
const F32: [Shape; 3] = shapes!("f32", (1, 2), (4, 2), (16, 2));

impl Shape {
    /// The more rows there are, the more weights a block should have, or else it reads more inputs than weights. But all
    /// multiprocessors should have some.
    fn new(gpu: &Gpu, element: Element, rows: usize, outputs: usize) -> Option<Self> {
        let shapes: &[Self] = match element {
            Element::F32 => return F32.into_iter().find(|shape| rows <= shape.rows).or(F32.last().copied()),
            Element::F16 => &F16,
            Element::BF16 => &BF16,
            _ => return None,
        };
        let blocks = 2 * gpu.properties().multiprocessors as usize;
        let mut tiles = match rows {
            0..=2 => 1,
            3..=4 => 2,
            _ => 4,
        };
        while tiles > 1 && outputs < blocks * 8 * tiles {
            tiles /= 2;
        }
        shapes.iter().find(|shape| rows <= shape.rows && tiles == shape.tiles as usize).copied()
    }
}

impl GemvParams {
    /// With the number of blocks that have 8 * `tiles` weights each.
    fn new(
        op: &'static str,
        input: Input<'_>,
        products: &[Product<'_>],
        tiles: u32,
    ) -> Result<(Self, u32), OpError> {
        let Input { elements, rows, heads, inputs } = input;
        let [rows, inputs, input_stride] =
            numbers(op, [("rows", rows), ("inputs", inputs), ("stride of the input", heads * inputs)])?;
        let mut params = Self {
            input: elements.ptr,
            weight: [DevicePtr::NULL; PRODUCTS],
            bias: [DevicePtr::NULL; PRODUCTS],
            out: [DevicePtr::NULL; PRODUCTS],
            outputs: [0; PRODUCTS],
            weight_stride: [0; PRODUCTS],
            first_block: [u32::MAX; PRODUCTS],
            is_float: [0; PRODUCTS],
            add: [0; PRODUCTS],
            out_stride: [0; PRODUCTS],
            rows,
            inputs,
            input_stride,
            input_head: inputs,
            weight_head: 0,
            out_head: 0,
        };
        let mut blocks = 0;
        for (index, Product { weight, bias, out, add }) in products.iter().enumerate() {
            let outputs = weight.rows / heads;
            let weight_head = if heads == 1 { 0 } else { outputs * weight.stride };
            // Where there are heads, there is one product.
            [
                params.outputs[index],
                params.weight_stride[index],
                params.out_stride[index],
                params.weight_head,
            ] = numbers(
                op,
                [
                    ("outputs", outputs),
                    ("stride of a weight", weight.stride),
                    ("stride of the output", weight.rows),
                    ("weight of a head", weight_head),
                ],
            )?;
            params.out_head = params.outputs[index];
            params.weight[index] = weight.elements.ptr;
            params.bias[index] = Slice::ptr_or_null(*bias);
            params.out[index] = out.ptr;
            params.first_block[index] = blocks;
            params.is_float[index] = u32::from(out.element() == Element::F32);
            params.add[index] = u32::from(*add);
            blocks += params.outputs[index].div_ceil(8 * tiles);
        }
        Ok((params, blocks))
    }
}

/// Up to [`PRODUCTS`] products of one input, in one launch. With 16-bit types there are at most [`ROWS_MAX`] rows. Shapes
/// are right, and there are rows and inputs.
pub(super) fn gemv(
    gpu: &Gpu,
    op: &'static str,
    input: Input<'_>,
    products: &mut [Product<'_>],
) -> Result<(), OpError> {
    let Input { elements, rows, heads, inputs } = input;
    let outputs = products.iter().map(|product| product.weight.rows).sum();
    let Shape { kernel, rows: rows_of_block, tiles } = Shape::new(gpu, elements.element(), rows, outputs)
        .ok_or_else(|| super::buffer::wrong_element(op, elements.element()))?;
    let (params, blocks) = GemvParams::new(op, input, products, tiles)?;
    if blocks == 0 {
        return Ok(());
    }
    let across = [rows.div_ceil(rows_of_block), heads];
    if across.into_iter().any(|blocks| blocks > Grid::ACROSS_MAX as usize) {
        return Err(OpError::unsupported(op, format!("{rows} rows, {heads} heads")));
    }
    let [across, heads] = across.map(|blocks| blocks as u32);
    let (threads, shared_bytes) = (threads(inputs), ring_bytes(inputs, tiles));
    let grid = Grid { blocks: [blocks, across, heads], threads, shared_bytes };
    // SAFETY: input, weights, biases and outputs have as many elements as the numbers say.
    unsafe { gpu.launch(op, kernel, grid, &params) }
}
