use super::linear::Weight;
use super::{Checker, FLOATS, bits, computed};
use crate::cuda::{self, Element, LowRank};
use crate::{OpError, reference};

/// Rows, inputs, rank and outputs: one, odd, whole vectors, a block and its neighbours.
const SHAPES: [[usize; 4]; 8] = [
    [1, 24, 4, 24],
    [1, 1, 1, 1],
    [3, 64, 8, 127],
    [8, 72, 16, 128],
    [9, 33, 5, 129],
    [15, 96, 64, 40],
    [17, 40, 20, 7],
    [70, 24, 3, 9],
];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for [rows, inputs, rank, outputs] in SHAPES {
            one(c, element, rows, inputs, rank, outputs)?;
        }
    }
    refused(c)
}

/// The result of the last row does not change when it is alone.
fn one(
    c: &mut Checker,
    element: Element,
    rows: usize,
    inputs: usize,
    rank: usize,
    outputs: usize,
) -> Result<(), OpError> {
    let case = format!("low rank, {element:?}, {rows} rows of {inputs}, rank {rank}, {outputs} outputs");
    let (a, b) = (
        Weight::random(c, element, rank, inputs, rank % 2 * 8)?,
        Weight::random(c, element, outputs, rank, rank % 3 * 8)?,
    );
    let input = c.floats(element, rows * inputs)?;
    let before = c.floats(element, rows * outputs)?;
    let scale = 0.75;
    let inner = reference::linear(&input.host, &a.matrix(), None);
    // The definition of a product takes f32, so the inner sums are rounded here as they are on the device.
    let inner: Vec<f32> = inner.into_iter().map(|value| (value * f64::from(scale)) as f32).collect();
    let mut expected = reference::linear(&inner, &b.matrix(), None);
    expected.iter_mut().zip(&before.host).for_each(|(sum, &before)| *sum += f64::from(before));

    let gpu = c.gpu();
    let run = |first: usize| -> Result<_, OpError> {
        let rows = rows - first;
        let mut out = c.unwritten(element, rows * outputs)?;
        out.copy_from(before.buffer.slice(first * outputs..before.host.len()))?;
        let mut inner = c.unwritten(Element::F32, rows * rank)?;
        let args = LowRank {
            a: a.on_device(),
            b: b.on_device(),
            scale,
            input: input.buffer.slice(first * inputs..input.host.len()),
            inner: inner.all_mut(),
            out: out.all_mut(),
        };
        cuda::add_low_rank(&gpu, args)?;
        Ok(out)
    };
    let (all, last) = (run(0)?, run(rows - 1)?);
    c.close(&case, &all, &expected, computed(element, 8.0 + (inputs + rank) as f64 / 4.0))?;
    let (all, last) = (c.read(&all)?, c.read(&last)?);
    c.equal(format!("{case}, the last alone"), &bits(&last), &bits(&all[(rows - 1) * outputs..]));
    Ok(())
}

fn refused(c: &mut Checker) -> Result<(), OpError> {
    const OP: &str = "add_low_rank";
    let gpu = c.gpu();
    let (a, b) = (Weight::random(c, Element::F16, 4, 8, 0)?, Weight::random(c, Element::F16, 6, 5, 0)?);
    let input = c.floats(Element::F16, 8)?;
    let (mut inner, mut out) = (c.unwritten(Element::F32, 4)?, c.unwritten(Element::F16, 6)?);
    let mut call = |b, rank| {
        let (inner, out) = (inner.slice_mut(0..rank), out.all_mut());
        let args = LowRank { a: a.on_device(), b, scale: 1.0, input: input.buffer.all(), inner, out };
        cuda::add_low_rank(&gpu, args)
    };
    let fitting = cuda::Matrix { cols: 4, ..b.on_device() };
    let results = [call(b.on_device(), 4), call(fitting, 3), call(fitting, 4)];
    let length = |what, expected, found| Err(OpError::Length { op: OP, what, expected, found });
    c.equal(
        "low rank, what does not fit",
        &results,
        &[length("a row of b", 4, 5), length("inner", 4, 3), Ok(())],
    );
    Ok(())
}
