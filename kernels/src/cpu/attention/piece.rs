use std::ops::Range;

use super::softmax::{Seen, add_slope, soft_cap, weigh};
use super::values::add_values;
use super::{GROUP, HEADS, Inputs, KEYS, NEAR_BYTES, Scores, TOKENS};
use crate::cpu::dot::dots;
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::tile::Tile;
use crate::{HeadShape, Sequence, Values};

/// Some tokens of a sequence, and some query heads of one key/value head.
pub(super) struct Piece<'a> {
    pub(super) inputs: Inputs<'a>,
    pub(super) sequence: &'a Sequence<'a>,
    /// Rows of the batch, at most [`TOKENS`].
    pub(super) tokens: Range<usize>,
    /// At most [`HEADS`].
    pub(super) heads: Range<usize>,
    /// `[tokens, heads, value_dim]`
    pub(super) out: Tile<'a>,
}

/// The vectors of a group; empty where there are fewer.
type Vectors<'a> = [&'a [f32]; GROUP];

/// Consecutive positions, scored and weighted together.
struct Group<'a> {
    /// The first position.
    first: usize,
    keys: Vectors<'a>,
    values: Vectors<'a>,
}

impl Kernel for Piece<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let Inputs { value_dim, keys, values, rules, .. } = self.inputs;
        let mut seen = [self.nothing_seen(); TOKENS];
        for token in 0..self.tokens.len() {
            self.out.row_mut(token).fill(0.0);
        }
        let context = self.position(self.tokens.end);
        let first_visible = rules.first_visible(self.position(self.tokens.start));
        let (mut packed_keys, mut packed_values) = (Vec::new(), Vec::new());
        for first in (first_visible / GROUP * GROUP..context).step_by(GROUP) {
            let slots = &self.sequence.slots[first..context.min(first + GROUP)];
            let keys = self.vectors(keys, self.inputs.shape.head_dim, slots, &mut packed_keys);
            let values = match values {
                Values::Own(values) => self.vectors(values, value_dim, slots, &mut packed_values),
                Values::InKeys => keys.map(|key| key.get(..value_dim).unwrap_or_default()),
            };
            let group = Group { first, keys, values };
            for (token, seen) in self.tokens.clone().zip(&mut seen) {
                let position = self.position(token);
                let start = rules.first_visible(position).saturating_sub(first);
                let end = (position + 1).saturating_sub(first).min(GROUP);
                if start < end {
                    self.attend(simd, token, &group, start..end, seen);
                }
            }
        }
        for (token, seen) in seen.iter().enumerate().take(self.tokens.len()) {
            for (out, seen) in self.out.row_mut(token).chunks_exact_mut(value_dim).zip(seen) {
                out.iter_mut().for_each(|out| *out /= seen.sum);
            }
        }
    }
}

impl Piece<'_> {
    /// Position of a row of the batch in its sequence.
    fn position(&self, token: usize) -> usize {
        self.sequence.start + (token - self.sequence.rows.start)
    }

    /// What the softmax of each head has seen before the first key.
    fn nothing_seen(&self) -> [Seen; HEADS] {
        let mut seen = [Seen::NOTHING; HEADS];
        if let Some(sinks) = self.inputs.rules.sinks {
            for (seen, &sink) in seen.iter_mut().zip(&sinks[self.heads.clone()]) {
                *seen = Seen::sink(sink);
            }
        }
        seen
    }

    /// This key/value head's vectors in some slots; `cache`: `[slots, kv_heads, width]`.
    ///
    /// In the cache they are a power of two apart, so a few sets of the nearest cache have to hold them all. Where
    /// several tokens read them, they are copied next to each other first.
    #[inline(always)]
    fn vectors<'v>(
        &self,
        cache: &'v [f32],
        width: usize,
        slots: &[u32],
        packed: &'v mut Vec<f32>,
    ) -> Vectors<'v> {
        let HeadShape { heads, kv_heads, .. } = self.inputs.shape;
        let kv_head = self.heads.start / (heads / kv_heads);
        let cached =
            slots.iter().map(|&slot| &cache[(slot as usize * kv_heads + kv_head) * width..][..width]);

        let mut vectors: Vectors<'v> = [&[]; GROUP];
        if self.tokens.len() > 1 {
            packed.clear();
            cached.for_each(|vector| packed.extend_from_slice(vector));
            vectors.iter_mut().zip(packed.chunks_exact(width)).for_each(|(vector, packed)| *vector = packed);
        } else {
            vectors.iter_mut().zip(cached).for_each(|(vector, cached)| *vector = cached);
        }
        vectors
    }

    /// Takes what a token sees of a group into its result; `visible` counts from the group's first position.
    #[inline(always)]
    fn attend<S: Simd>(
        &mut self,
        simd: S,
        token: usize,
        group: &Group<'_>,
        visible: Range<usize>,
        seen: &mut [Seen; HEADS],
    ) {
        match self.heads.len() {
            1 => self.attend_heads::<S, 1>(simd, token, group, visible, seen),
            2 | 4 => self.attend_heads::<S, 2>(simd, token, group, visible, seen),
            _ => self.attend_heads::<S, 3>(simd, token, group, visible, seen),
        }
    }

    /// [`Self::attend`], with `C` heads in a tile of scores.
    #[inline(always)]
    fn attend_heads<S: Simd, const C: usize>(
        &mut self,
        simd: S,
        token: usize,
        group: &Group<'_>,
        visible: Range<usize>,
        seen: &mut [Seen; HEADS],
    ) {
        let mut scores: Scores = [[f32::NEG_INFINITY; GROUP]; HEADS];
        self.score::<S, C>(simd, token, visible.clone(), &group.keys, &mut scores);
        self.bend(simd, token, group.first, visible.clone(), &mut scores);
        let mut fades = [0.0; HEADS];
        for ((fade, scores), seen) in fades.iter_mut().zip(&mut scores).zip(seen).take(self.heads.len()) {
            *fade = weigh(simd, scores, seen);
        }
        let out = self.out.row_mut(token - self.tokens.start);
        let values = &group.values[visible.clone()];
        if C == 1 {
            add_values::<S, 1>(simd, &fades, &scores, visible, values, out);
        } else {
            // For three heads at a time, AVX2 lacks a register: 16 heads over one latent vector took a third longer.
            add_values::<S, 2>(simd, &fades, &scores, visible, values, out);
        }
    }

    /// Scores of a token's heads, `C` at a time, with the visible keys, `KEYS` at a time. A tile that reaches beyond the
    /// last key or head repeats it instead, and leaves the results.
    #[inline(always)]
    fn score<S: Simd, const C: usize>(
        &self,
        simd: S,
        token: usize,
        visible: Range<usize>,
        keys: &Vectors<'_>,
        scores: &mut Scores,
    ) {
        let Inputs { shape: HeadShape { heads, head_dim, .. }, scale, query, .. } = self.inputs;
        let queries = &query[(token * heads + self.heads.start) * head_dim..][..self.heads.len() * head_dim];
        // Where all keys of a group fit into the nearest cache, they are fetched while the first heads need them: that way
        // more of them are on their way from memory at a time. Where they do not, a few are scored for all heads.
        let block = if GROUP * head_dim * size_of::<f32>() <= NEAR_BYTES { GROUP } else { KEYS };
        for first in visible.clone().step_by(block) {
            let visible = first..visible.end.min(first + block);
            for head in (0..self.heads.len()).step_by(C) {
                let queries: [&[f32]; C] = std::array::from_fn(|c| {
                    &queries[(head + c).min(self.heads.len() - 1) * head_dim..][..head_dim]
                });
                for key in visible.clone().step_by(KEYS) {
                    let tile: [&[f32]; KEYS] = std::array::from_fn(|k| keys[(key + k).min(visible.end - 1)]);
                    for (key, products) in (key..visible.end).zip(dots(simd, tile, queries)) {
                        for (scores, product) in scores[head..self.heads.len()].iter_mut().zip(products) {
                            scores[key] = product * scale;
                        }
                    }
                }
            }
        }
    }

    /// Applies the rules that change scores.
    #[inline(always)]
    fn bend<S: Simd>(&self, simd: S, token: usize, first: usize, visible: Range<usize>, scores: &mut Scores) {
        if let Some(cap) = self.inputs.rules.soft_cap {
            for scores in &mut scores[..self.heads.len()] {
                soft_cap(simd, cap, visible.clone(), scores);
            }
        }
        if let Some(slopes) = self.inputs.rules.slopes {
            for (scores, &slope) in scores.iter_mut().zip(&slopes[self.heads.clone()]) {
                add_slope(slope, first, self.position(token), scores);
            }
        }
    }
}
