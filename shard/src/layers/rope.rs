use std::f64::consts::TAU;

use kernels::{OpError, RopeLayout};

use crate::backend::{Device, Indices, RopeAngles, Tensor};

/// Positions in the table at first; it doubles when a step goes beyond.
const POSITIONS_FIRST: usize = 1024;

/// A rotary embedding. Source: Su et al. 2021 (RoFormer), section 3.4.2.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Rotated elements of each head; even.
    pub rotary_dim: usize,
    /// The first of them.
    pub start: usize,
    /// How they are paired.
    pub layout: RopeLayout,
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
    /// Positions that may occur are below this.
    pub positions_max: usize,
}

/// How a model was stretched to longer contexts than it was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The base grows with the sequence once that is longer than `positions_original`. Source: "NTK-aware" scaling in its
    /// dynamic form, as in transformers.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// Context length of the first training.
        positions_original: f64,
    },
    /// Long wavelengths are stretched, short ones kept, those between are blended. Source: Llama 3.1.
    Llama3 {
        /// Stretch of the long wavelengths; at least 1.
        factor: f64,
        /// Wavelengths longer than `positions_original` divided by this are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths shorter than `positions_original` divided by this are kept; larger than `low_freq_factor`.
        high_freq_factor: f64,
        /// Context length of the first training.
        positions_original: f64,
    },
    /// Like `Llama3`, blended along the index of the pair. Source: Peng et al. 2023 (YaRN), section 3.
    Yarn {
        /// Stretch of the long wavelengths; at least 1.
        factor: f64,
        /// Pairs that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are stretched in full.
        beta_slow: f64,
        /// Context length of the first training.
        positions_original: f64,
        /// Whether the ends of the blend are moved to whole pairs.
        truncate: bool,
        /// Multiplies cosines and sines.
        amplitude: f64,
    },
    /// Each pair has a factor of its own, one for sequences of up to `positions_original`, another for longer ones. Source:
    /// Ding et al. 2024 (LongRoPE), as in Phi-3.
    Long {
        /// Divisors in short sequences, one per pair.
        short: Vec<f64>,
        /// Divisors in long ones.
        long: Vec<f64>,
        /// Context length of the first training.
        positions_original: f64,
        /// Multiplies cosines and sines in short sequences.
        short_amplitude: f64,
        /// And in long ones.
        long_amplitude: f64,
    },
}

/// Where the tokens of a step are.
#[derive(Clone, Copy, Debug)]
pub struct TokenPlaces<'a> {
    /// `[T]`, position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[T]`, length of the sequence as it was when the token came: that of the prompt, or one more than the position of a
    /// token that was generated. Some scalings depend on it.
    pub lengths: &'a [u32],
}

/// Cosine and sine of every angle, computed in f64 and kept on the device as f32. It grows with the longest sequence.
pub struct Rope {
    device: Device,
    spec: RopeSpec,
    /// Angles by position: one row, or two where short and long sequences differ.
    table: Table,
    /// Angles of one step's tokens in turn, for lengths that are not foreseen.
    step: Option<Table>,
    /// Row of each token of the step.
    rows: Indices,
    /// The same while it is made.
    found: Vec<u32>,
}

#[derive(Debug)]
struct Table {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// A table for the first positions.
    pub fn new(device: &Device, spec: RopeSpec) -> Result<Self, OpError> {
        let positions = POSITIONS_FIRST.min(spec.positions_max);
        let table = spec.table(device, positions)?;
        Ok(Self {
            device: device.clone(),
            spec,
            table,
            step: None,
            rows: device.indices(),
            found: Vec::new(),
        })
    }

    /// Finds the angles of a step's tokens. Errors when a position is beyond what the model was made for.
    pub fn cover(&mut self, places: TokenPlaces<'_>) -> Result<(), OpError> {
        let TokenPlaces { positions, lengths } = places;
        let needed = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let limit = self.spec.positions_max;
        if needed > limit {
            return Err(OpError::Index { op: "rope", what: "position", index: needed - 1, limit });
        }
        self.found.clear();
        if self.spec.is_beyond(lengths) {
            self.step = Some(self.spec.step_table(&self.device, places)?);
            self.found.extend(0..positions.len() as u32);
            return self.rows.set(&self.found);
        }
        self.step = None;
        let per_position = self.spec.rows_per_position();
        if needed * per_position > self.table.cos.rows() {
            let positions = needed.next_power_of_two().min(limit);
            self.table = self.spec.table(&self.device, positions)?;
        }
        let rows = positions.iter().zip(lengths);
        self.found.extend(rows.map(|(&position, &length)| self.spec.row(position, length)));
        self.rows.set(&self.found)
    }

    /// The angles of the tokens that were covered last.
    pub fn angles(&self) -> RopeAngles<'_> {
        let Table { cos, sin } = self.step.as_ref().unwrap_or(&self.table);
        let RopeSpec { rotary_dim, start, layout, .. } = self.spec;
        RopeAngles { cos, sin, rows: &self.rows, rotary_dim, start, layout }
    }
}

impl RopeSpec {
    /// Radians per position of each pair: `theta^(-2 j / rotary_dim)`, not scaled.
    fn base(&self, theta: f64) -> Vec<f64> {
        let pairs = self.rotary_dim / 2;
        (0..pairs).map(|pair| theta.powf(-(pair as f64) / pairs as f64)).collect()
    }

    /// Scaled frequencies in a sequence of this length, and what multiplies cosines and sines.
    fn frequencies(&self, length: f64) -> (Vec<f64>, f64) {
        let base = self.base(self.theta);
        match &self.scaling {
            RopeScaling::None => (base, 1.0),
            RopeScaling::Linear { factor } => {
                (base.iter().map(|frequency| frequency / factor).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor, positions_original } => {
                let stretch = factor * length.max(*positions_original) / positions_original - (factor - 1.0);
                let pairs = self.rotary_dim as f64;
                (self.base(self.theta * stretch.powf(pairs / (pairs - 2.0))), 1.0)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, positions_original } => {
                let scaled = base.iter().map(|frequency| {
                    let turns = positions_original * frequency / TAU;
                    // 0 where fewer than `low` turns fit into the original context, 1 where more than `high` do.
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    blend(keep.clamp(0.0, 1.0), *frequency, *factor)
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn { factor, amplitude, .. } => {
                let (low, high) = self.yarn_ends();
                let scaled = base.iter().enumerate().map(|(pair, frequency)| {
                    let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    blend(1.0 - stretched, *frequency, *factor)
                });
                (scaled.collect(), *amplitude)
            }
            RopeScaling::Long { short, long, positions_original, short_amplitude, long_amplitude } => {
                let (factors, amplitude) = match length > *positions_original {
                    true => (long, long_amplitude),
                    false => (short, short_amplitude),
                };
                (base.iter().zip(factors).map(|(frequency, factor)| frequency / factor).collect(), *amplitude)
            }
        }
    }

    /// The pairs between which YaRN blends: those that turn `beta_fast` and `beta_slow` times in the original context.
    fn yarn_ends(&self) -> (f64, f64) {
        let RopeScaling::Yarn { beta_fast, beta_slow, positions_original, truncate, .. } = self.scaling
        else {
            return (0.0, 1.0);
        };
        let dim = self.rotary_dim as f64;
        let pair = |turns: f64| dim * (positions_original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // As the reference does, so that nothing is divided by zero.
        if low == high { (low, high + 0.001) } else { (low, high) }
    }

    /// The longest prompt whose angles are those of every shorter one too, where longer prompts are possible.
    pub fn shared_prompt_max(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic { positions_original, .. }
            | RopeScaling::Long { positions_original, .. } => {
                Some(positions_original as usize).filter(|limit| *limit < self.positions_max)
            }
            _ => None,
        }
    }

    /// Whether a sequence is so long that its angles are not in the table.
    fn is_beyond(&self, lengths: &[u32]) -> bool {
        match self.scaling {
            RopeScaling::Dynamic { positions_original, .. } => {
                lengths.iter().any(|&length| f64::from(length) > positions_original)
            }
            _ => false,
        }
    }

    fn rows_per_position(&self) -> usize {
        if matches!(self.scaling, RopeScaling::Long { .. }) { 2 } else { 1 }
    }

    /// Row of the table of a token.
    fn row(&self, position: u32, length: u32) -> u32 {
        match self.scaling {
            RopeScaling::Long { positions_original, .. } => {
                2 * position + u32::from(f64::from(length) > positions_original)
            }
            _ => position,
        }
    }

    /// Angles of the first `positions`; where short and long sequences differ, one row for each, in turn.
    fn table(&self, device: &Device, positions: usize) -> Result<Table, OpError> {
        let short = self.frequencies(0.0);
        let long = match self.scaling {
            RopeScaling::Long { .. } => Some(self.frequencies(f64::INFINITY)),
            _ => None,
        };
        let rows = (0..positions).flat_map(|position| {
            let position = position as f64;
            std::iter::once((position, &short)).chain(long.iter().map(move |long| (position, long)))
        });
        upload(device, rows, self.rotary_dim / 2)
    }

    /// Angles of each token of a step.
    fn step_table(&self, device: &Device, places: TokenPlaces<'_>) -> Result<Table, OpError> {
        let mut by_length = std::collections::BTreeMap::new();
        for &length in places.lengths {
            by_length.entry(length).or_insert_with(|| self.frequencies(f64::from(length)));
        }
        let rows = places
            .positions
            .iter()
            .zip(places.lengths)
            .map(|(&position, length)| (f64::from(position), &by_length[length]));
        upload(device, rows, self.rotary_dim / 2)
    }
}

/// Keeps `keep` of a frequency, and divides the rest.
fn blend(keep: f64, frequency: f64, factor: f64) -> f64 {
    (1.0 - keep) * frequency / factor + keep * frequency
}

/// Cosines and sines, `[rows, pairs]`, of positions times frequencies.
fn upload<'a>(
    device: &Device,
    rows: impl Iterator<Item = (f64, &'a (Vec<f64>, f64))>,
    pairs: usize,
) -> Result<Table, OpError> {
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for (position, (frequencies, amplitude)) in rows {
        for frequency in frequencies {
            let angle = position * frequency;
            cos.push((angle.cos() * amplitude) as f32);
            sin.push((angle.sin() * amplitude) as f32);
        }
    }
    Ok(Table { cos: device.upload(cos, pairs)?, sin: device.upload(sin, pairs)? })
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    fn spec(rotary_dim: usize, theta: f64, scaling: RopeScaling) -> RopeSpec {
        RopeSpec { rotary_dim, start: 0, layout: RopeLayout::HalfSplit, theta, scaling, positions_max: 5000 }
    }

    fn check(scaling: RopeScaling, theta: f64, length: f64, expected: &[f64]) {
        let (found, _) = spec(2 * expected.len(), theta, scaling.clone()).frequencies(length);
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found / expected - 1.0).abs() < 1e-12,
                "{scaling:?}: found {found}, expected {expected}"
            );
        }
    }

    fn device() -> Device {
        Device::cpu(NonZeroUsize::MIN).unwrap()
    }

    fn cover(rope: &mut Rope, positions: &[u32]) -> Result<(), OpError> {
        let lengths: Vec<u32> = positions.iter().map(|position| position + 1).collect();
        rope.cover(TokenPlaces { positions, lengths: &lengths })
    }

    #[test]
    fn frequencies_fall_geometrically_from_one() {
        check(RopeScaling::None, 10_000.0, 1.0, &[1.0, 0.01]);
        check(RopeScaling::None, 10_000.0, 1.0, &[1.0, 0.1, 0.01, 0.001]);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        check(RopeScaling::Linear { factor: 4.0 }, 10_000.0, 1.0, &[0.25, 0.0025]);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_stretches_long_ones_and_blends_between() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            positions_original: 100.0,
        };
        // Frequencies 1, 0.1, 0.01: wavelengths 6.28 (< 100/4: kept), 62.8 (between), 628 (> 100/1: stretched).
        // Between: s = (100/62.83 - 1) / (4 - 1) = 0.19718314..., f' = (1 - s) 0.1/8 + s 0.1 = 0.02975352...
        let s: f64 = (100.0 / 62.831_853_071_795_86 - 1.0) / 3.0;
        let blended = (1.0 - s) * 0.0125 + s * 0.1;
        assert!((blended - 0.029_753_524).abs() < 1e-8);
        check(scaling, 1000.0, 1.0, &[1.0, blended, 0.01 / 8.0]);
    }

    #[test]
    fn yarn_blends_along_the_pairs() {
        let scaling = |truncate| RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 8.0,
            beta_slow: 2.0,
            positions_original: 64.0,
            truncate,
            amplitude: 1.0,
        };
        // dim(r) = 8 ln(64 / (2 pi r)) / (2 ln 10^4): dim(8) = 0.105, dim(2) = 0.707; truncated 0 and 1: the first pair is
        // kept, all others are stretched.
        check(scaling(true), 10_000.0, 1.0, &[1.0, 0.1 / 4.0, 0.01 / 4.0, 0.001 / 4.0]);
        let low = 8.0 * (64.0 / (8.0 * TAU)).ln() / (2.0 * 10_000f64.ln());
        assert!((low - 0.105).abs() < 1e-3);
        check(scaling(false), 10_000.0, 1.0, &[1.0, 0.1 / 4.0, 0.01 / 4.0, 0.001 / 4.0]);
    }

    #[test]
    fn dynamic_scaling_raises_the_base_of_sequences_that_are_too_long() {
        let scaling = || RopeScaling::Dynamic { factor: 2.0, positions_original: 10.0 };
        check(scaling(), 100.0, 10.0, &[1.0, 0.1]);
        // theta' = 100 (2 * 20 / 10 - 1)^(4 / 2) = 900.
        check(scaling(), 100.0, 20.0, &[1.0, 1.0 / 30.0]);
        let mut rope = Rope::new(&device(), spec(4, 100.0, scaling())).unwrap();
        rope.cover(TokenPlaces { positions: &[3, 3], lengths: &[10, 20] }).unwrap();
        let sin = rope.angles().sin.host().to_vec();
        assert_eq!(rope.angles().rows.values(), [0, 1]);
        assert_eq!([sin[1], sin[3]], [0.3f64.sin() as f32, 0.1f64.sin() as f32]);
        rope.cover(TokenPlaces { positions: &[3], lengths: &[4] }).unwrap();
        assert_eq!(rope.angles().rows.values(), [3]);
    }

    #[test]
    fn long_scaling_has_factors_for_short_and_for_long_sequences() {
        let scaling = RopeScaling::Long {
            short: vec![1.0, 2.0],
            long: vec![4.0, 8.0],
            positions_original: 10.0,
            short_amplitude: 1.0,
            long_amplitude: 1.5,
        };
        check(scaling.clone(), 100.0, 10.0, &[1.0, 0.05]);
        check(scaling.clone(), 100.0, 11.0, &[0.25, 0.0125]);
        let mut rope = Rope::new(&device(), spec(4, 100.0, scaling)).unwrap();
        rope.cover(TokenPlaces { positions: &[3, 3], lengths: &[10, 11] }).unwrap();
        let RopeAngles { rows, sin, .. } = rope.angles();
        let row = |index: usize| &sin.host()[2 * rows.values()[index] as usize..][..2];
        assert_eq!(row(0), [3f64.sin() as f32, 0.15f64.sin() as f32]);
        assert_eq!(row(1), [(1.5 * 0.75f64.sin()) as f32, (1.5 * 0.0375f64.sin()) as f32]);
    }

    #[test]
    fn prompts_share_angles_up_to_the_length_from_which_on_they_depend_on_it() {
        let shared = |scaling| spec(2, 100.0, scaling).shared_prompt_max();
        let dynamic = |positions_original| RopeScaling::Dynamic { factor: 2.0, positions_original };
        assert_eq!(shared(dynamic(10.5)), Some(10));
        assert_eq!(shared(dynamic(4999.0)), Some(4999));
        assert_eq!(shared(dynamic(5000.0)), None);
        let long = RopeScaling::Long {
            short: vec![1.0],
            long: vec![4.0],
            positions_original: 10.0,
            short_amplitude: 1.0,
            long_amplitude: 1.5,
        };
        for (scaling, last) in [(dynamic(10.0), 10), (long, 10)] {
            let spec = spec(4, 100.0, scaling.clone());
            let frequencies = |length: u32| format!("{:?}", spec.frequencies(f64::from(length)));
            assert_eq!(shared(scaling), Some(last as usize));
            assert_eq!(frequencies(1), frequencies(last));
            assert_ne!(frequencies(1), frequencies(last + 1));
        }
        assert_eq!(shared(RopeScaling::None), None);
        assert_eq!(shared(RopeScaling::Linear { factor: 4.0 }), None);
    }

    #[test]
    fn the_table_holds_cosine_and_sine_of_position_times_frequency() {
        let rope = Rope::new(&device(), spec(4, 10_000.0, RopeScaling::None)).unwrap();
        let angles = rope.angles();
        assert_eq!((angles.cos.rows(), angles.cos.width()), (1024, 2));
        assert_eq!(angles.cos.host()[2 * 7..2 * 8], [7f64.cos() as f32, 0.07f64.cos() as f32]);
        assert_eq!(angles.sin.host()[2 * 7..2 * 8], [7f64.sin() as f32, 0.07f64.sin() as f32]);
    }

    #[test]
    fn the_table_grows_with_the_positions_up_to_the_limit() {
        let mut rope = Rope::new(&device(), spec(4, 10_000.0, RopeScaling::None)).unwrap();
        let before = rope.angles().cos.host().to_vec();
        cover(&mut rope, &[3, 1024, 0]).unwrap();
        assert_eq!(rope.angles().cos.rows(), 2048);
        assert_eq!(rope.angles().rows.values(), [3, 1024, 0]);
        assert_eq!(rope.angles().cos.host()[..before.len()], before);
        cover(&mut rope, &[4999]).unwrap();
        assert_eq!(rope.angles().sin.rows(), 5000);
        let error = cover(&mut rope, &[5000]).unwrap_err();
        assert_eq!(error, OpError::Index { op: "rope", what: "position", index: 5000, limit: 5000 });
    }
}
