use kernels::{Activation, Gating, OpError};

use super::{LayerError, Linear, Pass, project};
use crate::backend::{Device, Tensor};
use crate::weights::{Partition, Region, Rows, WeightPath};

/// Sizes of an MLP over all ranks, and what it is made of.
#[derive(Clone, Debug)]
pub struct MlpSpec {
    /// Elements of an input and an output row.
    pub hidden: usize,
    /// Elements between the projections.
    pub intermediate: usize,
    /// Gated or not.
    pub form: MlpForm,
    /// Name of the projection back.
    pub down: &'static str,
    /// Whether the projections have biases.
    pub bias: bool,
    /// Whether weights are stored the other way around, `[inputs, outputs]`.
    pub transposed: bool,
}

/// What happens between the projections.
#[derive(Clone, Copy, Debug)]
pub enum MlpForm {
    /// `down(gating(gate(x)) * up(x))`. Source: Shazeer 2020, "GLU Variants Improve Transformer".
    Gated(GatedNames, Gating),
    /// `down(activation(up(x)))`
    Plain(&'static str, Activation),
}

/// How the projections of a gated MLP are stored.
#[derive(Clone, Copy, Debug)]
pub enum GatedNames {
    /// Each on its own.
    Separate {
        /// What goes through the gating.
        gate: &'static str,
        /// What is multiplied by it.
        up: &'static str,
    },
    /// All of the gate, then all of what it multiplies.
    Stacked(&'static str),
}

/// An MLP with its weights.
#[derive(Debug)]
pub struct Mlp {
    into: Into,
    down: Linear,
}

#[derive(Debug)]
enum Into {
    Gated { gate: Linear, up: Linear, gating: Gating },
    Plain { up: Linear, activation: Activation },
}

/// What an [`Mlp`] keeps between its steps. Layers run one after the other, so one set serves them all.
#[derive(Debug)]
pub struct MlpBuffers {
    gate: Tensor,
    up: Tensor,
}

impl Mlp {
    /// Takes this rank's part of the projections from `path`.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: &MlpSpec) -> Result<Self, LayerError> {
        let MlpSpec { hidden, intermediate, bias, transposed, .. } = *spec;
        let part = path.partition().even(intermediate);
        let linear = |name: &str, region: Region| {
            Linear::load(&path.at(name), device, &region.transposed(transposed), bias)
        };
        let widen = |name, first, whole| {
            let rows = Rows::range(first + part.start..first + part.end);
            linear(name, Region::all(whole, hidden).with_rows(rows))
        };
        let into = match spec.form {
            MlpForm::Gated(GatedNames::Separate { gate, up }, gating) => {
                Into::Gated { gate: widen(gate, 0, intermediate)?, up: widen(up, 0, intermediate)?, gating }
            }
            MlpForm::Gated(GatedNames::Stacked(name), gating) => Into::Gated {
                gate: widen(name, 0, 2 * intermediate)?,
                up: widen(name, intermediate, 2 * intermediate)?,
                gating,
            },
            MlpForm::Plain(name, activation) => Into::Plain { up: widen(name, 0, intermediate)?, activation },
        };
        let down = linear(spec.down, Region::all(hidden, intermediate).with_cols(part.clone()))?;
        Ok(Self { into, down })
    }

    /// `input`, `out`: `[T, hidden]`, and buffers of as many rows. Where there are several ranks, `out` is this one's part of
    /// the sum.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        input: &Tensor,
        buffers: &mut MlpBuffers,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        let MlpBuffers { gate: between, up: multiplied } = buffers;
        match &self.into {
            Into::Gated { gate, up, gating } => {
                project(pass, input, [(gate, &mut *between), (up, &mut *multiplied)])?;
                pass.device.gated(*gating, between, multiplied)?;
            }
            Into::Plain { up, activation } => {
                up.forward(pass, input, between)?;
                pass.device.activate(*activation, between)?;
            }
        }
        self.down.forward(pass, between, out)
    }
}

impl MlpBuffers {
    /// Empty buffers for MLPs of these sizes.
    pub fn new(device: &Device, spec: &MlpSpec, partition: Partition) -> Result<Self, OpError> {
        let width = partition.even(spec.intermediate).len();
        let gated = matches!(spec.form, MlpForm::Gated(..));
        Ok(Self { gate: device.zeros(0, width)?, up: device.zeros(0, if gated { width } else { 0 })? })
    }

    /// Makes room for `rows` tokens.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        self.gate.set_rows(rows)?;
        self.up.set_rows(rows)
    }
}
