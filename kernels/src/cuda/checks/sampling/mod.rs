//! Choices by every stage, alone and together, against the definition; what they must not depend on; and their
//! distribution.

mod trial;

use super::{Checker, Finding};
use crate::cuda::{SamplerState, SamplingRow};
use crate::{OpError, Penalties, Sampling, Watermark};
use trial::{Trial, compare, is_independent};

/// One token, odd widths, a word of a mask and the next, a chunk and the next, and several chunks, in vectors and not.
const VOCABULARIES: [usize; 10] = [1, 2, 5, 32, 33, 1000, 4096, 4097, 9001, 10_500];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for vocabulary in VOCABULARIES {
        choices(c, vocabulary)?;
    }
    for vocabulary in [3, 40, 65, 4099] {
        look_back(c, vocabulary)?;
    }
    for vocabulary in [1, 2, 50, 99, 1000, 5003] {
        filters(c, vocabulary)?;
    }
    for vocabulary in [97, 500, 5000] {
        ties(c, vocabulary)?;
    }
    for vocabulary in [60, 400, 4444] {
        everything(c, vocabulary)?;
    }
    not_numbers(c)?;
    draws_follow_the_distribution(c)
}

const SAMPLED: Sampling<'static> = Sampling { draws: true, ..Sampling::GREEDY };

/// A few tokens that are likely, and many that are not.
fn peaked(c: &mut Checker, vocabulary: usize) -> Vec<f32> {
    let peaked = |number: f32| (number * number + 0.3) * number * 9.0 + 3.0;
    c.random().numbers(vocabulary).into_iter().map(peaked).collect()
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
        if index == 6 {
            // What the model itself rules out stays ruled out.
            trial.alternatives = 100;
            trial.bias = vec![(trial.prompt[1], f32::MAX)];
            for id in [trial.prompt[1], trial.prompt[2]] {
                trial.logits[id as usize] = f32::NEG_INFINITY;
            }
            trial.logits[trial.generated[2] as usize] = 1.0;
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

/// Each filter, at its ends and between; with all that is left among the alternatives where it is little.
fn filters(c: &mut Checker, vocabulary: usize) -> Result<(), OpError> {
    let neutral = Sampling::GREEDY;
    let many = vocabulary as u32;
    let top_k = [1, 2, 7, many / 2 + 1, many - 1, many, many + 1, u32::MAX];
    let top_p = [0.0, 0.1, 0.5, 0.9, 0.999];
    let typical_p = [0.0, 0.1, 0.4, 0.9, 0.999];
    let min_p = [1e-6, 0.05, 0.3, 1.0];
    let all = top_k
        .map(|top_k| Sampling { top_k, ..neutral })
        .into_iter()
        .chain(top_p.map(|top_p| Sampling { top_p, ..neutral }))
        .chain(typical_p.map(|typical_p| Sampling { typical_p, ..neutral }))
        .chain(min_p.map(|min_p| Sampling { min_p, ..neutral }));
    let mut trials = Vec::new();
    for (index, sampling) in all.enumerate() {
        // Cold, what is wanted lies far below the best; hot, it is all close together.
        let temperature = [1.0, 0.05, 1.4, 30.0][index % 4];
        let sampling = Sampling { temperature, seed: seed(c), draws: index % 3 != 0, ..sampling };
        let mut trial = Trial::new(peaked(c, vocabulary), sampling);
        if temperature > 2.0 {
            trial.logits.iter_mut().for_each(|logit| *logit *= 4.0);
        }
        trial.alternatives = [100, 3, 1][index % 3];
        trials.push(trial);
    }
    if vocabulary == 1000 {
        is_independent(c, "filter", &trials[..9])?;
    }
    compare(c, "filter", &trials)
}

/// Logits of few values: a filter ends among equals, and they are more than can be listed.
fn ties(c: &mut Checker, vocabulary: usize) -> Result<(), OpError> {
    let neutral = SAMPLED;
    let mut trials = Vec::new();
    for values in [1, 3, 20] {
        let samplings = [
            Sampling { top_k: 5, ..neutral },
            Sampling { top_k: vocabulary as u32 / 2, ..neutral },
            Sampling { top_p: 0.0, ..neutral },
            Sampling { top_p: 0.300_01, ..neutral },
            Sampling { top_p: 0.970_01, temperature: 1.5, ..neutral },
            Sampling { top_k: 40, top_p: 0.810_01, ..neutral },
            Sampling { typical_p: 0.300_01, ..neutral },
            Sampling { typical_p: 0.910_01, temperature: 0.7, ..neutral },
            Sampling { min_p: 1.0, draws: false, ..neutral },
            Sampling::GREEDY,
        ];
        for (index, sampling) in samplings.into_iter().enumerate() {
            let random = c.random();
            // The best is zero, and both zeros are the same.
            let logits = (0..vocabulary).map(|_| random.below(values) as f32 * -0.5).collect();
            let mut trial = Trial::new(logits, Sampling { seed: seed(c), ..sampling });
            let zeros = trial.logits.iter_mut().skip(1).step_by(3).filter(|logit| **logit == 0.0);
            zeros.for_each(|logit| *logit = 0.0);
            trial.alternatives = [100, 1, 7, 0][index % 4];
            trials.push(trial);
        }
    }
    compare(c, "ties", &trials)
}

/// All stages at once, with random strengths.
fn everything(c: &mut Checker, vocabulary: usize) -> Result<(), OpError> {
    let mut trials = Vec::new();
    for index in 0..if vocabulary < 1000 { 40 } else { 12 } {
        let mut one = |low: f32, high: f32| low + (high - low) * (c.random().number() + 1.0) / 2.0;
        let penalties = Penalties {
            repetition: one(0.8, 1.5),
            frequency: one(-1.0, 1.0),
            presence: one(-1.0, 1.0),
            count: one(-0.2, 0.3),
        };
        let watermark = Watermark { gamma: one(0.1, 0.9), delta: one(0.0, 2.0), previous: index };
        let (temperature, top_p) = (one(0.4, 2.0), one(0.3, 1.1));
        let (typical_p, min_p) = (one(0.3, 1.1), one(-0.1, 0.1).max(0.0));
        let bias = [one(-3.0, 3.0), one(-3.0, 3.0), one(-100.0, 100.0)];
        let top_k = c.random().below(vocabulary) as u32 * (index % 2);
        let mut sampling = Sampling { penalties, temperature, top_k, top_p, typical_p, min_p, ..SAMPLED };
        (sampling.watermark, sampling.seed) = ((index % 3 == 0).then_some(watermark), seed(c));
        let mut trial = Trial::new(peaked(c, vocabulary), sampling);
        let random = c.random();
        let mut tokens = |count| (0..count).map(|_| random.below(vocabulary) as u32).collect::<Vec<_>>();
        (trial.prompt, trial.generated) = (tokens(20), tokens(index as usize % 3));
        trial.sampling.index = u64::from(index % 3);
        trial.bias = tokens(3).into_iter().zip(bias).collect();
        trial.alternatives = [0, 5, 100][index as usize % 3];
        if index % 4 == 0 {
            trial.mask =
                Some(tokens(vocabulary.div_ceil(32)).iter().map(|word| !(1 << (word % 32))).collect());
        }
        trials.push(trial);
    }
    if vocabulary == 400 {
        is_independent(c, "all stages", &trials[..12])?;
    }
    compare(c, "all stages", &trials)
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
