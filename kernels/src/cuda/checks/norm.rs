use super::{Checker, FLOATS};
use crate::cuda::{self, Element};
use crate::{NormKind, OpError, reference};

/// One element, odd widths, whole vectors, and more than a block holds at once.
const WIDTHS: [usize; 7] = [1, 6, 24, 96, 257, 1000, 5128];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for width in WIDTHS {
            for (kind, period) in [(NormKind::Rms, 1), (NormKind::Layer, 3)] {
                both(c, element, kind, width, period)?;
                wide(c, element, kind, width)?;
            }
        }
    }
    Ok(())
}

/// A residual stream in f32.
fn wide(c: &mut Checker, element: Element, kind: NormKind, width: usize) -> Result<(), OpError> {
    let (gpu, rows, eps) = (c.gpu(), 3, 1e-5);
    let case = format!("{kind:?} norm of f32, {element:?}, {rows} rows of {width}");
    let (delta, weight) = (c.floats(element, rows * width)?, c.floats(Element::F32, width)?);
    let mut residual = c.floats(Element::F32, rows * width)?;
    let norm = crate::Norm { kind, width, weight: Some(&weight.host), bias: None, eps };
    let on_device = cuda::Norm { kind, width, weight: Some(weight.buffer.all()), bias: None, eps };
    let mut out = c.unwritten(element, rows * width)?;
    cuda::norm(&gpu, residual.buffer.all(), on_device, out.all_mut())?;
    c.close(format!("{case}, alone"), &out, &reference::norm(&residual.host, &norm), 8.0)?;
    let (sum, normed) = reference::add_norm(&residual.host, &delta.host, &norm);
    let mut out = c.unwritten(element, rows * width)?;
    cuda::add_norm(&gpu, residual.buffer.all_mut(), delta.buffer.all(), on_device, out.all_mut())?;
    c.close(format!("{case}, residual"), &residual.buffer, &sum, 2.0)?;
    c.close(format!("{case}, after an addition"), &out, &normed, 8.0)
}

/// With all weights and an addition before, then without either and in place.
fn both(
    c: &mut Checker,
    element: Element,
    kind: NormKind,
    width: usize,
    period: usize,
) -> Result<(), OpError> {
    let (gpu, rows, eps) = (c.gpu(), 2 * period + 1, 1e-5);
    let case = format!("{kind:?} norm, {element:?}, {rows} rows of {width}");
    let (weight, bias) = (c.floats(Element::F32, period * width)?, c.floats(Element::F32, period * width)?);
    let delta = c.floats(element, rows * width)?;
    let mut residual = c.floats(element, rows * width)?;
    let norm = crate::Norm { kind, width, weight: Some(&weight.host), bias: Some(&bias.host), eps };
    let (sum, _) = reference::add_norm(&residual.host, &delta.host, &norm);
    let mut out = c.unwritten(element, rows * width)?;
    let on_device =
        cuda::Norm { kind, width, weight: Some(weight.buffer.all()), bias: Some(bias.buffer.all()), eps };
    cuda::add_norm(&gpu, residual.buffer.all_mut(), delta.buffer.all(), on_device, out.all_mut())?;
    c.close(format!("{case}, residual"), &residual.buffer, &sum, 2.0)?;
    // The norm is that of the rounded sum.
    let sum = c.read(&residual.buffer)?;
    c.close(format!("{case}, after an addition"), &out, &reference::norm(&sum, &norm), 8.0)?;

    let plain = crate::Norm { weight: None, bias: None, ..norm };
    let expected = reference::norm(&delta.host, &plain);
    let mut x = delta.buffer;
    let on_device = cuda::Norm { weight: None, bias: None, ..on_device };
    cuda::norm_in_place(&gpu, x.all_mut(), on_device)?;
    c.close(format!("{case}, in place"), &x, &expected, 8.0)
}
