//! The sampler of CPUs against the definition of sampling, which the GPU's is held to as well.

use kernels::reference::{self, Past};
use proto::units::TokenId;

use super::penalties::{Penalties, Watermark};
use super::{Sampler, SamplingParams, Scratch};

const VOCABULARY: usize = 300;
const STEPS: usize = 3;

/// Numbers that depend on the seed alone (xorshift, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.below(1 << 20) as f32 / (1 << 20) as f32
    }

    /// A number of the range, or more often than not the neutral one.
    fn perhaps(&mut self, low: f32, high: f32, neutral: f32) -> f32 {
        if self.below(3) == 0 { self.between(low, high) } else { neutral }
    }
}

fn params(random: &mut Random) -> SamplingParams {
    SamplingParams {
        temperature: random.perhaps(0.3, 2.0, 1.0),
        top_k: if random.below(3) == 0 { 1 + random.below(60) as u32 } else { 0 },
        top_p: random.perhaps(0.1, 0.99, 1.0),
        typical_p: random.perhaps(0.1, 0.99, 1.0),
        min_p: random.perhaps(0.01, 0.3, 0.0),
        do_sample: random.below(2) == 0,
        seed: random.below(1 << 40) as u64,
        penalties: Penalties {
            repetition: random.perhaps(0.8, 1.5, 1.0),
            frequency: random.perhaps(-0.5, 2.0, 0.0),
            presence: random.perhaps(-1.0, 1.0, 0.0),
            count: random.perhaps(-0.5, 0.5, 0.0),
        },
        logit_bias: (0..random.below(4))
            .map(|_| (TokenId(random.below(VOCABULARY) as u32), random.between(-3.0, 3.0)))
            .collect(),
        watermark: (random.below(4) == 0).then_some(Watermark { gamma: 0.4, delta: 1.5 }),
    }
}

/// The same parameters as the definition has them.
fn defined<'a>(
    params: &SamplingParams,
    bias: &'a [(u32, f32)],
    previous: u32,
    index: u64,
) -> kernels::Sampling<'a> {
    let Penalties { repetition, frequency, presence, count } = params.penalties;
    kernels::Sampling {
        watermark: params.watermark.map(|Watermark { gamma, delta }| kernels::Watermark {
            gamma,
            delta,
            previous,
        }),
        bias,
        penalties: kernels::Penalties { repetition, frequency, presence, count },
        mask: None,
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        typical_p: params.typical_p,
        min_p: params.min_p,
        draws: params.samples(),
        seed: params.seed,
        index,
    }
}

#[test]
fn tokens_and_their_probabilities_are_those_of_the_definition() {
    let mut random = Random(77);
    for case in 0..400 {
        let params = params(&mut random);
        let bias: Vec<(u32, f32)> = params.logit_bias.iter().map(|(id, bias)| (id.0, *bias)).collect();
        let prompt: Vec<u32> = (0..1 + random.below(20)).map(|_| random.below(VOCABULARY) as u32).collect();
        let mut sampler = Sampler::new(params.clone(), &prompt);
        let mut generated = Vec::new();
        for step in 0..STEPS {
            let logits: Vec<f32> = (0..VOCABULARY).map(|_| random.between(-6.0, 6.0)).collect();
            let found = sampler.choose(&logits, 4, &mut Scratch::default()).unwrap();
            let previous = *generated.last().or(prompt.last()).unwrap();
            let defined = defined(&params, &bias, previous, step as u64);
            let past = Past { prompt: &prompt, generated: &generated };
            let row = reference::process(&logits, &defined, past).unwrap();
            let logprobs = reference::logprobs(&row);
            let id = found.token.id.0;
            assert_eq!(id, reference::choose(&row, &defined), "case {case}, step {step}: {params:?}");
            let error = f64::from(found.token.logprob) - logprobs[id as usize];
            assert!(error.abs() < 1e-4, "case {case}, step {step}: off by {error}; {params:?}");
            let top: Vec<u32> = found.top.iter().map(|scored| scored.id.0).collect();
            assert_eq!(top, reference::alternatives(&row, 4), "case {case}, step {step}: {params:?}");
            generated.push(id);
        }
    }
}
