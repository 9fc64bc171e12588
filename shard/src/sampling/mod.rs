//! Logits to a token: a fixed order of stages, then a choice.
//!
//! watermark → bias → repetition → frequency → presence and count → temperature → top-k → top-p → typical-p →
//! min-p → choice. The log-probabilities are those of the distribution that is chosen from.
//!
//! Invariants: a request's choice depends on its own logits, history, parameters, seed and token index, never on its
//! neighbours or on when it was batched; nothing here keeps a state between draws.
//!
//! - [`penalties`]: stages that look at the past.
//! - [`warpers`]: temperature and the filters.
//! - [`logprobs`]: log-softmax, best alternatives.
//! - [`random`]: random numbers as a function of seed and index.

#[cfg(test)]
mod definition;
pub mod logprobs;
pub mod penalties;
pub mod random;
pub mod warpers;

use std::sync::mpsc;

use proto::units::TokenId;

use logprobs::Normalizer;
use penalties::{History, Penalties, Watermark};
use random::Draw;

/// How one request's tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; above 0, neutral 1.
    pub temperature: f32,
    /// Keeps the `k` best; neutral 0.
    pub top_k: u32,
    /// Keeps the smallest set of this mass; neutral 1.
    pub top_p: f32,
    /// Keeps the most typical set of this mass; neutral 1.
    pub typical_p: f32,
    /// Keeps tokens at least this likely, relative to the likeliest; neutral 0.
    pub min_p: f32,
    /// Samples even if no other field asks for it.
    pub do_sample: bool,
    /// Key of the random numbers.
    pub seed: u64,
    /// Strengths of the penalties.
    pub penalties: Penalties,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Whether the shard's watermark is put in.
    pub watermark: Option<Watermark>,
}

/// A token that is still possible.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// Its logit, as far as the stages have come.
    pub logit: f32,
}

/// A token and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub id: TokenId,
    /// At most 0.
    pub logprob: f32,
}

/// The token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: Scored,
    /// The best alternatives, best first; empty unless asked for.
    pub top: Vec<Scored>,
}

/// Why no token could be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not numbers")]
pub struct NotNumbers;

/// Chooses the tokens of one request.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Kept only if a penalty needs it.
    history: Option<History>,
    previous: TokenId,
    generated: u64,
    /// Where a device keeps a copy of the history.
    place: Option<HistoryPlace>,
}

/// A place for a request's history on a device. Dropping it gives it back.
#[derive(Debug)]
pub struct HistoryPlace {
    /// Which.
    pub slot: u32,
    /// Of which set of places: a larger one may have replaced it since.
    pub set: u64,
    /// Where it goes when it is dropped.
    pub home: mpsc::Sender<(u32, u64)>,
}

/// A token to choose, of one request.
#[derive(Debug)]
pub struct Pick<'a> {
    /// The row of logits that it is chosen from.
    pub row: usize,
    /// How.
    pub sampler: &'a mut Sampler,
    /// Alternatives to list.
    pub top: usize,
}

/// Buffers that all choices share.
#[derive(Debug, Default)]
pub struct Scratch {
    candidates: Vec<Candidate>,
    values: Vec<f32>,
}

impl Drop for HistoryPlace {
    fn drop(&mut self) {
        // Where the device is gone, so are its places, and nobody wants them back.
        self.home.send((self.slot, self.set)).ok();
    }
}

impl SamplingParams {
    /// Whether a random draw decides; otherwise the best token is taken. The rule is the contract's; penalties, `min_p` and
    /// bias do not switch sampling on.
    pub fn samples(&self) -> bool {
        self.do_sample
            || self.temperature != 1.0
            || self.top_k != 0
            || self.top_p < 1.0
            || self.typical_p < 1.0
    }
}

impl Sampler {
    /// For a request with this prompt.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let history = (!params.penalties.are_neutral()).then(|| History::of_prompt(prompt));
        let previous = TokenId(prompt.last().copied().unwrap_or_default());
        Self { params, history, previous, generated: 0, place: None }
    }

    /// The seed, if random draws decide.
    pub fn seed(&self) -> Option<u64> {
        self.params.samples().then_some(self.params.seed)
    }

    /// How tokens are chosen.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// What the penalties look at, if there are any.
    pub fn history(&self) -> Option<&History> {
        self.history.as_ref()
    }

    /// Where a device keeps a copy of the history.
    pub fn place_mut(&mut self) -> &mut Option<HistoryPlace> {
        &mut self.place
    }

    /// The token before the next one.
    pub fn previous(&self) -> TokenId {
        self.previous
    }

    /// Tokens chosen so far.
    pub fn generated(&self) -> u64 {
        self.generated
    }

    /// Chooses the next token from its logits `[vocabulary]`, with the `top` best alternatives.
    pub fn choose(
        &mut self,
        logits: &[f32],
        top: usize,
        scratch: &mut Scratch,
    ) -> Result<Choice, NotNumbers> {
        let Scratch { candidates, values } = scratch;
        candidates.clear();
        candidates.extend(logits.iter().zip(0..).map(|(&logit, id)| Candidate { id, logit }));
        self.look_back(candidates);
        if candidates.iter().any(|candidate| candidate.logit.is_nan())
            || !logprobs::best_logit(candidates).is_finite()
        {
            return Err(NotNumbers);
        }
        self.warp(candidates, values);
        let normalizer = Normalizer::of(candidates);
        let winner =
            if self.params.samples() { self.draw(candidates, &normalizer) } else { best(candidates) };
        let choice = Choice {
            token: winner.scored(&normalizer),
            top: logprobs::top(candidates, &normalizer, top, values),
        };
        self.advance(choice.token.id);
        Ok(choice)
    }

    fn look_back(&self, row: &mut [Candidate]) {
        if let Some(watermark) = &self.params.watermark {
            watermark.apply(row, self.previous);
        }
        penalties::apply_bias(row, &self.params.logit_bias);
        if let Some(history) = &self.history {
            self.params.penalties.apply(row, history);
        }
    }

    fn warp(&self, candidates: &mut Vec<Candidate>, values: &mut Vec<f32>) {
        let params = &self.params;
        if params.temperature != 1.0 {
            warpers::temperature(candidates, params.temperature);
        }
        if params.top_k != 0 {
            warpers::top_k(candidates, params.top_k as usize, values);
        }
        if params.top_p < 1.0 {
            warpers::top_p(candidates, params.top_p);
        }
        if params.typical_p < 1.0 {
            warpers::typical_p(candidates, params.typical_p);
        }
        if params.min_p > 0.0 {
            warpers::min_p(candidates, params.min_p);
        }
    }

    /// An exponential race: the candidate with the largest probability over an exponential variate `-ln(u)` of its own wins,
    /// which it does with exactly its probability.
    fn draw(&self, candidates: &[Candidate], normalizer: &Normalizer) -> Candidate {
        let mut draw = Draw::new(self.params.seed, self.generated);
        let mut winner = candidates[0];
        let mut record = 0.0;
        for candidate in candidates {
            let (probability, u) = (normalizer.probability(candidate.logit), draw.uniform(candidate.id));
            // Since -ln(u) >= 1 - u, most need no logarithm to lose.
            if probability < record * (1.0 - u) {
                continue;
            }
            let speed = probability / -u.ln();
            if speed > record || (speed == record && candidate.id < winner.id) {
                (winner, record) = (*candidate, speed);
            }
        }
        winner
    }

    /// Goes on from the token that was chosen.
    pub fn advance(&mut self, id: TokenId) {
        self.generated += 1;
        self.previous = id;
        if let Some(history) = &mut self.history {
            history.push(id);
        }
    }
}

impl Candidate {
    fn scored(&self, normalizer: &Normalizer) -> Scored {
        Scored { id: TokenId(self.id), logprob: normalizer.logprob(self.logit).min(0.0) as f32 }
    }
}

/// The likeliest candidate, the lowest id among equals. Candidates are in id order here: the filters that
/// reorder run for requests that sample.
fn best(candidates: &[Candidate]) -> Candidate {
    let mut best = candidates[0];
    for candidate in &candidates[1..] {
        if candidate.logit > best.logit {
            best = *candidate;
        }
    }
    best
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn dense(logits: &[f32]) -> Vec<Candidate> {
        logits.iter().zip(0..).map(|(&logit, id)| Candidate { id, logit }).collect()
    }

    pub(crate) fn of_probabilities(probabilities: &[f32]) -> Vec<Candidate> {
        dense(&probabilities.iter().map(|probability| probability.ln()).collect::<Vec<_>>())
    }

    pub(crate) fn logits(row: &[Candidate]) -> Vec<f32> {
        row.iter().map(|entry| entry.logit).collect()
    }

    pub(crate) fn kept(candidates: &[Candidate]) -> Vec<u32> {
        let mut ids: Vec<u32> = candidates.iter().map(|candidate| candidate.id).collect();
        ids.sort_unstable();
        ids
    }

    /// Every field at its neutral value: the best token is taken.
    pub(crate) fn greedy() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            min_p: 0.0,
            do_sample: false,
            seed: 0,
            penalties: Penalties { repetition: 1.0, frequency: 0.0, presence: 0.0, count: 0.0 },
            logit_bias: Vec::new(),
            watermark: None,
        }
    }

    fn choose(params: SamplingParams, logits: &[f32], top: usize) -> Choice {
        Sampler::new(params, &[0]).choose(logits, top, &mut Scratch::default()).unwrap()
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_the_best_with_the_raw_logprob() {
        let choice = choose(greedy(), &[0.0, 2.0, 2.0], 0);
        assert_eq!(choice.token.id, TokenId(1));
        let expected = 2.0 - (1.0 + 2.0 * 2_f32.exp()).ln();
        assert!((choice.token.logprob - expected).abs() < 1e-6);
        assert_eq!(choice.top, []);
    }

    #[test]
    fn logprobs_are_those_of_the_filtered_distribution() {
        let params = SamplingParams { top_k: 1, ..greedy() };
        let choice = choose(params, &[0.0, 2.0, 1.0], 5);
        assert_eq!(choice.token, Scored { id: TokenId(1), logprob: 0.0 });
        assert_eq!(choice.top, [choice.token]);
    }

    #[test]
    fn each_field_of_the_rule_switches_sampling_on() {
        assert!(!greedy().samples());
        let penalties = Penalties { repetition: 2.0, ..greedy().penalties };
        assert!(!SamplingParams { penalties, min_p: 0.5, ..greedy() }.samples());
        assert!(SamplingParams { temperature: 0.5, ..greedy() }.samples());
        assert!(SamplingParams { top_k: 3, ..greedy() }.samples());
        assert!(SamplingParams { top_p: 0.5, ..greedy() }.samples());
        assert!(SamplingParams { typical_p: 0.5, ..greedy() }.samples());
        assert!(SamplingParams { do_sample: true, ..greedy() }.samples());
    }

    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.5, 0.3, 0.15, 0.05_f32];
        let row: Vec<f32> = probabilities.iter().map(|probability| probability.ln()).collect();
        let mut sampler = Sampler::new(SamplingParams { do_sample: true, seed: 3, ..greedy() }, &[0]);
        let mut scratch = Scratch::default();
        let mut counts = [0_u32; 4];
        for _ in 0..20_000 {
            counts[sampler.choose(&row, 0, &mut scratch).unwrap().token.id.index()] += 1;
        }
        for (count, probability) in counts.iter().zip(probabilities) {
            assert!((*count as f32 / 20_000.0 - probability).abs() < 0.012, "{counts:?}");
        }
    }

    #[test]
    fn the_same_seed_and_index_draw_the_same_token() {
        let row: Vec<f32> = (0..50).map(|id| (id % 7) as f32 / 3.0).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(SamplingParams { temperature: 1.3, seed, ..greedy() }, &[0]);
            let mut scratch = Scratch::default();
            (0..20).map(|_| sampler.choose(&row, 0, &mut scratch).unwrap().token.id.0).collect::<Vec<_>>()
        };
        assert_eq!(run(11), run(11));
        assert_ne!(run(11), run(12));
    }

    #[test]
    fn a_filter_does_not_change_which_random_numbers_a_token_gets() {
        let row: Vec<f32> = (0..100).map(|id| id as f32 / 50.0).collect();
        for seed in 0..50 {
            let free = choose(SamplingParams { do_sample: true, seed, ..greedy() }, &row, 0).token.id;
            let filtered =
                choose(SamplingParams { top_k: 90, top_p: 0.999, seed, ..greedy() }, &row, 0).token.id;
            assert!(free == filtered || free.0 < 12, "seed {seed}: {free} and {filtered}");
        }
    }

    #[test]
    fn penalties_see_what_was_chosen_before() {
        let penalties = Penalties { presence: 5.0, ..greedy().penalties };
        let mut sampler = Sampler::new(SamplingParams { penalties, ..greedy() }, &[2]);
        let mut scratch = Scratch::default();
        let mut next = || sampler.choose(&[1.0, 2.0, 3.0], 0, &mut scratch).unwrap().token.id.0;
        assert_eq!([next(), next(), next()], [2, 1, 0]);
    }

    #[test]
    fn rows_that_are_not_numbers_are_refused() {
        let refused =
            |logits: &[f32]| Sampler::new(greedy(), &[0]).choose(logits, 0, &mut Scratch::default()).is_err();
        assert!(refused(&[1.0, f32::NAN]));
        assert!(refused(&[f32::NEG_INFINITY; 3]));
        assert!(refused(&[f32::INFINITY, 1.0]));
    }
}
