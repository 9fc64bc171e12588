use kernels::OpError;

use super::{LayerError, Pass};
use crate::backend::{Device, Product, Projection, Tensor};
use crate::weights::{Region, Weight, WeightPath};

/// `out = input * weight^T + bias`, with the weight as the checkpoint stores it: `[outputs, inputs]`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    /// Where an adapter has what it adds to this layer.
    number: Option<usize>,
}

impl Linear {
    /// Takes the region of `weight` that belongs to this rank, and `bias` if there is one, from `path`.
    ///
    /// Where ranks have different inputs, their outputs are summed: then only the first of them has the bias.
    pub fn load(
        path: &WeightPath<'_>,
        device: &Device,
        region: &Region,
        bias: bool,
    ) -> Result<Self, LayerError> {
        let summed = region.cols.len() < region.whole[1];
        let bias = match bias && !(summed && path.partition().rank > 0) {
            true => Some(path.at("bias").bias(region)?),
            false => None,
        };
        let weight = path.at("weight").matrix(region)?;
        let number = path.register(region, bias.clone());
        let upload = |bias: Vec<f32>| {
            let width = bias.len();
            device.upload(bias, width)
        };
        Ok(Self { weight, bias: bias.map(upload).transpose()?, number: Some(number) })
    }

    /// A layer that no adapter changes.
    pub fn from_parts(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, number: None }
    }

    /// Applies the layer; `input`: `[T, inputs]`, `out`: `[T, outputs]`.
    pub fn forward(&self, pass: &Pass<'_>, input: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        project(pass, input, [(self, out)])
    }

    /// Outputs on this rank.
    pub fn outputs(&self) -> usize {
        self.weight.shape()[0]
    }

    /// The weight and its bias, for operations that take several layers at once.
    pub fn projection(&self) -> Projection<'_> {
        Projection { weight: &self.weight, bias: self.bias.as_ref() }
    }

    /// The weight alone.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Its number among the layers of the model that adapters can change.
    pub(super) fn number(&self) -> Option<usize> {
        self.number
    }
}

/// Applies several layers to one input: they share the reading of it.
pub fn project<const N: usize>(
    pass: &Pass<'_>,
    input: &Tensor,
    mut layers: [(&Linear, &mut Tensor); N],
) -> Result<(), OpError> {
    let products = layers.each_mut().map(|(layer, out)| Product {
        weight: &layer.weight,
        bias: layer.bias.as_ref(),
        out,
    });
    pass.device.linear(input, products)?;
    for (layer, out) in layers {
        pass.add_adapters(layer, input, out)?;
    }
    Ok(())
}
