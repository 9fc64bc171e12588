use kernels::{NormKind, OpError};

use super::{LayerError, Pass};
use crate::backend::{self, Device, Tensor};
use crate::weights::{Rows, WeightPath};

/// What a model's norms are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Root-mean-square (Zhang and Sennrich 2019), or with the mean taken off (Ba et al. 2016).
    pub kind: NormKind,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// What multiplies the normalized elements.
    pub weight: NormWeight,
    /// Whether something is added to them.
    pub bias: bool,
}

/// What multiplies normalized elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormWeight {
    /// `weight`
    Plain,
    /// `1 + weight`, as in Gemma.
    OnePlus,
    /// Nothing.
    None,
}

impl NormSpec {
    /// `x / sqrt(mean(x^2) + eps) * weight`
    pub fn rms(eps: f32) -> Self {
        Self { kind: NormKind::Rms, eps, weight: NormWeight::Plain, bias: false }
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias`
    pub fn layer(eps: f32) -> Self {
        Self { kind: NormKind::Layer, eps, weight: NormWeight::Plain, bias: true }
    }
}

/// A norm over rows, or over equal parts of rows.
#[derive(Debug)]
pub struct Norm {
    kind: NormKind,
    eps: f32,
    width: usize,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Norm {
    /// Takes `weight` and `bias`, of `width` elements, from `path`, as far as the spec has them.
    pub fn load(
        path: &WeightPath<'_>,
        device: &Device,
        width: usize,
        spec: NormSpec,
    ) -> Result<Self, LayerError> {
        Self::load_part(path, device, &[width], &Rows::range(0..width), spec)
    }

    /// A norm over parts as long as the last dimension of `shape`, which the weights are stored in; of those, the part takes
    /// `rows` in turn.
    pub fn load_part(
        path: &WeightPath<'_>,
        device: &Device,
        shape: &[usize],
        rows: &Rows,
        spec: NormSpec,
    ) -> Result<Self, LayerError> {
        let width = shape.last().copied().unwrap_or_default();
        let weight = || path.at("weight").vector_part(shape, rows);
        let weight = match spec.weight {
            NormWeight::None => None,
            NormWeight::Plain => Some(weight()?),
            NormWeight::OnePlus => Some(weight()?.into_iter().map(|weight| 1.0 + weight).collect()),
        };
        let bias = match spec.bias {
            true => Some(path.at("bias").vector_part(shape, rows)?),
            false => None,
        };
        Self::from_parts(device, width, spec, weight, bias)
    }

    /// A norm whose weights were found elsewhere; whole multiples of `width`.
    pub fn from_parts(
        device: &Device,
        width: usize,
        spec: NormSpec,
        weight: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, LayerError> {
        let upload = |elements: Vec<f32>| {
            let length = elements.len();
            device.upload(elements, length)
        };
        Ok(Self {
            kind: spec.kind,
            eps: spec.eps,
            width,
            weight: weight.map(upload).transpose()?,
            bias: bias.map(upload).transpose()?,
        })
    }

    /// `out = norm(x)`.
    pub fn forward(&self, pass: &Pass<'_>, x: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        pass.device.norm(x, self.args(), out)
    }

    /// `x = norm(x)`.
    pub fn forward_in_place(&self, pass: &Pass<'_>, x: &mut Tensor) -> Result<(), OpError> {
        pass.device.norm_in_place(x, self.args())
    }

    /// `residual += delta`, then `out = norm(residual)`.
    pub fn add_forward(
        &self,
        pass: &Pass<'_>,
        residual: &mut Tensor,
        delta: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        pass.device.add_norm(residual, delta, self.args(), out)
    }

    fn args(&self) -> backend::Norm<'_> {
        backend::Norm {
            kind: self.kind,
            width: self.width,
            weight: self.weight.as_ref(),
            bias: self.bias.as_ref(),
            eps: self.eps,
        }
    }
}
