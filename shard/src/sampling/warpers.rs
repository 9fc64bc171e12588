//! Stages that reshape the distribution: temperature, and the filters that drop unlikely tokens.
//!
//! A filter removes candidates; a removed one has probability zero for every later stage and for the log-probabilities.
//! None of them sorts more of the vocabulary than it keeps, up to a factor.

use super::Candidate;
use super::logprobs::{Normalizer, best_logit};

/// First guess of how many candidates a mass filter keeps.
const HEAD_START: usize = 128;

/// Divides the logits. They are shifted to a best of 0 first, so that a tiny temperature cannot overflow.
pub fn temperature(candidates: &mut [Candidate], temperature: f32) {
    let best = best_logit(candidates);
    for candidate in candidates {
        candidate.logit = (candidate.logit - best) / temperature;
    }
}

/// Keeps the `k` best; ties with the `k`-th stay.
pub fn top_k(candidates: &mut Vec<Candidate>, k: usize, scratch: &mut Vec<f32>) {
    if k >= candidates.len() {
        return;
    }
    scratch.clear();
    scratch.extend(candidates.iter().map(|candidate| candidate.logit));
    let (_, threshold, _) = scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    candidates.retain(|candidate| candidate.logit >= threshold);
}

/// Keeps the smallest set of the best whose mass reaches `mass`, at least one. Source: Holtzman et al. 2020, "The
/// curious case of neural text degeneration".
pub fn top_p(candidates: &mut Vec<Candidate>, mass: f32) {
    let normalizer = Normalizer::of(candidates);
    let kept = shortest_head(
        candidates,
        mass,
        |a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)),
        |candidate| normalizer.probability(candidate.logit),
    );
    candidates.truncate(kept);
}

/// Keeps the tokens whose information is closest to the entropy, until their mass reaches `mass`; ties with the last one
/// stay. Source: Meister et al. 2023, "Locally typical sampling".
pub fn typical_p(candidates: &mut Vec<Candidate>, mass: f32) {
    let normalizer = Normalizer::of(candidates);
    let entropy: f64 = candidates
        .iter()
        .map(|candidate| (normalizer.probability(candidate.logit), normalizer.logprob(candidate.logit)))
        .filter(|(probability, _)| *probability > 0.0)
        .map(|(probability, logprob)| -probability * logprob)
        .sum();
    let distance = |candidate: &Candidate| (-normalizer.logprob(candidate.logit) - entropy).abs();
    let kept = shortest_head(
        candidates,
        mass,
        |a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)),
        |candidate| normalizer.probability(candidate.logit),
    );
    let last = distance(&candidates[kept - 1]);
    candidates.retain(|candidate| distance(candidate) <= last);
}

/// Keeps tokens at least `share` times as likely as the likeliest. Source: Nguyen et al. 2024, "Min-p sampling".
pub fn min_p(candidates: &mut Vec<Candidate>, share: f32) {
    let threshold = best_logit(candidates) + share.ln();
    candidates.retain(|candidate| candidate.logit >= threshold);
}

/// Puts the first candidates by `order` in front, in order, and returns the length of the shortest head whose mass reaches
/// `mass`, at least 1. Selects a growing part before it sorts, because the head is short as a rule.
fn shortest_head(
    candidates: &mut [Candidate],
    mass: f32,
    order: impl Fn(&Candidate, &Candidate) -> std::cmp::Ordering,
    probability: impl Fn(&Candidate) -> f64,
) -> usize {
    let mut sorted = 0;
    let mut reached = 0.0;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let part = rest.len().min(HEAD_START.max(sorted * 3));
        if part < rest.len() {
            rest.select_nth_unstable_by(part - 1, &order);
        }
        rest[..part].sort_unstable_by(&order);
        for (index, candidate) in rest[..part].iter().enumerate() {
            reached += probability(candidate);
            if reached >= f64::from(mass) {
                return sorted + index + 1;
            }
        }
        sorted += part;
    }
    candidates.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::tests::{dense, kept, of_probabilities};

    #[test]
    fn temperature_divides_and_never_overflows() {
        let mut row = dense(&[1.0, 3.0]);
        temperature(&mut row, 0.5);
        assert_eq!(row.iter().map(|entry| entry.logit).collect::<Vec<_>>(), [-4.0, 0.0]);
        let mut row = dense(&[1.0, 3.0]);
        temperature(&mut row, f32::MIN_POSITIVE);
        assert_eq!(row[1].logit, 0.0);
        assert!(row[0].logit < -1e30);
    }

    #[test]
    fn top_k_keeps_ties_with_the_last() {
        let check = |k: usize, expected: &[u32]| {
            let mut row = dense(&[1.0, 3.0, 2.0, 2.0, 0.0]);
            top_k(&mut row, k, &mut Vec::new());
            assert_eq!(kept(&row), expected, "k = {k}");
        };
        check(1, &[1]);
        check(2, &[1, 2, 3]);
        check(3, &[1, 2, 3]);
        check(100, &[0, 1, 2, 3, 4]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_the_mass() {
        let check = |mass: f32, expected: &[u32]| {
            let mut row = of_probabilities(&[0.1, 0.5, 0.15, 0.25]);
            top_p(&mut row, mass);
            assert_eq!(kept(&row), expected, "mass = {mass}");
        };
        check(0.0, &[1]);
        check(0.49, &[1]);
        check(0.51, &[1, 3]);
        check(0.74, &[1, 3]);
        check(0.76, &[1, 2, 3]);
        check(0.99, &[0, 1, 2, 3]);
    }

    #[test]
    fn top_p_of_a_flat_row_keeps_its_share_of_a_large_vocabulary() {
        let mut row = dense(&vec![0.0; 10_000]);
        top_p(&mut row, 0.500_05);
        assert_eq!(kept(&row), (0..5001).collect::<Vec<u32>>());
    }

    #[test]
    fn typical_p_prefers_what_is_as_surprising_as_the_average() {
        // Entropy 1.03: the distances are 0.52, 0.17 (twice) and 1.97.
        let probabilities = [0.6, 0.175, 0.175, 0.05];
        let check = |mass: f32, expected: &[u32]| {
            let mut row = of_probabilities(&probabilities);
            typical_p(&mut row, mass);
            assert_eq!(kept(&row), expected, "mass = {mass}");
        };
        check(0.59, &[0]);
        check(0.7, &[0, 1, 2]);
        check(0.96, &[0, 1, 2, 3]);
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        let mut row = of_probabilities(&[0.1, 0.5, 0.15, 0.25]);
        min_p(&mut row, 0.29);
        assert_eq!(kept(&row), [1, 2, 3]);
    }

    #[test]
    fn the_head_is_in_order_whatever_its_length() {
        let values: Vec<f32> =
            (0..3000_u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 16) as f32 / 6553.6).collect();
        let mut row = dense(&values);
        let best_first = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit);
        let kept = shortest_head(&mut row, 0.4, best_first, |_| 1.0 / 3000.0);
        assert!((1200..=1201).contains(&kept));
        assert!(row[..kept].is_sorted_by(|a, b| a.logit >= b.logit));
        assert!(row[kept..].iter().all(|entry| entry.logit <= row[kept - 1].logit));
    }
}
