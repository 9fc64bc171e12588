use super::{Checker, FLOATS, Floats, bits, computed};
use crate::cuda::{self, Buffer, E4M3, E5M2, Element, RopeCacheWrite};
use crate::{HeadShape, OpError, RopeLayout, reference};

/// Heads, what is rotated of them, and elements of all values of a token.
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: (usize, usize, usize),
    rotary_dim: usize,
    start: usize,
    value_width: usize,
    tokens: usize,
    /// Elements before queries, keys and values.
    before: [usize; 3],
}

const fn case(
    shape: (usize, usize, usize),
    rotated: (usize, usize),
    value_width: usize,
    tokens: usize,
) -> Case {
    Case { shape, rotary_dim: rotated.0, start: rotated.1, value_width, tokens, before: [0; 3] }
}

/// Whole and partial, from the beginning and from the middle, odd sizes, and more than a block does at once.
const CASES: [Case; 16] = [
    case((2, 1, 2), (2, 0), 2, 3),
    case((6, 2, 7), (6, 0), 14, 5),
    case((4, 2, 64), (64, 0), 128, 5),
    case((4, 4, 16), (16, 0), 64, 1),
    case((4, 1, 64), (16, 0), 48, 3),
    case((2, 1, 112), (112, 0), 112, 2),
    case((3, 3, 17), (0, 0), 33, 4),
    case((4, 1, 576), (64, 512), 0, 3),
    case((2, 1, 20), (6, 13), 20, 3),
    case((2, 2, 96), (32, 8), 190, 3),
    case((32, 8, 128), (128, 0), 1024, 2),
    case((2, 1, 24), (8, 0), 24, 0),
    case((2, 1, 48), (32, 5), 48, 2),
    Case { before: [1, 0, 0], ..case((4, 2, 64), (64, 0), 128, 3) },
    Case { before: [0, 1, 0], ..case((4, 2, 64), (64, 0), 128, 3) },
    Case { before: [0, 0, 1], ..case((4, 2, 64), (64, 0), 128, 3) },
];

const ROWS: usize = 9;

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for cache in [element, Element::E4M3, Element::E5M2] {
            for layout in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
                for case in CASES {
                    one(c, element, cache, layout, case)?;
                }
            }
        }
        same_slot(c, element)?;
    }
    Ok(())
}

fn one(
    c: &mut Checker,
    element: Element,
    cache: Element,
    layout: RopeLayout,
    case: Case,
) -> Result<(), OpError> {
    let gpu = c.gpu();
    let (tokens, cache_slots) = (case.tokens, case.tokens + 4);
    let shape = HeadShape { heads: case.shape.0, kv_heads: case.shape.1, head_dim: case.shape.2 };
    let table = Table::new(c, case.rotary_dim, tokens)?;
    // The last but one has no place in the cache.
    let mut slots = c.random().permutation(cache_slots)[..tokens].to_vec();
    if tokens > 2 {
        slots[tokens - 2] = if layout == RopeLayout::HalfSplit { cache_slots as u32 } else { u32::MAX };
    }
    let slots_there = gpu.upload(&slots)?;
    // So large that some values are limited in eight bits.
    let range = match cache {
        Element::E4M3 => 600.0,
        Element::E5M2 => 64_000.0,
        _ => 1.0,
    };
    let values: Vec<f32> = c.random().numbers(tokens * case.value_width).iter().map(|x| x * range).collect();
    let value = c.placed(element, case.before[2], &values, 1)?;
    let widths = [shape.query_width(), shape.kv_width(), case.value_width];
    let [in_query, in_key, in_value] =
        [0, 1, 2].map(|which| case.before[which]..case.before[which] + tokens * widths[which]);
    let mut side = |which: usize| {
        let values = c.random().numbers(tokens * widths[which]);
        c.placed(element, case.before[which], &values, 1)
    };
    let (mut query, mut key) = (side(0)?, side(1)?);
    let mut keys = c.unwritten(cache, cache_slots * shape.kv_width())?;
    let mut cached = c.unwritten(cache, cache_slots * case.value_width)?;
    let args = RopeCacheWrite {
        table: Some(table.there(layout, &case)),
        shape,
        slots: slots_there.all(),
        query: query.buffer.slice_mut(in_query.clone()),
        key: key.buffer.slice_mut(in_key.clone()),
        value: (case.value_width > 0).then(|| value.buffer.slice(in_value)),
        value_width: case.value_width,
        keys: keys.all_mut(),
        values: cached.all_mut(),
    };
    cuda::rope_cache_write(&gpu, args)?;

    let name = format!("rope {layout:?}, {element:?}, cache of {cache:?}, {case:?}");
    for (what, x, place) in [("query", &query, in_query), ("key", &key, in_key)] {
        let expected = table.rotate(&x.host, shape.head_dim, layout, &case);
        let (case, bound) = (format!("{name}: {what}"), computed(element, 6.0));
        c.close_within(case, &x.buffer, place, &expected, bound)?;
    }
    let rotated = table.rotate(&key.host, shape.head_dim, layout, &case);
    stored_keys(c, format!("{name}: keys"), &keys, &rotated, &slots)?;
    stored_values(c, format!("{name}: values"), &cached, &value, case.value_width, &slots)
}

/// Cosines and sines, and which of them tokens have.
struct Table {
    cos: Floats,
    sin: Floats,
    angles: Vec<u32>,
    angles_there: Buffer,
}

impl Table {
    /// The first token of several has an angle that is not in the table.
    fn new(c: &mut Checker, rotary_dim: usize, tokens: usize) -> Result<Self, OpError> {
        let radians: Vec<f32> =
            c.random().numbers(ROWS * rotary_dim / 2).iter().map(|angle| angle * 3.0).collect();
        let of = |function: fn(f32) -> f32| -> Vec<f32> { radians.iter().copied().map(function).collect() };
        let (cos, sin) = (c.given(Element::F32, &of(f32::cos))?, c.given(Element::F32, &of(f32::sin))?);
        let mut angles: Vec<u32> = (0..tokens).map(|_| c.random().below(ROWS) as u32).collect();
        if tokens > 1 {
            angles[0] = ROWS as u32;
            angles[1] = ROWS as u32 - 1;
        }
        let angles_there = c.gpu().upload(&angles)?;
        Ok(Self { cos, sin, angles, angles_there })
    }

    fn there(&self, layout: RopeLayout, case: &Case) -> cuda::RopeTable<'_> {
        cuda::RopeTable {
            cos: self.cos.buffer.all(),
            sin: self.sin.buffer.all(),
            angles: self.angles_there.all(),
            rotary_dim: case.rotary_dim,
            start: case.start,
            layout,
        }
    }

    fn rotate(&self, x: &[f32], head_dim: usize, layout: RopeLayout, case: &Case) -> Vec<f64> {
        let (rotary_dim, start) = (case.rotary_dim, case.start);
        let table = crate::RopeTable { cos: &self.cos.host, sin: &self.sin.host, rotary_dim, start, layout };
        let width = x.len() / self.angles.len().max(1);
        let tokens = x.chunks_exact(width.max(1)).zip(&self.angles);
        tokens
            .flat_map(|(x, &angle)| match (angle as usize) < ROWS {
                true => reference::rope(x, head_dim, &[angle], &table),
                false => x.iter().copied().map(f64::from).collect(),
            })
            .collect()
    }
}

/// Slots that are named hold their token's key; the others are as they were.
fn stored_keys(
    c: &mut Checker,
    case: String,
    keys: &Buffer,
    rotated: &[f64],
    slots: &[u32],
) -> Result<(), OpError> {
    let found = c.read(keys)?;
    let width = rotated.len() / slots.len().max(1);
    let mut unwritten = vec![true; found.len()];
    let (mut of_tokens, mut expected) = (Vec::new(), Vec::new());
    for (&slot, row) in slots.iter().zip(rotated.chunks_exact(width.max(1))) {
        let place = slot as usize * width..(slot as usize + 1) * width;
        if let Some(stored) = found.get(place.clone()) {
            unwritten[place].fill(false);
            of_tokens.extend_from_slice(stored);
            expected.extend_from_slice(row);
        }
    }
    let kept = found.iter().zip(unwritten).all(|(found, unwritten)| found.is_nan() == unwritten);
    c.equal(format!("{case}, other slots"), &[kept], &[true]);
    // Whatever the cache rounds to, the numbers are its own.
    let of_tokens = c.given(keys.element(), &of_tokens)?;
    c.close(case, &of_tokens.buffer, &expected, computed(keys.element(), 6.0))
}

fn stored_values(
    c: &mut Checker,
    case: String,
    cached: &Buffer,
    value: &Floats,
    width: usize,
    slots: &[u32],
) -> Result<(), OpError> {
    let found = c.read(cached)?;
    let mut expected = vec![f32::NAN; found.len()];
    for (&slot, row) in slots.iter().zip(value.host.chunks_exact(width.max(1))) {
        if let Some(to) = expected.get_mut(slot as usize * width..(slot as usize + 1) * width) {
            to.copy_from_slice(row);
        }
    }
    let expected = expected.into_iter().map(|value| match cached.element() {
        Element::E4M3 => E4M3::from_f32(value).to_f32(),
        Element::E5M2 => E5M2::from_f32(value).to_f32(),
        _ => value,
    });
    // NaN has many patterns.
    let plain = |value: f32| if value.is_nan() { f32::NAN } else { value };
    let (found, expected): (Vec<f32>, Vec<f32>) =
        found.into_iter().zip(expected).map(|(found, expected)| (plain(found), plain(expected))).unzip();
    c.equal(case, &bits(&found), &bits(&expected));
    Ok(())
}

/// Where tokens name the same slot, each element is that of one of them. Without a table.
fn same_slot(c: &mut Checker, element: Element) -> Result<(), OpError> {
    let (gpu, width) = (c.gpu(), 40);
    let shape = HeadShape { heads: 1, kv_heads: 1, head_dim: width };
    let (mut query, mut key) = (c.floats(element, 2 * width)?, c.floats(element, 2 * width)?);
    let value = c.floats(element, 2 * width)?;
    let (mut keys, mut values) = (c.unwritten(element, width)?, c.unwritten(element, width)?);
    let slots = gpu.upload(&[0u32, 0])?;
    let args = RopeCacheWrite {
        table: None,
        shape,
        slots: slots.all(),
        query: query.buffer.all_mut(),
        key: key.buffer.all_mut(),
        value: Some(value.buffer.all()),
        value_width: width,
        keys: keys.all_mut(),
        values: values.all_mut(),
    };
    cuda::rope_cache_write(&gpu, args)?;
    let mut right = true;
    for (cached, given) in [(&keys, &key.host), (&values, &value.host)] {
        let found = c.read(cached)?;
        right &= (0..width).all(|i| found[i] == given[i] || found[i] == given[width + i]);
    }
    c.equal(format!("rope, {element:?}, two tokens in one slot"), &[right], &[true]);
    for (what, x) in [("query", &query), ("key", &key)] {
        let found = c.read(&x.buffer)?;
        c.equal(format!("rope, {element:?}, no table: {what}"), &bits(&found), &bits(&x.host));
    }
    Ok(())
}
