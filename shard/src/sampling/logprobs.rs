//! Log-probabilities: the log-softmax of a row, summed in f64.

use super::{Candidate, Scored};

/// The log-softmax of a set of logits, one subtraction away.
#[derive(Clone, Copy, Debug)]
pub struct Normalizer {
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
        let total: f64 = logits.map(|logit| f64::from((logit - best).exp())).sum();
        Self { log_total: f64::from(best) + total.ln() }
    }

    /// Natural logarithm of the probability of a logit.
    pub fn logprob(&self, logit: f32) -> f64 {
        f64::from(logit) - self.log_total
    }

    /// Probability of a logit.
    pub fn probability(&self, logit: f32) -> f64 {
        self.logprob(logit).exp()
    }
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
