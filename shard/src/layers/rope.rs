use std::f64::consts::TAU;

use kernels::{OpError, RopeLayout};

use crate::backend::{Device, RopeAngles, Tensor};

/// Positions in the table at first; it doubles when a step goes beyond.
const POSITIONS_FIRST: usize = 1024;

/// A rotary embedding. Source: Su et al. 2021 (RoFormer), section 3.4.2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    /// Rotated elements at the start of each head; even.
    pub rotary_dim: usize,
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
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
}

/// Cosine and sine of every angle, computed in f64 and kept on the device as f32. It grows with the longest sequence.
pub struct Rope {
    device: Device,
    spec: RopeSpec,
    frequencies: Vec<f64>,
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// A table for the first positions.
    pub fn new(device: &Device, spec: RopeSpec) -> Result<Self, OpError> {
        let frequencies = frequencies(&spec);
        let positions = POSITIONS_FIRST.min(spec.positions_max);
        let (cos, sin) = table(device, &frequencies, positions)?;
        Ok(Self { device: device.clone(), spec, frequencies, cos, sin })
    }

    /// Makes the table cover `positions`. Errors when one of them is beyond what the model was made for.
    pub fn cover(&mut self, positions: &[u32]) -> Result<(), OpError> {
        let needed = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let limit = self.spec.positions_max;
        if needed > limit {
            return Err(OpError::Index { op: "rope", what: "position", index: needed - 1, limit });
        }
        if needed > self.cos.rows() {
            let rows = needed.next_power_of_two().min(limit);
            (self.cos, self.sin) = table(&self.device, &self.frequencies, rows)?;
        }
        Ok(())
    }

    /// The angles of all covered positions.
    pub fn angles(&self) -> RopeAngles<'_> {
        let RopeSpec { rotary_dim, layout, .. } = self.spec;
        RopeAngles { cos: &self.cos, sin: &self.sin, rotary_dim, layout }
    }
}

/// Radians per position of each pair: `theta^(-2 j / rotary_dim)`, then scaled.
fn frequencies(spec: &RopeSpec) -> Vec<f64> {
    let pairs = spec.rotary_dim / 2;
    let base = |pair: usize| spec.theta.powf(-(pair as f64) / pairs as f64);
    (0..pairs).map(|pair| spec.scaling.apply(base(pair))).collect()
}

impl RopeScaling {
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, positions_original } => {
                let turns = positions_original * frequency / TAU;
                // 0 where fewer than `low` turns fit into the original context, 1 where more than `high` do.
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - keep) * frequency / factor + keep * frequency
            }
        }
    }
}

/// Cosines and sines, `[positions, pairs]`.
fn table(device: &Device, frequencies: &[f64], positions: usize) -> Result<(Tensor, Tensor), OpError> {
    let angles =
        || (0..positions).flat_map(|position| frequencies.iter().map(move |step| position as f64 * step));
    let cos = angles().map(|angle| angle.cos() as f32).collect();
    let sin = angles().map(|angle| angle.sin() as f32).collect();
    Ok((device.upload(cos, frequencies.len())?, device.upload(sin, frequencies.len())?))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    const SPEC: RopeSpec = RopeSpec {
        rotary_dim: 4,
        layout: RopeLayout::HalfSplit,
        theta: 10_000.0,
        scaling: RopeScaling::None,
        positions_max: 5000,
    };

    fn check(scaling: RopeScaling, theta: f64, expected: &[f64]) {
        let found = frequencies(&RopeSpec { scaling, theta, rotary_dim: 2 * expected.len(), ..SPEC });
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found / expected - 1.0).abs() < 1e-12,
                "{scaling:?}: found {found}, expected {expected}"
            );
        }
    }

    #[test]
    fn frequencies_fall_geometrically_from_one() {
        check(RopeScaling::None, 10_000.0, &[1.0, 0.01]);
        check(RopeScaling::None, 10_000.0, &[1.0, 0.1, 0.01, 0.001]);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        check(RopeScaling::Linear { factor: 4.0 }, 10_000.0, &[0.25, 0.0025]);
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
        check(scaling, 1000.0, &[1.0, blended, 0.01 / 8.0]);
    }

    #[test]
    fn the_table_holds_cosine_and_sine_of_position_times_frequency() {
        let device = Device::cpu(NonZeroUsize::MIN).unwrap();
        let rope = Rope::new(&device, SPEC).unwrap();
        let angles = rope.angles();
        assert_eq!((angles.cos.rows(), angles.cos.width()), (1024, 2));
        assert_eq!(angles.cos.host()[2 * 7..2 * 8], [7f64.cos() as f32, 0.07f64.cos() as f32]);
        assert_eq!(angles.sin.host()[2 * 7..2 * 8], [7f64.sin() as f32, 0.07f64.sin() as f32]);
    }

    #[test]
    fn the_table_grows_with_the_positions_up_to_the_limit() {
        let device = Device::cpu(NonZeroUsize::MIN).unwrap();
        let mut rope = Rope::new(&device, SPEC).unwrap();
        let before = rope.angles().cos.host().to_vec();
        rope.cover(&[3, 1024, 0]).unwrap();
        assert_eq!(rope.angles().cos.rows(), 2048);
        assert_eq!(rope.angles().cos.host()[..before.len()], before);
        rope.cover(&[4999]).unwrap();
        assert_eq!(rope.angles().sin.rows(), 5000);
        let error = rope.cover(&[5000]).unwrap_err();
        assert_eq!(error, OpError::Index { op: "rope", what: "position", index: 5000, limit: 5000 });
    }
}
