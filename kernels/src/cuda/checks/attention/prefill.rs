use super::super::Checker;
use super::{EVERYTHING, Inputs, Layer, NONE, ROUNDINGS, Rules, check, close, on_a_small_device, one, sweep};
use crate::OpError;
use crate::cuda::{AttentionScratch, Element, attention};

const BF16: Element = Element::BF16;

/// Less than a block, whole ones of each kind, one row more, and prefixes; with three heads, rows of tokens are in two blocks.
const CHUNKS: [(usize, usize); 5] = [(9, 0), (43, 0), (22, 63), (0, 3), (10, 150)];
/// All sides of tiles of keys.
const BORDERS: [(usize, usize); 6] = [(64, 0), (65, 0), (20, 44), (20, 45), (9, 300), (1, 20)];

pub(in super::super) fn check_prefill(c: &mut Checker) -> Result<(), OpError> {
    sweep(c, 16, &CHUNKS[2..])?;
    for (shape, page) in [((1, 1, 64), 1), ((14, 2, 64), 256), ((17, 1, 64), 4), ((2, 2, 192), 16)] {
        one(c, Layer::new(shape, BF16), NONE, page, &CHUNKS)?;
    }
    one(c, Layer::new((2, 1, 64), BF16), NONE, 32, &BORDERS)?;
    one(c, Layer { in_keys: true, ..Layer::new((7, 1, 64), BF16) }, EVERYTHING, 16, &CHUNKS)?;
    one(c, Layer { cache: Element::E4M3, ..Layer::new((3, 1, 80), Element::F16) }, EVERYTHING, 16, &BORDERS)?;
    // With 109, a tile begins where the first of nine rows sees its first key.
    for window in [1, 2, 63, 64, 65, 109, 100_000] {
        one(c, Layer::new((2, 1, 64), BF16), Rules { window: Some(window), ..NONE }, 16, &BORDERS)?;
    }
    for rules in
        [Rules { soft_cap: Some(0.5), ..NONE }, Rules { slopes: true, ..NONE }, Rules { sinks: true, ..NONE }]
    {
        one(c, Layer::new((4, 2, 64), BF16), rules, 16, &CHUNKS)?;
    }
    many_sequences(c)?;
    latent(c)
}

/// More sequences than a warp looks at at once, some of them decoded.
fn many_sequences(c: &mut Checker) -> Result<(), OpError> {
    let lengths: Vec<_> = (0..40).map(|i| if i % 8 == 5 { (1, i) } else { (9 + i % 3, i % 5) }).collect();
    let inputs = Inputs::new(c, Layer::new((1, 1, 64), BF16), NONE, 4, &lengths)?;
    let mut scratch = AttentionScratch::new(&c.gpu())?;
    close(c, attention, &mut scratch, &inputs, ROUNDINGS).map(drop)
}

fn latent(c: &mut Checker) -> Result<(), OpError> {
    let lengths = [(9, 0), (10, 40)];
    for element in [Element::F16, BF16] {
        for cache in [element, Element::E4M3, Element::E5M2] {
            one(c, Layer { cache, ..Layer::latent(7, element) }, NONE, 16, &lengths)?;
        }
    }
    one(c, Layer::latent(16, BF16), EVERYTHING, 16, &[(12, 100)])?;
    let inputs = Inputs::new(c, Layer::latent(3, BF16), NONE, 16, &lengths)?;
    check(c, on_a_small_device, &inputs, ROUNDINGS)
}
