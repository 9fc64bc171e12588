//! Choices by every stage, alone and together, against the definition; what they must not depend on; and their
//! distribution.

mod trial;

use super::{Checker, Finding};
use crate::cuda::{SamplerState, SamplingRow};
use crate::{OpError, Penalties, Sampling, Watermark};
use trial::{Trial, compare, is_independent};

/// One token, odd widths, a word of a mask and the next, a chunk and the next, and several chunks.
const VOCABULARIES: [usize; 9] = [1, 2, 5, 32, 33, 1000, 4096, 4097, 9001];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for vocabulary in VOCABULARIES {
        choices(c, vocabulary)?;
    }
    for vocabulary in [3, 40, 65, 4099] {
        look_back(c, vocabulary)?;
    }
    not_numbers(c)?;
    draws_follow_the_distribution(c)
}

const SAMPLED: Sampling<'static> = Sampling { draws: true, ..Sampling::GREEDY };

/// A few tokens that are likely, and many that are not.
fn peaked(c: &mut Checker, vocabulary: usize) -> Vec<f32> {
    c.random().numbers(vocabulary).into_iter().map(|number| number * number * number * 12.0 + 3.0).collect()
}

fn seed(c: &mut Checker) -> u64 {
    (0..4).fold(0, |seed, _| seed << 16 | c.random().below(1 << 16) as u64)
}

/// The best token, and draws at several temperatures.
fn choices(c: &mut Checker, vocabulary: usize) -> Result<(), OpError> {
    let mut trials = Vec::new();
    for temperature in [1.0, 1.0, 0.3, 1.7, 40.0, f32::MIN_POSITIVE] {
        let (seed, index) = (seed(c), seed(c));
        let logits = if temperature == 1.7 { vec![-2.5; vocabulary] } else { peaked(c, vocabulary) };
        let draws = !trials.is_empty();
        trials.push(Trial::new(logits, Sampling { temperature, draws, seed, index, ..Sampling::GREEDY }));
    }
    // Of equals the first.
    let logits = (0..vocabulary).map(|id| if id % 7 > 2 { 4.0 } else { -1.0 }).collect();
    trials.push(Trial::new(logits, Sampling::GREEDY));
    if vocabulary == 4097 {
        is_independent(c, "choice", &trials)?;
    }
    compare(c, "choice", &trials)
}

/// Watermark, bias, penalties and mask, alone and together.
fn look_back(c: &mut Checker, vocabulary: usize) -> Result<(), OpError> {
    let neutral = Penalties::NEUTRAL;
    let all = Penalties { repetition: 1.3, frequency: 0.7, presence: -0.4, count: 0.2 };
    let penalties = [
        neutral,
        neutral,
        neutral,
        neutral,
        Penalties { repetition: 1.5, ..neutral },
        Penalties { frequency: 2.0, ..neutral },
        Penalties { presence: 1.5, count: 0.25, ..neutral },
        all,
        all,
        Penalties { repetition: f32::MIN_POSITIVE, frequency: f32::MAX, presence: f32::MAX, count: f32::MAX },
    ];
    let mut trials = Vec::new();
    for (index, penalties) in penalties.into_iter().enumerate() {
        let draws = index % 2 == 1;
        let mut trial = Trial::new(peaked(c, vocabulary), Sampling { penalties, draws, ..Sampling::GREEDY });
        trial.sampling.seed = seed(c);
        let random = c.random();
        let mut tokens = |count| (0..count).map(|_| random.below(vocabulary) as u32).collect::<Vec<_>>();
        if !penalties.are_neutral() {
            (trial.prompt, trial.generated) = (tokens(7), tokens(3));
            trial.prompt.extend([trial.prompt[0], trial.generated[1], vocabulary as u32, u32::MAX]);
            trial.sampling.index = 3;
        }
        if [0, 7, 8].contains(&index) {
            let previous = tokens(1)[0];
            trial.sampling.watermark = Some(Watermark { gamma: 0.4, delta: 2.0, previous });
        }
        if [1, 7, 8].contains(&index) {
            let biased = tokens(3);
            trial.bias = biased.into_iter().zip([1.5, -3.0, f32::MAX]).collect();
            // The same again, and one that does not exist.
            trial.bias.extend([
                (trial.bias[0].0, 0.5),
                (trial.bias[2].0, -f32::MAX),
                (vocabulary as u32, 9.0),
            ]);
        }
        if [2, 3, 8].contains(&index) {
            // Something is always allowed.
            let mut mask: Vec<u32> =
                (0..vocabulary.div_ceil(32)).map(|_| c.random().below(1 << 32) as u32).collect();
            mask[0] |= 1 << (vocabulary - 1).min(2);
            trial.mask = Some(mask);
        }
        trials.push(trial);
    }
    compare(c, "look back", &trials)
}

/// A row is refused when it, or what is allowed of it, is not numbers.
fn not_numbers(c: &mut Checker) -> Result<(), OpError> {
    for vocabulary in [6, 4200] {
        let last = vocabulary - 1;
        let none = vec![f32::NEG_INFINITY; vocabulary];
        let mut trials = Vec::new();
        for (value, allowed) in
            [(f32::NAN, 0), (-f32::NAN, last), (f32::INFINITY, 0), (1.0, 0), (f32::NEG_INFINITY, last)]
        {
            for of_all in [&none, &vec![0.0; vocabulary]] {
                for draws in [false, true] {
                    let mut logits = of_all.clone();
                    logits[last] = value;
                    let mut trial = Trial::new(logits, Sampling { draws, ..Sampling::GREEDY });
                    trials.push(trial.clone());
                    let mut mask = vec![0; vocabulary.div_ceil(32)];
                    trial.mask = Some(mask.clone());
                    trials.push(trial.clone());
                    mask[allowed / 32] |= 1 << (allowed % 32);
                    trial.mask = Some(mask);
                    trials.push(trial);
                }
            }
        }
        compare(c, "not numbers", &trials)?;
    }
    Ok(())
}

/// 20,000 draws from 8 tokens: the sum of the squared deviations has a chi-square distribution with 7 degrees of freedom,
/// which exceeds 24.3 once in a thousand times.
fn draws_follow_the_distribution(c: &mut Checker) -> Result<(), OpError> {
    const ROWS: usize = 500;
    let gpu = c.gpu();
    let probabilities = [0.35_f32, 0.2, 0.15, 0.1, 0.08, 0.07, 0.03, 0.02];
    let logits: Vec<f32> = probabilities.iter().map(|probability| probability.ln()).collect();
    let mut state = SamplerState::new(&gpu, logits.len(), ROWS, 0)?;
    let mut counts = [0_u32; 8];
    for index in 0..40 {
        let rows: Vec<SamplingRow<'_>> = (0..ROWS as u32)
            .map(|row| SamplingRow {
                logits: row,
                sampling: Sampling {
                    seed: u64::from(row / 20),
                    index: index * 20 + u64::from(row % 20),
                    ..SAMPLED
                },
                history: None,
                alternatives: 0,
            })
            .collect();
        state.set(&rows)?;
        state.sample(gpu.upload(&logits.repeat(ROWS))?.all_mut())?;
        for sampled in state.results()?.into_iter().flatten() {
            counts[sampled.token as usize] += 1;
        }
    }
    let total = f64::from(counts.iter().sum::<u32>());
    let deviation = |(count, probability): (u32, f32)| {
        let expected = f64::from(probability) * total;
        (f64::from(count) - expected).powi(2) / expected
    };
    let deviations: f64 = counts.into_iter().zip(probabilities).map(deviation).sum();
    let error = if total == 20_000.0 { deviations / 24.3 } else { f64::INFINITY };
    c.findings.push(Finding { case: format!("{total} draws from 8 tokens"), error });
    Ok(())
}
