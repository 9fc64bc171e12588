//! Log-probabilities: the log-softmax of a row, summed in f64.

use super::{Candidate, Scored};

/// The softmax of a set of logits, one subtraction away.
#[derive(Clone, Copy, Debug)]
pub struct Normalizer {
    best: f32,
    /// Sum of the exponentials, relative to that of the best.
    total: f64,
    log_total: f64,
}

impl Normalizer {
    /// Of the candidates that are left; the others have probability zero.
    pub fn of(candidates: &[Candidate]) -> Self {
        Self::from_logits(candidates.iter().map(|candidate| candidate.logit))
    }

    /// Of a raw row.
    pub fn of_row(row: &[f32]) -> Self {
        Self::from_logits(row.iter().copied())
    }

    fn from_logits(logits: impl Iterator<Item = f32> + Clone) -> Self {
        let best = logits.clone().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = logits.map(|logit| f64::from(exp(logit - best))).sum();
        Self { best, total, log_total: f64::from(best) + total.ln() }
    }

    /// Natural logarithm of the probability of a logit.
    pub fn logprob(&self, logit: f32) -> f64 {
        f64::from(logit) - self.log_total
    }

    /// Probability of a logit.
    pub fn probability(&self, logit: f32) -> f64 {
        f64::from(exp(logit - self.best)) / self.total
    }
}

/// `e^x` for `x <= 0`, within 3e-7 of the value; 0 where the result would be subnormal. A vocabulary takes as many of these
/// as it has entries, and the system's `expf` costs several times as much.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; then `2^n` by its bits and `e^r` by its Taylor series of degree 7.
fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// The natural logarithm of 2, its upper bits and the rest, so that `n` times the first is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const FACTORS: [f32; 7] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let series = FACTORS.iter().fold(0.0, |sum, factor| (sum + factor) * r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < -87.0 { 0.0 } else { series * power }
}

/// The largest logit.
pub fn best_logit(candidates: &[Candidate]) -> f32 {
    candidates.iter().fold(f32::NEG_INFINITY, |best, candidate| best.max(candidate.logit))
}

/// The `count` likeliest candidates and ties with the last of them, best first, the lower id first among equals. What has
/// no probability is not listed.
pub fn top(
    candidates: &[Candidate],
    normalizer: &Normalizer,
    count: usize,
    scratch: &mut Vec<f32>,
) -> Vec<Scored> {
    scratch.clear();
    scratch.extend(
        candidates.iter().map(|candidate| candidate.logit).filter(|logit| *logit > f32::NEG_INFINITY),
    );
    if count == 0 || scratch.is_empty() {
        return Vec::new();
    }
    let last = count.min(scratch.len()) - 1;
    let (_, threshold, _) = scratch.select_nth_unstable_by(last, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    let mut best: Vec<Candidate> =
        candidates.iter().filter(|candidate| candidate.logit >= threshold).copied().collect();
    best.sort_unstable_by(|a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)));
    best.iter().map(|candidate| candidate.scored(normalizer)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::tests::{dense, of_probabilities};

    fn top_ids(logits: &[f32], count: usize) -> Vec<u32> {
        let row = dense(logits);
        top(&row, &Normalizer::of(&row), count, &mut Vec::new()).iter().map(|scored| scored.id.0).collect()
    }

    #[test]
    fn probabilities_of_a_row_sum_to_one_however_large_its_logits() {
        let row = dense(&[1000.0, 999.0, -1000.0, f32::NEG_INFINITY]);
        let normalizer = Normalizer::of(&row);
        let total: f64 = row.iter().map(|entry| normalizer.probability(entry.logit)).sum();
        assert!((total - 1.0).abs() < 1e-6, "{total}");
        assert_eq!(normalizer.probability(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn the_exponential_is_the_systems_within_its_bound() {
        for step in 0..870_000 {
            let x = -step as f32 / 10_000.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 3e-7, "{x}: {error}");
        }
        assert_eq!([exp(0.0), exp(-88.0), exp(f32::MIN), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_best_come_with_their_logprobs() {
        let row = of_probabilities(&[0.2, 0.7, 0.1]);
        let best = top(&row, &Normalizer::of(&row), 2, &mut Vec::new());
        assert_eq!(best.iter().map(|scored| scored.id.0).collect::<Vec<_>>(), [1, 0]);
        assert!((best[0].logprob - 0.7_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn ties_with_the_last_are_listed_and_impossible_tokens_are_not() {
        assert_eq!(top_ids(&[1.0, 2.0, 1.0, 0.0], 2), [1, 0, 2]);
        assert_eq!(top_ids(&[1.0, f32::NEG_INFINITY], 5), [0]);
        assert_eq!(top_ids(&[1.0], 0), [0_u32; 0]);
    }
}
