//! Stages that look at the past: watermark, bias and the penalties. They change the logits of single tokens.
//!
//! All of them run on the dense row, where the entry of a token lies at its id.

use std::collections::HashMap;

use proto::units::TokenId;

use super::Candidate;
use super::random::keyed_hash;

/// The key of the reference's watermark (Kirchenbauer et al. 2023, "A watermark for large language models").
const WATERMARK_KEY: u64 = 15_485_863;

/// How often a token occurred.
#[derive(Clone, Copy, Debug, Default)]
struct Occurrences {
    /// In the whole history: prompt and generated tokens.
    history: u32,
    /// Among the generated tokens.
    generated: u32,
}

/// What a request has seen so far, as far as penalties need it.
#[derive(Clone, Debug, Default)]
pub struct History {
    tokens: HashMap<u32, Occurrences>,
    length: u32,
}

/// Strengths of the penalties of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Divides positive logits of tokens in the history and multiplies negative ones; neutral 1.
    pub repetition: f32,
    /// Subtracted times a token's share of the history; neutral 0.
    pub frequency: f32,
    /// Subtracted from tokens that were generated; neutral 0.
    pub presence: f32,
    /// Subtracted times the number of times a token was generated; neutral 0.
    pub count: f32,
}

/// The soft green list of section 3 of the paper, with the previous token as its context.
///
/// A token is green after `previous` when the 64-bit Philox hash of its id under the key `15485863 * previous` is below
/// `gamma * 2^64`: so each token is green with probability gamma, and a detector needs only this sentence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Watermark {
    /// Share of green tokens, in (0, 1).
    pub gamma: f32,
    /// Added to the logits of green tokens.
    pub delta: f32,
}

impl History {
    /// Counts the tokens of a prompt.
    pub fn of_prompt(ids: &[u32]) -> Self {
        let mut history = Self::default();
        for id in ids {
            history.tokens.entry(*id).or_default().history += 1;
        }
        history.length = ids.len() as u32;
        history
    }

    /// Tokens that were counted.
    pub fn length(&self) -> usize {
        self.length as usize
    }

    /// Each token that was counted, with how often it is in the prompt and among the generated ones.
    pub fn counts(&self) -> impl Iterator<Item = (u32, [u32; 2])> {
        let parts = |(id, seen): (&u32, &Occurrences)| (*id, [seen.history - seen.generated, seen.generated]);
        self.tokens.iter().map(parts)
    }

    /// Counts a generated token.
    pub fn push(&mut self, id: TokenId) {
        let occurrences = self.tokens.entry(id.0).or_default();
        occurrences.history += 1;
        occurrences.generated += 1;
        self.length += 1;
    }
}

impl Penalties {
    /// Whether all of them leave every row alone.
    pub fn are_neutral(&self) -> bool {
        let Self { repetition, frequency, presence, count } = *self;
        repetition == 1.0 && frequency == 0.0 && presence == 0.0 && count == 0.0
    }

    /// Repetition, then frequency, then presence and count, on the dense `row`.
    pub fn apply(&self, row: &mut [Candidate], history: &History) {
        for (id, occurrences) in &history.tokens {
            let Some(entry) = row.get_mut(*id as usize).filter(|entry| is_possible(entry)) else { continue };
            let mut logit = entry.logit;
            if self.repetition != 1.0 {
                logit = finite(if logit < 0.0 { logit * self.repetition } else { logit / self.repetition });
            }
            logit = finite(logit - self.frequency * (occurrences.history as f32 / history.length as f32));
            if occurrences.generated > 0 {
                let penalty = finite(self.presence + finite(self.count * occurrences.generated as f32));
                logit = finite(logit - penalty);
            }
            entry.logit = logit;
        }
    }
}

impl Watermark {
    /// Adds delta to the green tokens of the dense `row`.
    pub fn apply(&self, row: &mut [Candidate], previous: TokenId) {
        let bound = (f64::from(self.gamma) * 2_f64.powi(64)) as u64;
        let key = WATERMARK_KEY.wrapping_mul(u64::from(previous.0));
        for entry in row {
            if keyed_hash(key, entry.id) < bound {
                entry.logit += self.delta;
            }
        }
    }
}

/// Adds each bias to its token's logit in the dense `row`.
pub fn apply_bias(row: &mut [Candidate], biases: &[(TokenId, f32)]) {
    for (id, bias) in biases {
        if let Some(entry) = row.get_mut(id.index()).filter(|entry| is_possible(entry)) {
            entry.logit = finite(entry.logit + bias);
        }
    }
}

/// What the model itself ruled out stays ruled out.
fn is_possible(entry: &Candidate) -> bool {
    entry.logit != f32::NEG_INFINITY
}

/// Extreme strengths overflow; the largest numbers that there are keep the distribution defined.
fn finite(logit: f32) -> f32 {
    logit.clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::tests::{dense, logits};

    const NEUTRAL: Penalties = Penalties { repetition: 1.0, frequency: 0.0, presence: 0.0, count: 0.0 };

    fn penalized(penalties: Penalties) -> Vec<f32> {
        let mut row = dense(&[1.0, -1.0, 2.0, 3.0]);
        let mut history = History::of_prompt(&[0, 1, 1, 99]);
        history.push(TokenId(1));
        history.push(TokenId(2));
        penalties.apply(&mut row, &history);
        logits(&row)
    }

    #[test]
    fn repetition_moves_every_seen_token_down_once() {
        assert_eq!(penalized(Penalties { repetition: 2.0, ..NEUTRAL }), [0.5, -2.0, 1.0, 3.0]);
    }

    #[test]
    fn frequency_subtracts_the_share_of_the_own_history() {
        let expected = [1.0 - 1.0 / 6.0, -1.0 - 3.0 / 6.0, 2.0 - 1.0 / 6.0, 3.0];
        assert_eq!(penalized(Penalties { frequency: 1.0, ..NEUTRAL }), expected);
    }

    #[test]
    fn presence_and_count_see_generated_tokens_only() {
        assert_eq!(penalized(Penalties { presence: 0.5, ..NEUTRAL }), [1.0, -1.5, 1.5, 3.0]);
        let mut row = dense(&[0.0, 0.0]);
        let mut history = History::of_prompt(&[0, 0]);
        history.push(TokenId(1));
        history.push(TokenId(1));
        Penalties { count: 0.5, ..NEUTRAL }.apply(&mut row, &history);
        assert_eq!(logits(&row), [0.0, -1.0]);
    }

    #[test]
    fn an_extreme_penalty_leaves_numbers() {
        let row = penalized(Penalties { repetition: f32::MIN_POSITIVE, ..NEUTRAL });
        assert!(row.iter().all(|logit| logit.is_finite()), "{row:?}");
    }

    #[test]
    fn the_watermark_raises_about_gamma_of_the_tokens_and_depends_on_the_previous_one() {
        let raised = |previous| {
            let mut row = dense(&[0.0; 4000]);
            Watermark { gamma: 0.25, delta: 2.0 }.apply(&mut row, TokenId(previous));
            row.iter().filter(|entry| entry.logit == 2.0).map(|entry| entry.id).collect::<Vec<_>>()
        };
        assert!((800..1200).contains(&raised(5).len()), "{}", raised(5).len());
        assert_eq!(raised(5), raised(5));
        assert_ne!(raised(5), raised(6));
    }

    #[test]
    fn a_bias_is_added_to_its_token() {
        let mut row = dense(&[1.0, 2.0]);
        apply_bias(&mut row, &[(TokenId(1), -100.0), (TokenId(7), 1.0)]);
        assert_eq!(logits(&row), [1.0, -98.0]);
    }

    #[test]
    fn extreme_strengths_neither_rule_tokens_out_nor_make_them_no_numbers() {
        let mut history = History::of_prompt(&[0, 1]);
        (0..2).for_each(|id| history.push(TokenId(id)));
        for strength in [f32::MAX, f32::MIN_POSITIVE / 4.0] {
            let mut row = dense(&[5.0, -2.0, f32::NEG_INFINITY]);
            Penalties { repetition: strength, frequency: f32::MAX, presence: f32::MAX, count: f32::MAX }
                .apply(&mut row, &history);
            apply_bias(&mut row, &[(TokenId(0), f32::MAX), (TokenId(2), f32::MAX)]);
            let logits = logits(&row);
            assert!(logits[..2].iter().all(|logit| logit.is_finite()), "{logits:?}");
            assert_eq!(logits[2], f32::NEG_INFINITY);
        }
    }
}
