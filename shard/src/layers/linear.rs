use kernels::OpError;

use super::LayerError;
use crate::backend::{Device, Product, Tensor};
use crate::weights::{Weight, WeightPath};

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearSpec {
    /// Elements of an input row.
    pub inputs: usize,
    /// Elements of an output row.
    pub outputs: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

/// `out = input * weight^T + bias`, with the weight as the checkpoint stores it: `[outputs, inputs]`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// Takes `weight`, and `bias` where the spec has one, from `path`.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: LinearSpec) -> Result<Self, LayerError> {
        let weight = path.at("weight").matrix(spec.outputs, spec.inputs)?;
        let bias = match spec.bias {
            true => Some(device.upload(path.at("bias").vector(spec.outputs)?, spec.outputs)?),
            false => None,
        };
        Ok(Self { weight, bias })
    }

    /// A layer over a weight that something else has loaded.
    pub fn sharing(weight: Weight) -> Self {
        Self { weight, bias: None }
    }

    /// Applies the layer; `input`: `[T, inputs]`, `out`: `[T, outputs]`.
    pub fn forward(&self, device: &Device, input: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        device.linear(input, [self.product(out)])
    }

    /// This layer as one of several products with the same input.
    pub fn product<'a>(&'a self, out: &'a mut Tensor) -> Product<'a> {
        Product { weight: &self.weight, bias: self.bias.as_ref(), out }
    }
}
