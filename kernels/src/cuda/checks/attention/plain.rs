use super::super::{Checker, FLOATS};
use super::{Inputs, Layer, Rules, check};
use crate::cuda::attention::attention_plain;
use crate::cuda::{AttentionScratch, Element, Sequences};
use crate::{OpError, Sequence};

/// Nothing before, all sides of a block's keys, more than one of them, chunks, and no rows at all.
const LENGTHS: [(usize, usize); 8] =
    [(1, 0), (3, 125), (1, 127), (0, 5), (2, 128), (9, 0), (1, 300), (1, 16)];
const FEW: [(usize, usize); 3] = [(2, 127), (5, 0), (1, 40)];

const EVERYTHING: Rules = Rules { window: Some(40), soft_cap: Some(2.0), slopes: true, sinks: true };

pub(in super::super) fn check_plain(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for cache in [element, Element::E4M3, Element::E5M2] {
            for rules in [Rules::default(), EVERYTHING] {
                one(c, Layer { cache, ..Layer::new((4, 2, 32), element) }, rules, 16, &FEW)?;
            }
        }
    }
    sizes(c)?;
    each_rule(c)?;
    refusals(c)
}

/// Ways to share heads, sizes of all kinds, and pages of all kinds.
fn sizes(c: &mut Checker) -> Result<(), OpError> {
    let plain = Rules::default();
    for (shape, page) in
        [((1, 1, 1), 1), ((6, 2, 7), 16), ((4, 1, 20), 4), ((2, 2, 64), 256), ((2, 1, 257), 32)]
    {
        one(c, Layer::new(shape, Element::F32), plain, page, &LENGTHS)?;
    }
    for element in [Element::F32, Element::BF16] {
        let layer = Layer { value_dim: 33, ..Layer::new((4, 2, 20), element) };
        one(c, layer, plain, 16, &FEW)?;
        let layer = Layer { value_dim: 130, in_keys: true, ..Layer::new((3, 1, 136), element) };
        one(c, layer, plain, 16, &FEW)?;
        one(c, Layer { cache: Element::E4M3, ..layer }, plain, 16, &FEW)?;
    }
    Ok(())
}

fn each_rule(c: &mut Checker) -> Result<(), OpError> {
    let none = Rules::default();
    for window in [1, 2, 127, 128, 129, 1000, usize::MAX] {
        let layer = Layer::new((2, 1, 8), Element::F32);
        one(c, layer, Rules { window: Some(window), ..none }, 8, &LENGTHS)?;
    }
    for rules in [
        Rules { soft_cap: Some(0.5), ..none },
        Rules { soft_cap: Some(1e6), ..none },
        Rules { slopes: true, ..none },
        Rules { sinks: true, ..none },
    ] {
        one(c, Layer::new((4, 2, 12), Element::F32), rules, 16, &FEW)?;
    }
    Ok(())
}

fn one(
    c: &mut Checker,
    layer: Layer,
    rules: Rules,
    page: usize,
    lengths: &[(usize, usize)],
) -> Result<(), OpError> {
    let inputs = Inputs::new(c, layer, rules, page, lengths)?;
    // Scores are sums of many products, and their errors are relative errors of the weights.
    // A slope makes scores as large as the distance is long, and what they lose to rounding with them.
    let roundings = if layer.element == Element::F32 { 256.0 } else { 2.0 };
    check(c, attention_plain, &inputs, roundings)
}

/// What does not fit must not be launched.
fn refusals(c: &mut Checker) -> Result<(), OpError> {
    let mut sequences = Sequences::new(&c.gpu())?;
    for (what, rows, start, slots, page) in [
        ("pages of 3", 0..1, 2, &[0, 1, 2][..], 3),
        ("a page that begins within another", 0..1, 1, &[2, 3], 4),
        ("slots of two pages", 0..2, 1, &[4, 5, 2], 4),
        ("a hole in the new slots", 0..3, 0, &[4, 6, 6], 4),
        ("a hole before the last of the old slots", 0..1, 4, &[4, 5, 6, 8, 8], 4),
        ("a row before the first", 1..2, 0, &[0], 4),
        ("too few slots", 0..2, 3, &[0, 1, 2, 3], 4),
        ("a position beyond all", 0..1, usize::MAX, &[0], 4),
    ] {
        let result = sequences.set(&[Sequence { rows, start, slots }], page);
        c.equal(format!("refuses {what}"), &[result.is_err()], &[true]);
    }
    let layer = Layer::new((2, 1, 8), Element::F32);
    let mut inputs = Inputs::new(c, layer, Rules::default(), 4, &[(2, 5)])?;
    let rows = &mut inputs.batch.sequences[0];
    let rows_one_more = (0..3, rows.1 - 1, rows.2.clone());
    let mut slots = rows.2.clone();
    slots[4..7].copy_from_slice(&[400, 401, 402]);
    let outside = (0..2, rows.1, slots);
    for (what, sequence) in
        [("more rows than queries", rows_one_more), ("slots outside of the cache", outside)]
    {
        inputs.batch.sequences = vec![sequence];
        let result =
            inputs.found(c, attention_plain, &mut AttentionScratch::new(&c.gpu())?, &inputs.batch, 0);
        c.equal(format!("refuses {what}"), &[result.is_err()], &[true]);
    }
    inputs.rules.window = Some(0);
    let result = inputs.found(c, attention_plain, &mut AttentionScratch::new(&c.gpu())?, &inputs.batch, 0);
    c.equal("refuses a window of no tokens", &[result.is_err()], &[true]);
    Ok(())
}
