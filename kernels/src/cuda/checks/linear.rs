use super::{Checker, FLOATS, Floats, bits, computed};
use crate::cuda::{self, Element, Product, Products};
use crate::{DType, Matrix, OpError, reference};

/// Rows, inputs, and the outputs of each product. One input, odd numbers, fewer and more than a step, slices that are full,
/// short and empty; one output, blocks of all shapes that are full or not; few rows, and more than a few.
const SHAPES: [(usize, usize, &[usize]); 13] = [
    (1, 1, &[1]),
    (1, 24, &[24, 9, 8]),
    (2, 7, &[65, 3]),
    (1, 520, &[70]),
    (3, 64, &[33, 1, 0, 130]),
    (4, 72, &[129]),
    (5, 1032, &[17]),
    (8, 96, &[260]),
    (8, 33, &[8, 8, 8, 8, 20]),
    (9, 40, &[7]),
    (13, 88, &[140]),
    (16, 136, &[270, 3]),
    (17, 40, &[20, 65]),
];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for (rows, inputs, outputs) in SHAPES {
            several(c, element, rows, inputs, outputs)?;
        }
        for (rows, heads, inputs, outputs) in
            [(1, 3, 20, 5), (2, 2, 64, 40), (16, 4, 7, 0), (9, 5, 96, 9), (19, 2, 24, 10)]
        {
            per_head(c, element, rows, heads, inputs, outputs)?;
        }
        for before in [[1, 0], [0, 3], [1, 1]] {
            anywhere(c, element, before)?;
        }
        alone(c, element, &[16, 8, 5, 3, 1], 16, 200, 270)?;
    }
    refused(c)
}

/// Biases and additions in turn, and now and then an output of f32.
fn several(
    c: &mut Checker,
    element: Element,
    rows: usize,
    inputs: usize,
    outputs: &[usize],
) -> Result<(), OpError> {
    let gpu = c.gpu();
    let input = c.floats(element, rows * inputs)?;
    let mut parts = Vec::new();
    for (index, &outputs) in outputs.iter().enumerate() {
        let weight = Weight::random(c, element, outputs, inputs, index * 8)?;
        let bias = c.floats(Element::F32, outputs)?;
        let out_element = if index % 2 == 1 { Element::F32 } else { element };
        let before = c.floats(out_element, rows * outputs)?;
        parts.push((weight, bias, before));
    }
    let mut expected = Vec::new();
    let mut outs = Vec::new();
    for (index, (weight, bias, before)) in parts.iter().enumerate() {
        let bias = (index != 1).then_some(&bias.host[..]);
        let mut sums = reference::linear(&input.host, &weight.matrix(), bias);
        let mut out = c.unwritten(before.buffer.element(), before.host.len())?;
        if index % 3 == 2 {
            out.copy_from(before.buffer.all())?;
            sums.iter_mut().zip(&before.host).for_each(|(sum, &before)| *sum += f64::from(before));
        }
        expected.push(sums);
        outs.push(out);
    }
    let mut products = Vec::new();
    for (index, ((weight, bias, _), out)) in parts.iter().zip(&mut outs).enumerate() {
        let bias = (index != 1).then(|| bias.buffer.all());
        let (weight, out) = (weight.on_device(), out.all_mut());
        products.push(Product { weight, bias, out, add: index % 3 == 2 });
    }
    cuda::linear(&gpu, input.buffer.all(), &mut products)?;
    for ((out, expected), outputs) in outs.iter().zip(expected).zip(outputs) {
        let case = format!("linear, {element:?}, {rows} rows of {inputs}, {outputs} outputs");
        c.close(case, out, &expected, roundings(out.element(), inputs))?;
    }
    Ok(())
}

fn per_head(
    c: &mut Checker,
    element: Element,
    rows: usize,
    heads: usize,
    inputs: usize,
    outputs: usize,
) -> Result<(), OpError> {
    let gpu = c.gpu();
    let case = format!("linear per head, {element:?}, {rows} rows, {heads} heads, {outputs} x {inputs}");
    let input = c.floats(element, rows * heads * inputs)?;
    let weight = Weight::random(c, element, heads * outputs, inputs, 8)?;
    let mut out = c.unwritten(element, rows * heads * outputs)?;
    cuda::linear_per_head(&gpu, heads, input.buffer.all(), weight.on_device(), out.all_mut())?;
    let expected = reference::linear_per_head(&input.host, &weight.matrix(), heads);
    c.close(case, &out, &expected, roundings(element, inputs))
}

/// An input or a weight with so many elements before it, and an output, that begin where vectors cannot.
fn anywhere(c: &mut Checker, element: Element, before: [usize; 2]) -> Result<(), OpError> {
    let (gpu, rows, inputs, outputs) = (c.gpu(), 3, 64, 10);
    let input = c.random().numbers(rows * inputs);
    let input = c.placed(element, before[0], &input, 0)?;
    let weight = c.random().numbers(outputs * inputs);
    let weight = c.placed(element, before[1], &weight, 0)?;
    let mut out = c.unwritten(element, 1 + rows * outputs)?;
    let range = 1..out.len();
    let on_device = cuda::Matrix {
        elements: weight.buffer.slice(before[1]..weight.buffer.len()),
        rows: outputs,
        cols: inputs,
        stride: inputs,
    };
    let product = Product { weight: on_device, bias: None, out: out.slice_mut(range.clone()), add: false };
    cuda::linear(&gpu, input.buffer.slice(before[0]..input.buffer.len()), &mut [product])?;
    let bytes: Vec<u8> = weight.host.iter().flat_map(|value| value.to_le_bytes()).collect();
    let matrix = Matrix::new(&bytes, DType::F32, outputs, inputs)?;
    let expected = reference::linear(&input.host, &matrix, None);
    let case = format!("linear, {element:?}, {before:?} before");
    c.close_within(case, &out, range, &expected, roundings(element, inputs))
}

/// Some of the rows alone have the same bits as all of them together.
pub(super) fn alone(
    c: &mut Checker,
    element: Element,
    some: &[usize],
    all: usize,
    inputs: usize,
    outputs: usize,
) -> Result<(), OpError> {
    let input = c.floats(element, all * inputs)?;
    let weight = Weight::random(c, element, outputs, inputs, 0)?;
    let together = product(c, &input, &weight, all, 0)?;
    for &rows in some {
        let first = all - rows;
        let found = product(c, &input, &weight, rows, first)?;
        let case = format!("linear, {element:?}, {rows} of {all} rows of {inputs}, {outputs} outputs");
        c.equal(case, &bits(&found), &bits(&together[first * outputs..]));
    }
    Ok(())
}

fn product(
    c: &Checker,
    input: &Floats,
    weight: &Weight,
    rows: usize,
    first: usize,
) -> Result<Vec<f32>, OpError> {
    let mut out = c.unwritten(Element::F32, rows * weight.rows)?;
    let input = input.buffer.slice(first * weight.cols..(first + rows) * weight.cols);
    let product = Product { weight: weight.on_device(), bias: None, out: out.all_mut(), add: false };
    cuda::linear(&c.gpu(), input, &mut [product])?;
    c.read(&out)
}

/// The kernels of this crate for any number of rows.
pub(super) fn check_own(c: &mut Checker) -> Result<(), OpError> {
    let (gpu, before) = (c.gpu(), c.gpu().products());
    gpu.set_products(Products::Own);
    let result = own(c);
    gpu.set_products(before);
    result
}

fn own(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for (rows, inputs, outputs) in [
            (17, 1, &[1][..]),
            (32, 24, &[128]),
            (33, 65, &[9, 4, 130]),
            (65, 72, &[129, 16]),
            (128, 200, &[17]),
            (129, 40, &[33]),
        ] {
            several(c, element, rows, inputs, outputs)?;
        }
        for (rows, heads, inputs, outputs) in [(18, 3, 20, 5), (70, 2, 64, 40)] {
            per_head(c, element, rows, heads, inputs, outputs)?;
        }
        // Slices of 64 and of 128, of which the last is short.
        alone(c, element, &[1, 16, 20], 70, 136, 33)?;
        alone(c, element, &[3, 17], 66, 600, 9)?;
        alone(c, element, &[1], 20, 77, 5)?;
    }
    Ok(())
}

fn refused(c: &mut Checker) -> Result<(), OpError> {
    const OP: &str = "linear";
    let gpu = c.gpu();
    let weight = Weight::random(c, Element::F16, 3, 8, 0)?;
    let (input, wide) = (c.floats(Element::F16, 16)?, c.floats(Element::F32, 16)?);
    let mut out = c.unwritten(Element::F16, 6)?;
    let mut call = |input, bias, len| {
        let out = out.slice_mut(0..len);
        cuda::linear(&gpu, input, &mut [Product { weight: weight.on_device(), bias, out, add: false }])
    };
    let length = |what, expected, found| Err(OpError::Length { op: OP, what, expected, found });
    let wrong = |what| Err(OpError::unsupported(OP, format!("{what} is of F16, F32 expected")));
    let results = [
        call(input.buffer.all(), None, 6),
        call(input.buffer.slice(0..15), None, 6),
        call(input.buffer.all(), None, 5),
        call(input.buffer.all(), Some(wide.buffer.slice(0..2)), 6),
        call(input.buffer.all(), Some(input.buffer.slice(0..3)), 6),
        call(wide.buffer.all(), None, 6),
    ];
    let expected = [
        Ok(()),
        length("input", 8, 15),
        length("out", 6, 5),
        length("bias", 3, 2),
        wrong("bias"),
        wrong("weight"),
    ];
    c.equal("linear, what does not fit", &results, &expected);
    Ok(())
}

/// Sums are of f32, in whatever order; products that are rounded before a bias is added are rounded twice.
pub(super) fn roundings(element: Element, inputs: usize) -> f64 {
    match element {
        Element::F32 => 8.0 + inputs as f64 / 8.0,
        _ => 2.0 + computed(element, inputs as f64),
    }
}

/// A weight, with something between its rows that is no number.
#[derive(Debug)]
pub(super) struct Weight {
    pub(super) floats: Floats,
    /// Without what is between.
    bytes: Vec<u8>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

impl Weight {
    /// Rows begin where vectors can, or, if nothing is between, one after the other.
    pub(super) fn random(
        c: &mut Checker,
        element: Element,
        rows: usize,
        cols: usize,
        between: usize,
    ) -> Result<Self, OpError> {
        let stride = if between == 0 { cols } else { (cols + between).next_multiple_of(8) };
        let mut values = vec![f32::NAN; rows * stride];
        for row in values.chunks_exact_mut(stride) {
            row[..cols].copy_from_slice(&c.random().numbers(cols));
        }
        let floats = c.given(element, &values)?;
        let dense = floats.host.chunks_exact(stride).flat_map(|row| &row[..cols]);
        let bytes = dense.flat_map(|value| value.to_le_bytes()).collect();
        Ok(Self { floats, bytes, rows, cols, stride })
    }

    pub(super) fn on_device(&self) -> cuda::Matrix<'_> {
        let Self { rows, cols, stride, .. } = *self;
        cuda::Matrix { elements: self.floats.buffer.all(), rows, cols, stride }
    }

    /// The same elements as f32.
    pub(super) fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes, DType::F32, self.rows, self.cols).expect("as many elements")
    }
}
