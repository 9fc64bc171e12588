use kernels::{Gating, Groups, Normalize, OpError, Score};

use super::{LayerError, Linear, Mlp, MlpBuffers, MlpSpec, Pass};
use crate::backend::{
    Device, Expert, ExpertScratch, ExpertSet, Experts, Projection, Routes, Routing, Tensor,
};
use crate::weights::{Partition, Region, Rows, Stack, WeightPath};

/// Sizes of a mixture of experts over all ranks, and what it is made of. Source: Shazeer et al. 2017.
#[derive(Clone, Debug)]
pub struct MoeSpec {
    /// Elements of an input and an output row.
    pub hidden: usize,
    /// Elements inside an expert.
    pub intermediate: usize,
    /// Number of experts.
    pub experts: usize,
    /// Name of the projection to the experts' scores.
    pub router: &'static str,
    /// Whether that has a bias.
    pub router_bias: bool,
    /// From scores to experts.
    pub routing: RoutingSpec,
    /// How the experts are stored.
    pub names: ExpertNames,
    /// Whether their projections have biases.
    pub bias: bool,
    /// What happens inside of them.
    pub gating: Gating,
    /// What every token goes to as well.
    pub shared: Option<SharedExpert>,
}

/// From scores to experts and their weights.
#[derive(Clone, Copy, Debug)]
pub struct RoutingSpec {
    /// Experts per token.
    pub chosen: usize,
    /// How scores become probabilities.
    pub score: Score,
    /// Groups of experts, of which only the best are looked into.
    pub groups: Option<Groups>,
    /// Name of what is added to the probabilities for choosing, and for choosing only.
    pub correction: Option<&'static str>,
    /// What the chosen experts' weights are divided by.
    pub normalize: Normalize,
    /// Multiplies the weights.
    pub scale: f32,
}

/// How experts are stored.
#[derive(Clone, Copy, Debug)]
pub enum ExpertNames {
    /// Each expert's three weights on their own, as `{experts}.{index}.{name}.weight`.
    Separate {
        /// Name of the list.
        experts: &'static str,
        /// Into the gate.
        gate: &'static str,
        /// Into what is gated.
        up: &'static str,
        /// Out.
        down: &'static str,
    },
    /// All experts' gates and what they multiply in one tensor `[experts, 2 * intermediate, hidden]`, all ways out in another.
    Fused {
        /// The first tensor.
        gate_up: &'static str,
        /// The second.
        down: &'static str,
        /// Whether both are stored the other way around.
        transposed: bool,
        /// Whether a gate's row is followed by that of what it multiplies, rather than all gates coming first.
        interleaved: bool,
    },
    /// Three tensors `[experts * intermediate, hidden]`; the ways out lie transposed.
    Flat {
        /// Into the gate.
        gate: &'static str,
        /// Into what is gated.
        up: &'static str,
        /// Out.
        down: &'static str,
    },
}

/// An MLP beside the experts.
#[derive(Clone, Debug)]
pub struct SharedExpert {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub mlp: MlpSpec,
    /// Name of the projection to the scalar by whose sigmoid it is multiplied.
    pub gate: Option<&'static str>,
}

/// A mixture of experts with its weights.
#[derive(Debug)]
pub struct Moe {
    router: Linear,
    routing: RoutingSpec,
    correction: Option<Tensor>,
    experts: ExpertSet,
    gating: Gating,
    shared: Option<Shared>,
}

#[derive(Debug)]
struct Shared {
    mlp: Mlp,
    gate: Option<Linear>,
}

/// What a [`Moe`] keeps between its steps. Layers run one after the other, so one set serves them all.
#[derive(Debug)]
pub struct MoeBuffers {
    scores: Tensor,
    routes: Routes,
    scratch: ExpertScratch,
    shared: Option<SharedBuffers>,
}

#[derive(Debug)]
struct SharedBuffers {
    mlp: MlpBuffers,
    gate: Tensor,
    out: Tensor,
}

impl Moe {
    /// Takes the router, and this rank's part of every expert, from `path`: each is split along its inside.
    pub fn load(path: &WeightPath<'_>, device: &Device, spec: &MoeSpec) -> Result<Self, LayerError> {
        let router = Region::all(spec.experts, spec.hidden);
        let correction = match spec.routing.correction {
            Some(name) => Some(device.upload(path.at(name).vector(spec.experts)?, spec.experts)?),
            None => None,
        };
        let shared = |shared: &SharedExpert| -> Result<Shared, LayerError> {
            let gate = Region::all(1, spec.hidden);
            Ok(Shared {
                mlp: Mlp::load(&path.at(shared.name), device, &shared.mlp)?,
                gate: match shared.gate {
                    Some(name) => Some(Linear::load(&path.at(name), device, &gate, false)?),
                    None => None,
                },
            })
        };
        let experts = (0..spec.experts)
            .map(|index| load_expert(path, device, spec, index))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            router: Linear::load(&path.at(spec.router), device, &router, spec.router_bias)?,
            routing: spec.routing,
            correction,
            experts: device.expert_set(experts)?,
            gating: spec.gating,
            shared: spec.shared.as_ref().map(shared).transpose()?,
        })
    }

    /// `input`, `out`: `[T, hidden]`, and buffers of as many rows. Where there are several ranks, `out` is this one's part of
    /// the sum.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        input: &Tensor,
        buffers: &mut MoeBuffers,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        let MoeBuffers { scores, routes, scratch, shared } = buffers;
        self.router.forward(pass, input, scores)?;
        let RoutingSpec { chosen, score, groups, normalize, scale, .. } = self.routing;
        let routing = Routing {
            experts: self.experts.len(),
            chosen,
            score,
            groups,
            correction: self.correction.as_ref(),
            normalize,
            scale,
        };
        pass.device.route(scores, &routing, routes)?;
        let (experts, gating) = (&self.experts, self.gating);
        pass.device.experts(Experts { input, routes, experts, gating, scratch, out: &mut *out })?;
        if let (Some(layers), Some(buffers)) = (&self.shared, shared) {
            layers.mlp.forward(pass, input, &mut buffers.mlp, &mut buffers.out)?;
            if let Some(gate) = &layers.gate {
                gate.forward(pass, input, &mut buffers.gate)?;
                pass.device.scale_rows(&mut buffers.out, &buffers.gate)?;
            }
            pass.device.add(out, &buffers.out)?;
        }
        Ok(())
    }
}

fn load_expert(
    path: &WeightPath<'_>,
    device: &Device,
    spec: &MoeSpec,
    index: usize,
) -> Result<Expert, LayerError> {
    let MoeSpec { hidden, intermediate, experts, bias, .. } = *spec;
    let part = path.partition().even(intermediate);
    let rows = Rows::range(part.clone());
    let into = Region::all(intermediate, hidden).with_rows(rows);
    let out = Region::all(hidden, intermediate).with_cols(part.clone());
    match spec.names {
        ExpertNames::Separate { experts, gate, up, down } => {
            let expert = path.at(experts).at(index);
            let linear = |name, region| {
                Ok::<_, LayerError>(Linear::load(&expert.at(name), device, region, bias)?.into_projection())
            };
            Ok(Expert { gate: linear(gate, &into)?, up: linear(up, &into)?, down: linear(down, &out)? })
        }
        ExpertNames::Fused { gate_up, down, transposed, interleaved } => {
            let stack = Some(Stack { index, count: experts });
            let halves = |second: usize| match interleaved {
                true => Rows::strided(second, 1, intermediate, 2).slice(part.clone()),
                false => Rows::range(second * intermediate + part.start..second * intermediate + part.end),
            };
            let both = |second| {
                Region { stack, ..Region::all(2 * intermediate, hidden) }
                    .with_rows(halves(second))
                    .transposed(transposed)
            };
            let out = Region { stack, ..out }.transposed(transposed);
            let linear = |name, region: Region| unnamed(path, name, device, &region, bias);
            Ok(Expert {
                gate: linear(gate_up, both(0))?,
                up: linear(gate_up, both(1))?,
                down: linear(down, out)?,
            })
        }
        ExpertNames::Flat { gate, up, down } => {
            let stack = Some(Stack { index, count: experts });
            let into = Region { stack, ..into };
            let out = Region { stack, ..out }.transposed(true);
            let linear = |name, region: &Region| unnamed(path, name, device, region, bias);
            Ok(Expert { gate: linear(gate, &into)?, up: linear(up, &into)?, down: linear(down, &out)? })
        }
    }
}

/// One of several layers in a tensor whose name is `name` alone; the biases' has `_bias` behind it.
fn unnamed(
    path: &WeightPath<'_>,
    name: &str,
    device: &Device,
    region: &Region,
    bias: bool,
) -> Result<Projection, LayerError> {
    let bias = bias.then(|| path.at(format!("{name}_bias")));
    Ok(Linear::load_unnumbered(&path.at(name), bias, device, region)?.into_projection())
}

impl MoeBuffers {
    /// Empty buffers for mixtures of these sizes.
    pub fn new(device: &Device, spec: &MoeSpec, partition: Partition) -> Result<Self, OpError> {
        let shared = |shared: &SharedExpert| -> Result<SharedBuffers, OpError> {
            Ok(SharedBuffers {
                mlp: MlpBuffers::new(device, &shared.mlp, partition)?,
                gate: device.zeros(0, 1)?,
                out: device.zeros(0, spec.hidden)?,
            })
        };
        Ok(Self {
            scores: device.zeros_f32(0, spec.experts)?,
            routes: device.routes()?,
            scratch: device.expert_scratch()?,
            shared: spec.shared.as_ref().map(shared).transpose()?,
        })
    }

    /// Makes room for `rows` tokens.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        self.scores.set_rows(rows)?;
        if let Some(shared) = &mut self.shared {
            shared.mlp.set_rows(rows)?;
            shared.gate.set_rows(rows)?;
            shared.out.set_rows(rows)?;
        }
        Ok(())
    }
}
