use super::super::Checker;
use super::{
    EVERYTHING, Inputs, Layer, NONE, ROUNDINGS, Rules, check, close_by_head, on_a_small_device, one, sweep,
};
use crate::OpError;
use crate::cuda::{AttentionScratch, Element, Sequences, attention};

const BF16: Element = Element::BF16;

/// All sides of a warp's keys and of a block's, and two splits.
const SHORT: [(usize, usize); 6] = [(1, 0), (1, 15), (1, 64), (0, 3), (1, 78), (1, 270)];
/// All sides of splits, and several rows that lie in different ones.
const SPLITS: [(usize, usize); 8] =
    [(1, 254), (1, 255), (1, 256), (1, 511), (4, 254), (8, 510), (3, 0), (1, 700)];

pub(in super::super) fn check_decode(c: &mut Checker) -> Result<(), OpError> {
    sweep(c, 16, &SHORT[2..])?;
    for (shape, page) in [((1, 1, 64), 1), ((14, 2, 64), 256), ((16, 1, 64), 4), ((34, 2, 64), 16)] {
        one(c, Layer::new(shape, BF16), NONE, page, &SHORT)?;
    }
    one(c, Layer::new((4, 2, 64), BF16), NONE, 32, &SPLITS)?;
    one(c, Layer { in_keys: true, ..Layer::new((7, 1, 64), BF16) }, EVERYTHING, 16, &SPLITS)?;
    one(c, Layer { cache: Element::E4M3, ..Layer::new((6, 1, 80), Element::F16) }, EVERYTHING, 16, &SPLITS)?;
    // A context so long that its splits are longer.
    one(c, Layer::new((1, 1, 64), BF16), NONE, 16, &[(2, 8191), (1, 8192)])?;
    for window in [1, 2, 64, 200, 255, 256, 257, 100_000] {
        one(c, Layer::new((2, 1, 64), BF16), Rules { window: Some(window), ..NONE }, 16, &SPLITS)?;
    }
    for rules in
        [Rules { soft_cap: Some(0.5), ..NONE }, Rules { slopes: true, ..NONE }, Rules { sinks: true, ..NONE }]
    {
        one(c, Layer::new((4, 2, 64), BF16), rules, 16, &SPLITS[..6])?;
    }
    // Where vectors are not aligned, the kernel for all sizes has to do.
    one(c, Layer { shift: 1, ..Layer::new((2, 1, 64), BF16) }, NONE, 16, &SHORT[..3])?;
    replay(c)?;
    latent(c)
}

/// What was recorded for sequences must do for others with the same bounds.
fn replay(c: &mut Checker) -> Result<(), OpError> {
    let (gpu, layer) = (c.gpu(), Layer::new((4, 2, 64), BF16));
    let inputs = Inputs::new(c, layer, NONE, 16, &[(1, 700), (1, 255), (2, 63)])?;
    let mut before = inputs.batch.sequences();
    before.iter_mut().for_each(|sequence| sequence.start -= 1);
    let (mut sequences, mut scratch) = (Sequences::new(&gpu)?, AttentionScratch::new(&gpu)?);
    sequences.set(&before, 16)?;
    let bounds = sequences.bounds().clone();
    let mut out = c.unwritten(BF16, inputs.query.buffer.len())?;
    let mut run = |sequences: &Sequences| {
        attention(&gpu, inputs.arguments(inputs.query.buffer.all(), sequences, &mut scratch, &mut out))
    };
    run(&sequences)?;
    let graph = gpu.capture(|| run(&sequences))?;
    sequences.set(&inputs.batch.sequences(), 16)?;
    c.equal("replay: bounds", &[sequences.bounds()], &[&bounds]);
    for _ in 0..2 {
        out.fill(0xff)?;
        graph.replay()?;
        close_by_head(c, "replay", &layer, &out, &inputs.expected(), ROUNDINGS)?;
    }
    Ok(())
}

/// Splits of 512 keys, and as many heads as make larger blocks worth while.
fn latent(c: &mut Checker) -> Result<(), OpError> {
    for element in [Element::F16, BF16] {
        for cache in [element, Element::E4M3, Element::E5M2] {
            one(c, Layer { cache, ..Layer::latent(5, element) }, NONE, 16, &[(1, 0), (1, 32), (2, 62)])?;
        }
    }
    one(c, Layer::latent(17, BF16), EVERYTHING, 16, &[(1, 520), (2, 40)])?;
    one(c, Layer::latent(2, BF16), NONE, 16, &[(1, 511), (1, 512), (2, 511)])?;
    for cache in [BF16, Element::E4M3] {
        one(c, Layer { cache, ..Layer::latent(65, BF16) }, NONE, 16, &[(1, 40)])?;
    }
    one(c, Layer { kv_heads: 2, ..Layer::latent(128, BF16) }, EVERYTHING, 16, &[(1, 515)])?;
    let inputs = Inputs::new(c, Layer::latent(64, BF16), NONE, 16, &[(1, 40)])?;
    check(c, on_a_small_device, &inputs, ROUNDINGS)
}
