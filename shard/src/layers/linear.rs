use kernels::OpError;

use super::{LayerError, Pass};
use crate::backend::{Device, Matrix, Product, Projection, Tensor};
use crate::weights::{Region, WeightPath};

/// `out = input * weight^T + bias`, with the weight as the checkpoint stores it: `[outputs, inputs]`.
#[derive(Debug)]
pub struct Linear {
    projection: Projection,
    /// Where an adapter has what it adds to this layer.
    number: Option<usize>,
}

impl Linear {
    /// Takes the region of `weight` that belongs to this rank, and `bias` if there is one, from `path`.
    pub fn load(
        path: &WeightPath<'_>,
        device: &Device,
        region: &Region,
        bias: bool,
    ) -> Result<Self, LayerError> {
        let bias = own_bias(bias.then(|| path.at("bias")), region)?;
        let weight = device.place(path.at("weight").matrix(region)?)?;
        let number = path.register(region, bias.clone());
        let projection = Projection { weight, bias: upload(device, bias)? };
        Ok(Self { projection, number: Some(number) })
    }

    /// A layer that no adapter changes, from tensors of any name.
    pub fn load_unnumbered(
        weight: &WeightPath<'_>,
        bias: Option<WeightPath<'_>>,
        device: &Device,
        region: &Region,
    ) -> Result<Self, LayerError> {
        let bias = own_bias(bias, region)?;
        Ok(Self::from_parts(device.place(weight.matrix(region)?)?, upload(device, bias)?))
    }

    /// A layer that no adapter changes.
    pub fn from_parts(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self { projection: Projection { weight, bias }, number: None }
    }

    /// Applies the layer; `input`: `[T, inputs]`, `out`: `[T, outputs]`.
    pub fn forward(&self, pass: &Pass<'_>, input: &Tensor, out: &mut Tensor) -> Result<(), OpError> {
        project(pass, input, [(self, out)])
    }

    /// The weight and its bias, for operations that take several layers at once.
    pub fn into_projection(self) -> Projection {
        self.projection
    }

    /// Its number among the layers of the model that adapters can change.
    pub(super) fn number(&self) -> Option<usize> {
        self.number
    }
}

/// This rank's bias. Where ranks have different inputs, their outputs are summed: then only the first of them has it.
fn own_bias(path: Option<WeightPath<'_>>, region: &Region) -> Result<Option<Vec<f32>>, LayerError> {
    let summed = region.cols.len() < region.whole[1];
    let own = path.filter(|path| !(summed && path.partition().rank > 0));
    Ok(own.map(|path| path.bias(region)).transpose()?)
}

fn upload(device: &Device, bias: Option<Vec<f32>>) -> Result<Option<Tensor>, LayerError> {
    let upload = |bias: Vec<f32>| {
        let width = bias.len();
        device.upload(bias, width)
    };
    Ok(bias.map(upload).transpose()?)
}

/// Applies several layers to one input: they share the reading of it.
pub fn project<const N: usize>(
    pass: &Pass<'_>,
    input: &Tensor,
    mut layers: [(&Linear, &mut Tensor); N],
) -> Result<(), OpError> {
    let products = layers.each_mut().map(|(layer, out)| Product {
        weight: &layer.projection.weight,
        bias: layer.projection.bias.as_ref(),
        out,
    });
    pass.device.linear(input, products)?;
    for (layer, out) in layers {
        pass.add_adapters(layer, input, out)?;
    }
    Ok(())
}
