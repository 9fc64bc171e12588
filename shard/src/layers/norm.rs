use kernels::OpError;

use super::LayerError;
use crate::backend::{Device, RmsNorm, Tensor};
use crate::weights::WeightPath;

/// Root-mean-square norm: `x / sqrt(mean(x^2) + eps) * weight`. Source: Zhang and Sennrich 2019.
#[derive(Debug)]
pub struct Norm {
    weight: Tensor,
    eps: f32,
}

impl Norm {
    /// Takes `weight`, of `width` elements, from `path`.
    pub fn load(path: &WeightPath<'_>, device: &Device, width: usize, eps: f32) -> Result<Self, LayerError> {
        Ok(Self { weight: device.upload(path.at("weight").vector(width)?, width)?, eps })
    }

    /// `out = norm(x)`.
    pub fn forward(&self, device: &Device, x: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        device.rms_norm(x, self.args(), out)
    }

    /// `residual += delta`, then `out = norm(residual)`.
    pub fn add_forward(
        &self,
        device: &Device,
        residual: &mut Tensor,
        delta: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        device.add_rms_norm(residual, delta, self.args(), out)
    }

    fn args(&self) -> RmsNorm<'_> {
        RmsNorm { weight: &self.weight, eps: self.eps }
    }
}
