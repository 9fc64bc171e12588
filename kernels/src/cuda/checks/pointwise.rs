use std::sync::Arc;

use super::{Checker, FLOATS, bits, computed};
use crate::cuda::{self, CopyParts, Element, Gpu, Slice, SliceMut};
use crate::{Activation, Gating, OpError, reference};

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu];

/// Elements, and how many are before them: none, one, vectors with and without a rest, at any alignment, and more than a
/// block does.
const LENGTHS: [(usize, usize); 7] = [(0, 0), (1, 0), (8, 0), (37, 0), (64, 1), (64, 4), (2051, 8)];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for (len, before) in LENGTHS {
            maps(c, element, len, before)?;
            gatings(c, element, len, before)?;
            conversions(c, element, len, before)?;
        }
        tails(c, element)?;
        specials(c, element)?;
        for (rows, width) in [(1, 1), (3, 7), (5, 24), (2, 96), (4, 1000), (3, 4104), (0, 5)] {
            rows_of(c, element, rows, width)?;
        }
        for (parts, widths, places, width) in [
            (1, (7, 9), (1, 2), 5),
            (3, (24, 16), (8, 0), 16),
            (2, (192, 128), (128, 64), 64),
            (2, (2100, 2052), (4, 0), 2052),
            (2, (6, 6), (0, 0), 0),
        ] {
            parts_of(c, element, parts, widths, places, width)?;
        }
        for width in [1, 6, 40, 2060] {
            selection(c, element, width)?;
        }
    }
    Ok(())
}

/// Numbers up to 12, and for the second half of them small ones.
fn numbers(c: &mut Checker, len: usize) -> Vec<f32> {
    let mut numbers = c.random().numbers(len);
    let (wide, small) = numbers.split_at_mut(len / 2);
    wide.iter_mut().for_each(|x| *x *= 12.0);
    small.iter_mut().for_each(|x| *x *= 0.1);
    numbers
}

type Run<'a> = &'a dyn Fn(&Arc<Gpu>, SliceMut<'_>) -> Result<(), OpError>;
type Definition<'a> = &'a dyn Fn(&[f32]) -> Vec<f64>;

fn maps(c: &mut Checker, element: Element, len: usize, before: usize) -> Result<(), OpError> {
    let mut case = |name: String, roundings: f64, run: Run<'_>, definition: Definition<'_>| {
        let values = numbers(c, len);
        let mut x = c.placed(element, before, &values, 1)?;
        run(&c.gpu(), x.buffer.slice_mut(before..before + len))?;
        let case = format!("{name}, {element:?}, {len} behind {before}");
        let expected = definition(&x.host);
        c.close_within(case, &x.buffer, before..before + len, &expected, computed(element, roundings))
    };
    for activation in ACTIVATIONS {
        let run = |gpu: &Arc<Gpu>, x: SliceMut<'_>| cuda::activate(gpu, activation, x);
        case(format!("{activation:?}"), 8.0, &run, &|x| reference::activate(activation, x))?;
    }
    case("scale".into(), 0.0, &|gpu, x| cuda::scale(gpu, x, 0.37), &|x| reference::scale(x, 0.37))?;
    case("clamp".into(), 0.0, &|gpu, x| cuda::clamp(gpu, x, 8.0), &|x| reference::clamp(x, 8.0))?;
    case("soft_cap".into(), 8.0, &|gpu, x| cuda::soft_cap(gpu, x, 5.0), &|x| reference::soft_cap(x, 5.0))
}

fn gatings(c: &mut Checker, element: Element, len: usize, before: usize) -> Result<(), OpError> {
    let swiglu = [(7.0, 1.702), (0.5, 1.0), (0.0, 1.702), (f32::INFINITY, -1.0)]
        .map(|(limit, alpha)| Gating::ClampedSwiglu { limit, alpha });
    for gating in ACTIVATIONS.map(Gating::Activation).into_iter().chain(swiglu) {
        let name = format!("{gating:?}");
        joined(
            c,
            element,
            len,
            before,
            10.0,
            (&name, &|gpu, x, y| cuda::gated(gpu, gating, x, y)),
            &|x, y| reference::gated(gating, x, y),
        )?;
    }
    joined(c, element, len, before, 1.0, ("add", &|gpu, x, y| cuda::add(gpu, x, y)), &reference::add)?;
    let (values, others) = (numbers(c, len), numbers(c, len));
    let mut x = c.placed(Element::F32, before, &values, 1)?;
    let y = c.placed(element, before, &others, 0)?;
    let place = before..before + len;
    cuda::add(&c.gpu(), x.buffer.slice_mut(place.clone()), y.buffer.slice(place.clone()))?;
    let case = format!("add to f32, {element:?}, {len} behind {before}");
    c.close_within(case, &x.buffer, place, &reference::add(&x.host, &y.host), 2.0)
}

type DefinitionOfTwo<'a> = &'a dyn Fn(&[f32], &[f32]) -> Vec<f64>;
type RunOfTwo<'a> = &'a dyn Fn(&Arc<Gpu>, SliceMut<'_>, Slice<'_>) -> Result<(), OpError>;

fn joined(
    c: &mut Checker,
    element: Element,
    len: usize,
    before: usize,
    roundings: f64,
    (name, run): (&str, RunOfTwo<'_>),
    definition: DefinitionOfTwo<'_>,
) -> Result<(), OpError> {
    // The other half lies at another alignment, except in the longest.
    let apart = if len > 100 { before } else { before + 3 };
    let (values, others) = (numbers(c, len), numbers(c, len));
    let mut x = c.placed(element, before, &values, 1)?;
    let y = c.placed(element, apart, &others, 0)?;
    run(&c.gpu(), x.buffer.slice_mut(before..before + len), y.buffer.slice(apart..apart + len))?;
    let case = format!("{name}, {element:?}, {len} behind {before}");
    let expected = definition(&x.host, &y.host);
    c.close_within(case, &x.buffer, before..before + len, &expected, computed(element, roundings))
}

/// Where results are small, their digits count too.
fn tails(c: &mut Checker, element: Element) -> Result<(), OpError> {
    let gpu = c.gpu();
    // Further down the results are below f16's normal numbers.
    let far = if element == Element::F16 { -3.1 } else { -4.6 };
    for activation in ACTIVATIONS.into_iter().filter(|&activation| activation != Activation::Relu) {
        for (low, high) in [(far, far + 0.2), (-3e-3, 3e-3)] {
            let values: Vec<f32> =
                c.random().numbers(100).into_iter().map(|x| low + (x + 1.0) / 2.0 * (high - low)).collect();
            let mut x = c.given(element, &values)?;
            cuda::activate(&gpu, activation, x.buffer.all_mut())?;
            let case = format!("{activation:?}, {element:?}, from {low} to {high}");
            c.close(case, &x.buffer, &reference::activate(activation, &x.host), computed(element, 64.0))?;
        }
    }
    Ok(())
}

/// NaN stays, the largest numbers do not overflow, and what is limited is limited.
fn specials(c: &mut Checker, element: Element) -> Result<(), OpError> {
    let (gpu, large) = (c.gpu(), if element == Element::F16 { 6e4 } else { 1e38 });
    let given = c.given(element, &[large, -large, 0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY])?;
    let large = given.host[0];
    let mut case = |name: String, run: Run<'_>, expected: [f32; 5], infinite: Option<[f32; 2]>| {
        let mut x = c.given(element, &given.host)?;
        run(&gpu, x.buffer.all_mut())?;
        let found = c.read(&x.buffer)?;
        // Adding zero takes the sign from zeros, which does not matter.
        let same = |found: &[f32], expected: &[f32]| {
            let plain = |values: &[f32]| -> Vec<Option<u32>> {
                values.iter().map(|value| (!value.is_nan()).then(|| (value + 0.0).to_bits())).collect()
            };
            plain(found) == plain(expected)
        };
        let right =
            same(&found[..5], &expected) && infinite.is_none_or(|expected| same(&found[5..], &expected));
        c.equal(format!("{name}, {element:?}, of special numbers"), &[right], &[true]);
        Ok(())
    };
    for activation in ACTIVATIONS {
        let run = |gpu: &Arc<Gpu>, x: SliceMut<'_>| cuda::activate(gpu, activation, x);
        case(format!("{activation:?}"), &run, [large, 0.0, 0.0, 0.0, f32::NAN], None)?;
    }
    let limited = [3.0, -3.0, 0.0, 0.0, f32::NAN];
    case("clamp".into(), &|gpu, x| cuda::clamp(gpu, x, 3.0), limited, Some([3.0, -3.0]))?;
    case("soft_cap".into(), &|gpu, x| cuda::soft_cap(gpu, x, 3.0), limited, Some([3.0, -3.0]))
}

fn conversions(c: &mut Checker, element: Element, len: usize, before: usize) -> Result<(), OpError> {
    let gpu = c.gpu();
    for to in FLOATS {
        let values = numbers(c, len);
        let from = c.placed(element, before, &values, 0)?;
        let mut out = c.unwritten(to, len + 2)?;
        cuda::convert(&gpu, from.buffer.slice(before..before + len), out.slice_mut(1..len + 1))?;
        let expected = c.placed(to, 1, &from.host, 1)?;
        let (found, expected) = (c.read(&out)?, c.read(&expected.buffer)?);
        c.equal(format!("convert {element:?} to {to:?}, {len}"), &bits(&found), &bits(&expected));
        let mut aligned = c.unwritten(to, len)?;
        cuda::convert(&gpu, from.buffer.slice(before..before + len), aligned.all_mut())?;
        let found = c.read(&aligned)?;
        c.equal(
            format!("convert {element:?} to {to:?}, {len} aligned"),
            &bits(&found),
            &bits(&expected[1..=len]),
        );
    }
    Ok(())
}

fn rows_of(c: &mut Checker, element: Element, rows: usize, width: usize) -> Result<(), OpError> {
    let gpu = c.gpu();
    for (before, bias_before) in [(0, 0), (1, 0), (0, 1)] {
        let (values, len) = (numbers(c, rows * width), rows * width);
        let bias = c.floats(Element::F32, bias_before + width)?;
        let mut x = c.placed(element, before, &values, 1)?;
        cuda::add_bias(
            &gpu,
            x.buffer.slice_mut(before..before + len),
            bias.buffer.slice(bias_before..bias_before + width),
        )?;
        let column = |i: usize| f64::from(bias.host[bias_before + i % width]);
        let added: Vec<f64> = x.host.iter().enumerate().map(|(i, &x)| f64::from(x) + column(i)).collect();
        let case = format!("add_bias, {element:?}, {rows} rows of {width} behind {before}");
        c.close_within(case, &x.buffer, before..before + len, &added, computed(element, 1.0))?;

        let gates = numbers(c, rows);
        let gate = c.given(element, &gates)?;
        let mut x = c.placed(element, before, &values, 1)?;
        cuda::scale_rows(&gpu, x.buffer.slice_mut(before..before + len), gate.buffer.all())?;
        let factor = |i: usize| 1.0 / (1.0 + (-f64::from(gate.host[i / width])).exp());
        let scaled: Vec<f64> = x.host.iter().enumerate().map(|(i, &x)| f64::from(x) * factor(i)).collect();
        let case = format!("scale_rows, {element:?}, {rows} rows of {width} behind {before}");
        c.close_within(case, &x.buffer, before..before + len, &scaled, computed(element, 4.0))?;
    }
    Ok(())
}

fn parts_of(
    c: &mut Checker,
    element: Element,
    parts: usize,
    (from_width, to_width): (usize, usize),
    (out_of, into): (usize, usize),
    width: usize,
) -> Result<(), OpError> {
    let (gpu, rows) = (c.gpu(), 3);
    let from = c.floats(element, rows * parts * from_width)?;
    let mut to = c.unwritten(element, rows * parts * to_width)?;
    let copied = CopyParts { rows, parts, from: from.buffer.all(), out_of, to: to.all_mut(), into, width };
    cuda::copy_parts(&gpu, copied)?;
    let mut expected = vec![f32::NAN; rows * parts * to_width];
    for (to, from) in expected.chunks_exact_mut(to_width).zip(from.host.chunks_exact(from_width)) {
        to[into..into + width].copy_from_slice(&from[out_of..out_of + width]);
    }
    // NaN has many patterns.
    let plain = |values: &[f32]| {
        bits(&values.iter().map(|x| if x.is_nan() { f32::NAN } else { *x }).collect::<Vec<_>>())
    };
    let case =
        format!("copy_parts, {element:?}, {width} from {out_of} of {from_width} to {into} of {to_width}");
    let found = c.read(&to)?;
    c.equal(case, &plain(&found), &plain(&expected));
    Ok(())
}

fn selection(c: &mut Checker, element: Element, width: usize) -> Result<(), OpError> {
    let (gpu, rows) = (c.gpu(), [4, 0, 6, 0, 7]);
    let x = c.floats(element, 7 * width)?;
    let rows_there = gpu.upload(&rows)?;
    let mut out = c.unwritten(element, rows.len() * width)?;
    cuda::select_rows(&gpu, x.buffer.all(), width, rows_there.all(), out.all_mut())?;
    let none = vec![0.0; width];
    let row = |&row: &u32| x.host.get(row as usize * width..(row as usize + 1) * width).unwrap_or(&none);
    let expected: Vec<f32> = rows.iter().flat_map(row).copied().collect();
    let found = c.read(&out)?;
    c.equal(format!("select_rows, {element:?}, of {width}"), &bits(&found), &bits(&expected));
    Ok(())
}
