use super::Cpu;
use super::dot::sum;
use super::simd::{Kernel, Row, Simd, exp};
use crate::{GroupScore, Groups, Normalize, OpError, Routes, Routing, Score};

/// Chooses experts for every token; `logits`: `[T, experts]`. What was in `routes` is replaced, its memory is kept.
///
/// Of equally good experts, or groups, the first is taken. Errors when there are not as many experts as are to be chosen,
/// or groups do not divide them.
pub fn route(cpu: &Cpu, logits: &[f32], routing: &Routing<'_>, routes: &mut Routes) -> Result<(), OpError> {
    /// Per logit, in multiply-adds: an exponential, a division, and a place among the best.
    const WORK: usize = 32;
    let tokens = routing.check("route", logits.len())?;
    let work = logits.len() * WORK;
    let piece = tokens.div_ceil(cpu.pieces(work)).max(1);

    let Routes { experts, weights } = routes;
    // Every element is overwritten.
    experts.resize(tokens * routing.chosen, 0);
    weights.resize(tokens * routing.chosen, 0.0);
    let pieces: Vec<_> = logits
        .chunks(piece * routing.experts)
        .zip(experts.chunks_mut(piece * routing.chosen))
        .zip(weights.chunks_mut(piece * routing.chosen))
        .map(|((logits, experts), weights)| Tokens { routing, logits, experts, weights })
        .collect();
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
    Ok(())
}

/// Some tokens of a call.
struct Tokens<'a> {
    routing: &'a Routing<'a>,
    logits: &'a [f32],
    experts: &'a mut [u32],
    weights: &'a mut [f32],
}

impl Kernel for Tokens<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { routing, logits, experts, weights } = self;
        let mut scores = vec![0.0; routing.experts];
        let mut choice = Choice::default();
        for ((logits, experts), weights) in logits
            .chunks_exact(routing.experts)
            .zip(experts.chunks_exact_mut(routing.chosen))
            .zip(weights.chunks_exact_mut(routing.chosen))
        {
            scores.copy_from_slice(logits);
            match routing.score {
                Score::Softmax => softmax(simd, &mut scores),
                Score::Sigmoid => sigmoid(simd, &mut scores),
                Score::SoftmaxOfChosen | Score::SparseMixer { .. } => {}
            }
            choice.choose(routing, logits, &scores, experts);
            for (weight, &expert) in weights.iter_mut().zip(&*experts) {
                *weight = scores[expert as usize];
            }
            match routing.score {
                Score::Softmax | Score::Sigmoid => {}
                Score::SoftmaxOfChosen => softmax(simd, weights),
                Score::SparseMixer { jitter } => mix(logits, experts, jitter, weights),
            }
            normalize(routing, weights);
        }
    }
}

/// In place. The largest is taken off first, so that no exponential overflows.
#[inline(always)]
fn softmax<S: Simd>(simd: S, x: &mut [f32]) {
    let largest = simd.splat(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    for at in (0..x.len()).step_by(S::LANES) {
        let below = simd.sub((&*x).register(simd, at), largest);
        simd.write(exp(simd, below), &mut x[at..]);
    }
    let sum = sum(simd, &*x);
    for x in x {
        *x /= sum;
    }
}

/// In place.
#[inline(always)]
fn sigmoid<S: Simd>(simd: S, x: &mut [f32]) {
    let one = simd.splat(1.0);
    for at in (0..x.len()).step_by(S::LANES) {
        let decay = exp(simd, simd.sub(simd.zero(), (&*x).register(simd, at)));
        simd.write(simd.div(one, simd.add(one, decay)), &mut x[at..]);
    }
}

/// Memory of the choice of one token, kept for the next.
#[derive(Default)]
struct Choice {
    /// What decides, of all experts.
    merits: Vec<f32>,
    /// The best groups.
    groups: Ranking,
    /// The best experts, and before that the best of a group.
    ranking: Ranking,
}

impl Choice {
    fn choose(&mut self, routing: &Routing<'_>, logits: &[f32], scores: &[f32], chosen: &mut [u32]) {
        let summed = routing.groups.is_some_and(|groups| groups.score == GroupScore::TwoBest);
        self.merits.clear();
        match routing.correction {
            Some(correction) => {
                self.merits
                    .extend(scores.iter().zip(correction).map(|(score, correction)| score + correction));
            }
            None if summed => self.merits.extend_from_slice(scores),
            // Scores are in the order of the logits, which are told apart where scores round to the same.
            None => self.merits.extend_from_slice(logits),
        }
        match routing.groups {
            None => {
                self.ranking.start(routing.chosen);
                self.ranking.add_all(0, &self.merits);
            }
            Some(groups) => self.rank_in_groups(routing.chosen, groups),
        }
        for (chosen, (expert, _)) in chosen.iter_mut().zip(&self.ranking.best) {
            *chosen = *expert;
        }
    }

    /// Ranks the experts of the best groups.
    fn rank_in_groups(&mut self, chosen: usize, groups: Groups) {
        let size = self.merits.len() / groups.count;
        let counted = match groups.score {
            GroupScore::Best => 1,
            GroupScore::TwoBest => 2,
        };
        self.groups.start(groups.chosen);
        for (group, members) in (0..).zip(self.merits.chunks_exact(size)) {
            self.ranking.start(counted);
            self.ranking.add_all(0, members);
            self.groups.add(group, self.ranking.best.iter().map(|(_, score)| score).sum());
        }
        // Back in their order, because of equals the first expert is taken.
        self.groups.best.sort_unstable_by_key(|(group, _)| *group);
        self.ranking.start(chosen);
        for (group, _) in &self.groups.best {
            let first = *group as usize * size;
            self.ranking.add_all(*group * size as u32, &self.merits[first..][..size]);
        }
    }
}

/// The best of some candidates, best first; of equals, the first.
#[derive(Default)]
struct Ranking {
    places: usize,
    best: Vec<(u32, f32)>,
}

impl Ranking {
    fn start(&mut self, places: usize) {
        self.places = places;
        self.best.clear();
    }

    /// More candidates, numbered from `first`.
    fn add_all(&mut self, first: u32, scores: &[f32]) {
        for (candidate, &score) in (first..).zip(scores) {
            self.add(candidate, score);
        }
    }

    /// One more candidate.
    fn add(&mut self, candidate: u32, score: f32) {
        if self.best.len() == self.places {
            match self.best.last() {
                Some((_, last)) if score > *last => self.best.pop(),
                _ => return,
            };
        }
        let place = self.best.iter().position(|(_, other)| score > *other).unwrap_or(self.best.len());
        self.best.insert(place, (candidate, score));
    }
}

/// The weights of a sparse mixer: each chosen expert's in a softmax over the experts that are as good, but for some
/// noise, and not chosen before it.
fn mix(logits: &[f32], chosen: &[u32], jitter: f32, weights: &mut [f32]) {
    for (place, (&expert, weight)) in chosen.iter().zip(weights).enumerate() {
        let own = logits[expert as usize];
        let mut sum = 0.0;
        for (other, &logit) in (0..).zip(logits) {
            let far = (own - logit) / logit.abs().max(own) > 2.0 * jitter;
            if !far && !chosen[..place].contains(&other) {
                sum += (logit - own).exp();
            }
        }
        *weight = 1.0 / sum;
    }
}

fn normalize(routing: &Routing<'_>, weights: &mut [f32]) {
    let divisor = match routing.normalize {
        Normalize::No => 1.0,
        Normalize::Sum { eps } => weights.iter().sum::<f32>() + eps,
        Normalize::Norm { p } => {
            weights.iter().map(|weight| weight.abs().powf(p)).sum::<f32>().powf(p.recip())
        }
    };
    for weight in weights {
        *weight = *weight / divisor * routing.scale;
    }
}
