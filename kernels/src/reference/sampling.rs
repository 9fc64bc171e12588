use super::philox::{keyed_hash, uniform};
use crate::Sampling;

/// What a request has seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Past<'a> {
    /// The tokens it began with.
    pub prompt: &'a [u32],
    /// Those that were chosen since.
    pub generated: &'a [u32],
}

/// The logits `[vocabulary]` after every stage of `sampling`: minus infinity for what is not possible any more. None when
/// they are not numbers, or nothing is possible.
///
/// Sources: Keskar et al. 2019 (repetition penalty); Holtzman et al. 2020 (top-p); Meister et al. 2023 (typical-p);
/// Nguyen et al. 2024 (min-p).
pub fn process(logits: &[f32], sampling: &Sampling<'_>, past: Past<'_>) -> Option<Vec<f64>> {
    let mut row: Vec<f64> = logits.iter().copied().map(f64::from).collect();
    watermark(&mut row, sampling);
    bias(&mut row, sampling);
    penalize(&mut row, sampling, past);
    if row.iter().any(|logit| logit.is_nan() || *logit == f64::INFINITY) {
        return None;
    }
    mask(&mut row, sampling);
    if largest(&row) == f64::NEG_INFINITY {
        return None;
    }
    if sampling.temperature != 1.0 {
        let best = largest(&row);
        row.iter_mut().for_each(|logit| *logit = (*logit - best) / f64::from(sampling.temperature));
    }
    if sampling.top_k != 0 {
        top_k(&mut row, sampling.top_k as usize);
    }
    if sampling.top_p < 1.0 {
        top_p(&mut row, f64::from(sampling.top_p));
    }
    if sampling.typical_p < 1.0 {
        typical_p(&mut row, f64::from(sampling.typical_p));
    }
    if sampling.min_p > 0.0 {
        let threshold = largest(&row) + f64::from(sampling.min_p).ln();
        keep(&mut row, |_, logit| logit >= threshold);
    }
    Some(row)
}

/// Natural logarithms of the probabilities of a row.
pub fn logprobs(row: &[f64]) -> Vec<f64> {
    let best = largest(row);
    let total: f64 = row.iter().map(|logit| (logit - best).exp()).sum();
    row.iter().map(|logit| logit - best - total.ln()).collect()
}

/// The speeds of a race that each token wins with exactly its probability: that over an exponential variate of its own.
pub fn race(row: &[f64], seed: u64, index: u64) -> Vec<f64> {
    let speed = |(logprob, id): (f64, u32)| logprob.exp() / -uniform(seed, index, id).ln();
    logprobs(row).into_iter().zip(0..).map(speed).collect()
}

/// The token that is chosen from a processed row.
pub fn choose(row: &[f64], sampling: &Sampling<'_>) -> u32 {
    if sampling.draws {
        first_of_largest(&race(row, sampling.seed, sampling.index))
    } else {
        first_of_largest(row)
    }
}

/// The `count` likeliest tokens of a processed row and ties with the last of them, best first, the lower id first among
/// equals. What is not possible is not listed.
pub fn alternatives(row: &[f64], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = best_first(row, |logit| -logit);
    ids.retain(|&id| row[id as usize] > f64::NEG_INFINITY);
    if let Some(&last) = ids.get(count.wrapping_sub(1)) {
        ids.retain(|&id| row[id as usize] >= row[last as usize]);
    }
    if count == 0 { Vec::new() } else { ids }
}

fn watermark(row: &mut [f64], sampling: &Sampling<'_>) {
    let Some(watermark) = sampling.watermark else { return };
    for (id, logit) in (0..).zip(row) {
        if keyed_hash(watermark.key(), id) < watermark.bound() {
            *logit += f64::from(watermark.delta);
        }
    }
}

fn bias(row: &mut [f64], sampling: &Sampling<'_>) {
    for (id, bias) in sampling.bias {
        if let Some(logit) = row.get_mut(*id as usize).filter(|logit| is_possible(**logit)) {
            *logit = finite(*logit + f64::from(*bias));
        }
    }
}

fn penalize(row: &mut [f64], sampling: &Sampling<'_>, past: Past<'_>) {
    let penalties = &sampling.penalties;
    if penalties.are_neutral() {
        return;
    }
    let occurrences = |ids: &[u32], id: u32| ids.iter().filter(|seen| **seen == id).count() as f64;
    let length = (past.prompt.len() + past.generated.len()) as f64;
    for (id, logit) in (0..).zip(row) {
        let generated = occurrences(past.generated, id);
        let seen = occurrences(past.prompt, id) + generated;
        if seen == 0.0 || !is_possible(*logit) {
            continue;
        }
        let repetition = f64::from(penalties.repetition);
        if repetition != 1.0 {
            *logit = finite(if *logit < 0.0 { *logit * repetition } else { *logit / repetition });
        }
        *logit = finite(*logit - f64::from(penalties.frequency) * (seen / length));
        if generated > 0.0 {
            let count = finite(f64::from(penalties.count) * generated);
            *logit = finite(*logit - finite(f64::from(penalties.presence) + count));
        }
    }
}

fn mask(row: &mut [f64], sampling: &Sampling<'_>) {
    if let Some(mask) = sampling.mask {
        keep(row, |id, _| mask[id / 32] >> (id % 32) & 1 == 1);
    }
}

fn top_k(row: &mut [f64], k: usize) {
    let order = best_first(row, |logit| -logit);
    if let Some(&last) = order.get(k - 1) {
        let threshold = row[last as usize];
        keep(row, |_, logit| logit >= threshold);
    }
}

fn top_p(row: &mut [f64], mass: f64) {
    let order = best_first(row, |logit| -logit);
    let mut stays = vec![false; row.len()];
    for &id in shortest_head(&order, &logprobs(row), mass) {
        stays[id as usize] = true;
    }
    keep(row, |id, _| stays[id]);
}

fn typical_p(row: &mut [f64], mass: f64) {
    let logprobs = logprobs(row);
    let possible = logprobs.iter().filter(|logprob| **logprob > f64::NEG_INFINITY);
    let entropy: f64 = possible.map(|logprob| -logprob * logprob.exp()).sum();
    let distance = |logprob: f64| (-logprob - entropy).abs();
    let order = best_first(&logprobs, distance);
    let head = shortest_head(&order, &logprobs, mass);
    let last = head.last().map_or(0.0, |&id| distance(logprobs[id as usize]));
    keep(row, |id, _| distance(logprobs[id]) <= last);
}

/// The ids by what is measured of their values, smallest first, the lower id first among equals.
fn best_first(values: &[f64], measure: impl Fn(f64) -> f64) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    let measured = |id: u32| measure(values[id as usize]) + 0.0;
    ids.sort_by(|&a, &b| measured(a).total_cmp(&measured(b)).then(a.cmp(&b)));
    ids
}

/// The first ids whose probabilities add up to `mass`, at least one.
fn shortest_head<'a>(order: &'a [u32], logprobs: &[f64], mass: f64) -> &'a [u32] {
    let mut reached = 0.0;
    for (place, &id) in order.iter().enumerate() {
        reached += logprobs[id as usize].exp();
        if reached >= mass {
            return &order[..=place];
        }
    }
    order
}

fn keep(row: &mut [f64], stays: impl Fn(usize, f64) -> bool) {
    for (id, logit) in row.iter_mut().enumerate() {
        if !stays(id, *logit) {
            *logit = f64::NEG_INFINITY;
        }
    }
}

fn largest(row: &[f64]) -> f64 {
    row.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

fn first_of_largest(row: &[f64]) -> u32 {
    let largest = largest(row);
    row.iter().position(|value| *value == largest).unwrap_or_default() as u32
}

/// What the model itself ruled out stays ruled out.
fn is_possible(logit: f64) -> bool {
    logit != f64::NEG_INFINITY
}

/// Extreme strengths overflow; the largest numbers that there are keep the distribution defined.
fn finite(logit: f64) -> f64 {
    logit.clamp(f64::from(f32::MIN), f64::from(f32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Penalties;

    fn kept(probabilities: &[f32], sampling: Sampling<'_>) -> Vec<u32> {
        let logits: Vec<f32> = probabilities.iter().map(|probability| probability.ln()).collect();
        let row = process(&logits, &sampling, Past::default()).expect("numbers");
        (0..).zip(row).filter(|(_, logit)| *logit > f64::NEG_INFINITY).map(|(id, _)| id).collect()
    }

    #[test]
    fn each_filter_keeps_what_the_shards_sampler_keeps() {
        let row = [0.1, 0.5, 0.15, 0.25];
        for (top_p, expected) in [(0.0, &[1][..]), (0.49, &[1]), (0.51, &[1, 3]), (0.76, &[1, 2, 3])] {
            assert_eq!(kept(&row, Sampling { top_p, ..Sampling::GREEDY }), expected, "top_p {top_p}");
        }
        assert_eq!(kept(&row, Sampling { min_p: 0.29, ..Sampling::GREEDY }), [1, 2, 3]);
        for (top_k, expected) in [(1, &[1][..]), (2, &[1, 2, 3]), (3, &[1, 2, 3]), (9, &[0, 1, 2, 3, 4])] {
            let row = [0.1, 0.5, 0.15, 0.15, 0.1];
            assert_eq!(kept(&row, Sampling { top_k, ..Sampling::GREEDY }), expected, "top_k {top_k}");
        }
        // Entropy 1.07: the distances are 0.56, 0.68 (twice) and 1.93.
        let row = [0.6, 0.175, 0.175, 0.05];
        for (typical_p, expected) in [(0.59, &[0][..]), (0.7, &[0, 1, 2]), (0.96, &[0, 1, 2, 3])] {
            assert_eq!(
                kept(&row, Sampling { typical_p, ..Sampling::GREEDY }),
                expected,
                "typical_p {typical_p}"
            );
        }
    }

    #[test]
    fn penalties_look_at_prompt_and_generated_tokens() {
        let past = Past { prompt: &[0, 1, 1, 99], generated: &[1, 2] };
        let penalized = |penalties| {
            process(&[1.0, -1.0, 2.0, 3.0], &Sampling { penalties, ..Sampling::GREEDY }, past)
                .expect("numbers")
        };
        let neutral = Penalties::NEUTRAL;
        assert_eq!(penalized(Penalties { repetition: 2.0, ..neutral }), [0.5, -2.0, 1.0, 3.0]);
        assert_eq!(penalized(Penalties { presence: 0.5, ..neutral }), [1.0, -1.5, 1.5, 3.0]);
        assert_eq!(penalized(Penalties { count: 0.5, ..neutral }), [1.0, -1.5, 1.5, 3.0]);
        let expected = [1.0 - 1.0 / 6.0, -1.0 - 3.0 / 6.0, 2.0 - 1.0 / 6.0, 3.0];
        assert_eq!(penalized(Penalties { frequency: 1.0, ..neutral }), expected);
    }

    #[test]
    fn what_is_not_allowed_is_not_possible_and_nothing_else_is_no_answer() {
        let row = [1.0, 5.0, 3.0];
        let masked =
            |mask: &[u32]| process(&row, &Sampling { mask: Some(mask), ..Sampling::GREEDY }, Past::default());
        assert_eq!(masked(&[0b101]), Some(vec![1.0, f64::NEG_INFINITY, 3.0]));
        assert_eq!(masked(&[0]), None);
        let plain = |row: &[f32]| process(row, &Sampling::GREEDY, Past::default());
        assert_eq!(plain(&[1.0, f32::NAN]), None);
        assert_eq!(plain(&[1.0, f32::INFINITY]), None);
        assert_eq!(plain(&[f32::NEG_INFINITY; 2]), None);
    }

    #[test]
    fn alternatives_come_best_first_with_ties_of_the_last() {
        let listed = |row: &[f64], count| alternatives(row, count);
        assert_eq!(listed(&[1.0, 2.0, 1.0, 0.0], 2), [1, 0, 2]);
        assert_eq!(listed(&[1.0, f64::NEG_INFINITY], 5), [0]);
        assert_eq!(listed(&[1.0], 0), [0_u32; 0]);
    }
}
