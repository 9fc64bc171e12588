//! Products with weight matrices.

use super::params::fit;
use super::{Element, Gpu, Matrix, Multiply, Products, Slice, SliceMut, add_bias, gemm, gemv};
use crate::OpError;
use crate::error::{check_length, check_rows};

/// One product of a [`linear`] call: `out[t, o] = sum over i of input[t, i] * weight[o, i] + bias[o]`, or `+=`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: Matrix<'a>,
    /// `[outputs]`, f32.
    pub bias: Option<Slice<'a>>,
    /// `[T, outputs]`, of the input's type or f32.
    pub out: SliceMut<'a>,
    /// Whether the product is added to what is in `out`, or takes its place.
    pub add: bool,
}

/// Rows that are multiplied, each of which has as many inputs for each head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Input<'a> {
    /// `[rows, heads, inputs]`
    pub(super) elements: Slice<'a>,
    pub(super) rows: usize,
    pub(super) heads: usize,
    pub(super) inputs: usize,
}

/// Products of one input with several weights of its type. `input`: `[T, inputs]`.
///
/// For few tokens up to four products are one launch, which reads every weight once. For more, a library computes them in
/// the order that it likes best, or the device's own kernels do, as [`Gpu::products`] says.
///
/// Errors when the weights differ in their number of inputs, or have none.
pub fn linear(gpu: &Gpu, input: Slice<'_>, products: &mut [Product<'_>]) -> Result<(), OpError> {
    const OP: &str = "linear";
    let Some(inputs) = products.first().map(|product| product.weight.cols) else {
        return Ok(());
    };
    if inputs == 0 {
        return Err(OpError::unsupported(OP, "a weight without inputs"));
    }
    let rows = check_rows(OP, "input", inputs, input.len())?;
    for Product { weight, bias, out, .. } in products.iter() {
        check_length(OP, "a row of the weight", inputs, weight.cols)?;
        weight.check(OP, "weight", input.element())?;
        if let Some(bias) = bias {
            bias.check(OP, "bias", Element::F32, weight.rows)?;
        }
        let element = if out.element() == Element::F32 { Element::F32 } else { input.element() };
        out.check(OP, "out", element, rows.saturating_mul(weight.rows))?;
    }
    multiply(gpu, OP, Input { elements: input, rows, heads: 1, inputs }, products)
}

/// One product per head, of its own inputs and its own rows of the weight:
/// `out[t, h, o] = sum over i of input[t, h, i] * weight[h, o, i]`.
///
/// - `input`: `[T, heads, inputs]`
/// - `weight`: `[heads * outputs, inputs]`
/// - `out`: `[T, heads, outputs]`, of the input's type or f32
///
/// Errors when the weight's rows cannot be shared out among the heads, or it has no inputs.
pub fn linear_per_head(
    gpu: &Gpu,
    heads: usize,
    input: Slice<'_>,
    weight: Matrix<'_>,
    out: SliceMut<'_>,
) -> Result<(), OpError> {
    const OP: &str = "linear_per_head";
    if weight.cols == 0 {
        return Err(OpError::unsupported(OP, "a weight without inputs"));
    }
    if heads == 0 || !weight.rows.is_multiple_of(heads) {
        let reason = format!("{} rows of the weight cannot be shared out among {heads} heads", weight.rows);
        return Err(OpError::unsupported(OP, reason));
    }
    weight.check(OP, "weight", input.element())?;
    let rows = check_rows(OP, "input", heads.saturating_mul(weight.cols), input.len())?;
    let element = if out.element() == Element::F32 { Element::F32 } else { input.element() };
    out.check(OP, "out", element, rows.saturating_mul(weight.rows))?;
    let input = Input { elements: input, rows, heads, inputs: weight.cols };
    multiply(gpu, OP, input, &mut [Product { weight, bias: None, out, add: false }])
}

/// Shapes are right.
fn multiply(
    gpu: &Gpu,
    op: &'static str,
    input: Input<'_>,
    products: &mut [Product<'_>],
) -> Result<(), OpError> {
    if input.rows <= gemv::ROWS_MAX || gpu.products() == Products::Own {
        return multiply_here(gpu, op, input, products);
    }
    products.iter_mut().try_for_each(|product| by_library(gpu, op, input, product))
}

/// By kernels whose sums have the same bits however many rows there are. Shapes are right.
pub(super) fn multiply_here(
    gpu: &Gpu,
    op: &'static str,
    input: Input<'_>,
    products: &mut [Product<'_>],
) -> Result<(), OpError> {
    if input.rows == 0 {
        return Ok(());
    }
    if input.rows <= gemv::ROWS_MAX || input.elements.element() == Element::F32 {
        return products
            .chunks_mut(gemv::PRODUCTS)
            .try_for_each(|products| gemv::gemv(gpu, op, input, products));
    }
    products.iter_mut().try_for_each(|product| gemm::gemm(gpu, op, input, product))
}

fn by_library(
    gpu: &Gpu,
    op: &'static str,
    input: Input<'_>,
    product: &mut Product<'_>,
) -> Result<(), OpError> {
    let Input { elements, rows, heads, inputs } = input;
    let Product { weight, bias, out, add } = product;
    let outputs = weight.rows / heads;
    let shape = Multiply {
        rows,
        outputs,
        inputs,
        element: elements.element(),
        out_element: out.element(),
        input_stride: heads * inputs,
        weight_stride: weight.stride,
        out_stride: heads * outputs,
        add: *add,
        batch: heads,
        batch_strides: [inputs, outputs * weight.stride, outputs],
    };
    gpu.multiply(op, &shape, elements, weight.elements, out.reborrow())?;
    match bias {
        Some(bias) => add_bias(gpu, out.reborrow(), *bias),
        None => Ok(()),
    }
}

/// Numbers of a product as its kernels take them: whatever they count in fits into an `int` there.
pub(super) fn numbers<const N: usize>(
    op: &'static str,
    values: [(&'static str, usize); N],
) -> Result<[u32; N], OpError> {
    let mut numbers = [0; N];
    for (number, (what, value)) in numbers.iter_mut().zip(values) {
        *number = fit(op, what, value)?;
    }
    Ok(numbers)
}
