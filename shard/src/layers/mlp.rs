use kernels::OpError;

use super::{LayerError, Linear, LinearSpec};
use crate::backend::{Device, Tensor};
use crate::weights::WeightPath;

/// Sizes of a gated MLP.
#[derive(Clone, Copy, Debug)]
pub struct MlpSpec {
    /// Elements of an input and an output row.
    pub hidden: usize,
    /// Elements between the projections.
    pub intermediate: usize,
    /// Whether the three projections have biases.
    pub bias: bool,
}

/// SwiGLU: `down(silu(gate(x)) * up(x))`. Source: Shazeer 2020, "GLU Variants Improve Transformer".
#[derive(Debug)]
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What an [`Mlp`] keeps between its steps. Layers run one after the other, so one set serves them all.
#[derive(Debug)]
pub struct MlpBuffers {
    gate: Tensor,
    up: Tensor,
}

impl Mlp {
    /// Takes `gate_proj`, `up_proj` and `down_proj` from `path`.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: MlpSpec) -> Result<Self, LayerError> {
        let MlpSpec { hidden, intermediate, bias } = spec;
        let widen = LinearSpec { inputs: hidden, outputs: intermediate, bias };
        let narrow = LinearSpec { inputs: intermediate, outputs: hidden, bias };
        Ok(Self {
            gate: Linear::load(&path.at("gate_proj"), device, widen)?,
            up: Linear::load(&path.at("up_proj"), device, widen)?,
            down: Linear::load(&path.at("down_proj"), device, narrow)?,
        })
    }

    /// `input`, `out`: `[T, hidden]`, and buffers of as many rows.
    pub fn forward(
        &self,
        device: &Device,
        input: &Tensor,
        buffers: &mut MlpBuffers,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        let MlpBuffers { gate, up } = buffers;
        device.linear(input, [self.gate.product(gate), self.up.product(up)])?;
        device.gated_silu(gate, up)?;
        self.down.forward(device, gate, out)
    }
}

impl MlpBuffers {
    /// Empty buffers for MLPs of these sizes.
    pub fn new(device: &Device, spec: MlpSpec) -> Result<Self, OpError> {
        Ok(Self { gate: device.zeros(0, spec.intermediate)?, up: device.zeros(0, spec.intermediate)? })
    }

    /// Makes room for `rows` tokens.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        self.gate.set_rows(rows)?;
        self.up.set_rows(rows)
    }
}
