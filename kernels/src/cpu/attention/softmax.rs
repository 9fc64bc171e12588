use std::ops::Range;

use super::GROUP;
use crate::cpu::simd::{Row, Simd, exp, tanh};

/// What the softmax of one token and head has seen.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    /// Largest score.
    pub(super) max: f32,
    /// Sum of `exp(score - max)`.
    pub(super) sum: f32,
}

impl Seen {
    pub(super) const NOTHING: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// One score whose value is zero: nothing is added to the result.
    pub(super) fn sink(score: f32) -> Self {
        Self { max: score, sum: 1.0 }
    }
}

/// `cap * tanh(score / cap)` for each score of a group; what is not visible stays so.
#[inline(always)]
pub(super) fn soft_cap<S: Simd>(simd: S, cap: f32, visible: Range<usize>, scores: &mut [f32; GROUP]) {
    for scores in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk fills a register.
        let register = unsafe { (&*scores).load(simd, 0) };
        let capped = tanh(simd, simd.div(register, simd.splat(cap)));
        simd.write(simd.mul(simd.splat(cap), capped), scores);
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
}

/// Adds `slope * (key position - query position)`, where `first` is the position of the group's first key.
#[inline(always)]
pub(super) fn add_slope(slope: f32, first: usize, position: usize, scores: &mut [f32; GROUP]) {
    for (key, score) in (first..).zip(scores) {
        // Distances are exact up to 2^24 positions. What is not visible is an infinity, and stays one.
        *score += slope * (key as isize - position as isize) as f32;
    }
}

/// Turns scores into `exp(score - max)`. Answers the factor by which what was seen before fades, now that the largest
/// score is known better.
#[inline(always)]
pub(super) fn weigh<S: Simd>(simd: S, scores: &mut [f32; GROUP], seen: &mut Seen) -> f32 {
    let mut maxima = simd.splat(seen.max);
    for scores in scores.chunks_exact(S::LANES) {
        // SAFETY: a chunk fills a register. In this order a score that is not a number leaves the maximum.
        maxima = simd.max(unsafe { scores.load(simd, 0) }, maxima);
    }
    let max = simd.lanes(maxima)[..S::LANES].iter().copied().fold(seen.max, f32::max);

    let mut sum = simd.zero();
    for scores in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk fills a register.
        let register = unsafe { (&*scores).load(simd, 0) };
        let weights = exp(simd, simd.sub(register, simd.splat(max)));
        sum = simd.add(sum, weights);
        simd.write(weights, scores);
    }
    let fade = simd.lanes(exp(simd, simd.splat(seen.max - max)))[0];
    *seen = Seen { max, sum: seen.sum * fade + simd.sum(sum) };
    fade
}
