use super::{Checker, FLOATS, Floats};
use crate::OpError;
use crate::cuda::{Element, Multiply};

/// Rows, outputs and inputs: one, odd, a tile and its neighbours, and a long sum.
const SIZES: [[usize; 3]; 7] =
    [[1, 1, 1], [1, 8, 24], [3, 5, 7], [17, 33, 65], [64, 96, 128], [129, 40, 31], [2, 16, 1000]];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for out_element in if element == Element::F32 { vec![element] } else { vec![element, Element::F32] } {
            for (index, [rows, outputs, inputs]) in SIZES.into_iter().enumerate() {
                // Every combination of these comes up in some size. Rows have a gap behind them.
                let (batch, gap) = ([1, 3][index / 2 % 2], [0, 3, 8][index % 3]);
                let [input_stride, weight_stride, out_stride] =
                    [inputs, inputs, outputs].map(|cols| cols + gap);
                let product = Multiply {
                    rows,
                    outputs,
                    inputs,
                    element,
                    out_element,
                    input_stride,
                    weight_stride,
                    out_stride,
                    add: index % 2 == 1,
                    batch,
                    batch_strides: [rows * input_stride, outputs * weight_stride, rows * out_stride + gap],
                };
                one(c, &product, (index + out_element.size()) % 4 < 2)?;
            }
        }
    }
    Ok(())
}

/// What lies between the rows of the output has to stay. `tuned`: by the fastest algorithm, not the one proposed first.
fn one(c: &mut Checker, product: &Multiply, tuned: bool) -> Result<(), OpError> {
    let gpu = c.gpu();
    let &Multiply { rows, outputs, inputs, element, out_element, batch, batch_strides, .. } = product;
    let case = format!(
        "{batch} x {rows} x {outputs} x {inputs}, {element:?} to {out_element:?}, gaps of {}{}{}",
        product.out_stride - outputs,
        if product.add { ", added" } else { "" },
        if tuned { ", tuned" } else { "" }
    );
    let input = c.floats(element, batch * batch_strides[0])?;
    let weight = c.floats(element, batch * batch_strides[1])?;
    let before = c.floats(out_element, batch * batch_strides[2])?;
    let expected = expected(product, &input, &weight, &before);
    let mut out = before.buffer;
    let mut run =
        || gpu.multiply("multiply", product, input.buffer.all(), weight.buffer.all(), out.all_mut());
    if tuned {
        gpu.tuned(run)?
    } else {
        run()?
    };
    // Each sum is rounded as often as it is long, up and down in turn.
    let roundings = if out_element == Element::F32 { 16.0 + 8.0 * (inputs as f64).sqrt() } else { 2.0 };
    c.close(case, &out, &expected, roundings)
}

fn expected(product: &Multiply, input: &Floats, weight: &Floats, before: &Floats) -> Vec<f64> {
    let mut out: Vec<f64> = before.host.iter().map(|&value| f64::from(value)).collect();
    let [input_batch, weight_batch, out_batch] = product.batch_strides;
    for index in 0..product.batch {
        for row in 0..product.rows {
            let x = &input.host[index * input_batch + row * product.input_stride..][..product.inputs];
            for output in 0..product.outputs {
                let w =
                    &weight.host[index * weight_batch + output * product.weight_stride..][..product.inputs];
                let sum: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let to = &mut out[index * out_batch + row * product.out_stride + output];
                *to = sum + if product.add { *to } else { 0.0 };
            }
        }
    }
    out
}
