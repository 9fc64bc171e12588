//! One layer of a decoder: attention and MLP, in the order and between the norms that its block says.

use kernels::OpError;

use super::LoadError;
use super::spec::{AttentionKind, Block, DecoderSpec, LayerSpec, MlpKind};
use crate::backend::{Device, Tensor};
use crate::cache::LayerKv;
use crate::layers::{
    Attention, AttentionBuffers, AttentionIo, AttentionStep, LatentAttention, LatentBuffers, Mlp, MlpBuffers,
    Moe, MoeBuffers, Norm, Pass,
};
use crate::weights::{Partition, WeightPath};

/// A layer with its weights.
pub(super) struct Layer {
    order: Order,
    attention: AttentionLayer,
    mlp: MlpLayer,
    residual_scale: Option<f32>,
}

/// A [`Block`] with its norms.
enum Order {
    Sequential { attention: Box<Around>, mlp: Box<Around> },
    Parallel { attention: Norm, mlp: Option<Norm> },
    Normed { attention: Norm, mlp: Norm },
    Behind { attention: Norm, mlp: Norm },
}

/// The norms before and behind a part.
struct Around {
    before: Option<Norm>,
    after: Option<Norm>,
}

enum AttentionLayer {
    Heads(Box<Attention>),
    Latent(Box<LatentAttention>),
}

enum MlpLayer {
    Dense(Box<Mlp>),
    Experts(Box<Moe>),
}

/// The hidden states on their way through the layers.
pub(super) struct Stream {
    /// `[T, hidden]`, what the layers add to: f32, so that it loses nothing to rounding however many add to it.
    pub(super) residual: Tensor,
    /// `[T, hidden]`, input of an attention or an MLP.
    pub(super) normed: Tensor,
    /// `[T, hidden]`, what the last part adds.
    pub(super) delta: Tensor,
    /// Whether `delta` is not added yet: the addition is one pass with the next norm.
    pub(super) pending: bool,
    /// `[T, hidden]`, for a second input or a second output.
    second: Tensor,
}

/// What the parts of a layer keep between steps.
pub(super) struct LayerBuffers {
    attention: Option<AttentionBuffers>,
    latent: Option<LatentBuffers>,
    mlp: Option<MlpBuffers>,
    moe: Option<MoeBuffers>,
}

impl Layer {
    pub(super) fn load(
        path: &WeightPath<'_>,
        device: &Device,
        model: &DecoderSpec,
        spec: &LayerSpec,
    ) -> Result<Self, LoadError> {
        let attention_path = path.at(spec.attention_name);
        let mlp_path = path.at(spec.mlp_name);
        Ok(Self {
            order: Order::load(path, device, model, spec.block)?,
            attention: match &spec.attention {
                AttentionKind::Heads(spec) => {
                    AttentionLayer::Heads(Box::new(Attention::load(&attention_path, device, spec)?))
                }
                AttentionKind::Latent(spec) => {
                    AttentionLayer::Latent(Box::new(LatentAttention::load(&attention_path, device, spec)?))
                }
            },
            mlp: match &spec.mlp {
                MlpKind::Dense(spec) => MlpLayer::Dense(Box::new(Mlp::load(&mlp_path, device, spec)?)),
                MlpKind::Experts(spec) => MlpLayer::Experts(Box::new(Moe::load(&mlp_path, device, spec)?)),
            },
            residual_scale: model.residual_scale,
        })
    }

    /// Runs the layer. What it adds last may be left in the stream's `delta`.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        step: AttentionStep<'_>,
        cache: &mut LayerKv,
        stream: &mut Stream,
        buffers: &mut LayerBuffers,
    ) -> Result<(), OpError> {
        let mut part = Part { pass, step, cache, buffers };
        match &self.order {
            Order::Sequential { attention, mlp } => {
                stream.enter(pass, attention.before.as_ref())?;
                self.attend(&mut part, stream.parts(pass, attention.before.is_some())?)?;
                self.leave(pass, stream, attention.after.as_ref())?;
                stream.enter(pass, mlp.before.as_ref())?;
                self.transform(&mut part, stream.parts(pass, mlp.before.is_some())?)?;
                self.leave(pass, stream, mlp.after.as_ref())
            }
            Order::Parallel { attention, mlp } => self.parallel(&mut part, stream, attention, mlp.as_ref()),
            Order::Normed { attention, mlp } => {
                stream.enter(pass, Some(attention))?;
                self.attend(&mut part, stream.parts(pass, true)?)?;
                stream.continue_from_normed(pass)?;
                self.leave(pass, stream, None)?;
                stream.enter(pass, Some(mlp))?;
                self.transform(&mut part, stream.parts(pass, true)?)?;
                stream.continue_from_normed(pass)?;
                self.leave(pass, stream, None)
            }
            Order::Behind { attention, mlp } => {
                stream.enter(pass, None)?;
                self.attend(&mut part, stream.parts(pass, false)?)?;
                self.leave(pass, stream, None)?;
                stream.enter(pass, Some(attention))?;
                stream.continue_from_normed(pass)?;
                self.transform(&mut part, stream.parts(pass, false)?)?;
                self.leave(pass, stream, None)?;
                stream.enter(pass, Some(mlp))?;
                stream.continue_from_normed(pass)
            }
        }
    }

    /// Both parts from the same hidden states; ranks add up both results at once.
    fn parallel(
        &self,
        part: &mut Part<'_>,
        stream: &mut Stream,
        attention: &Norm,
        mlp: Option<&Norm>,
    ) -> Result<(), OpError> {
        let pass = part.pass;
        stream.enter(pass, Some(attention))?;
        self.attend(part, stream.parts(pass, true)?)?;
        if let Some(norm) = mlp {
            norm.forward(pass, &stream.residual, &mut stream.normed)?;
        }
        let Stream { normed, second, .. } = stream;
        self.transform(part, (normed, second))?;
        pass.device.add(&mut stream.delta, &stream.second)?;
        self.leave(pass, stream, None)
    }

    fn attend(&self, part: &mut Part<'_>, (input, out): (&Tensor, &mut Tensor)) -> Result<(), OpError> {
        let cache = &mut *part.cache;
        match (&self.attention, &mut part.buffers.attention, &mut part.buffers.latent) {
            (AttentionLayer::Heads(layer), Some(buffers), _) => {
                layer.forward(part.pass, part.step, AttentionIo { input, cache, buffers, out })
            }
            (AttentionLayer::Latent(layer), _, Some(buffers)) => {
                layer.forward(part.pass, part.step, AttentionIo { input, cache, buffers, out })
            }
            _ => unreachable!("buffers are made for the kinds of layers that there are"),
        }
    }

    fn transform(&self, part: &mut Part<'_>, (input, out): (&Tensor, &mut Tensor)) -> Result<(), OpError> {
        match (&self.mlp, &mut part.buffers.mlp, &mut part.buffers.moe) {
            (MlpLayer::Dense(layer), Some(buffers), _) => layer.forward(part.pass, input, buffers, out),
            (MlpLayer::Experts(layer), _, Some(buffers)) => layer.forward(part.pass, input, buffers, out),
            _ => unreachable!("buffers are made for the kinds of layers that there are"),
        }
    }

    /// What a part adds: summed over all ranks, normalized, scaled, and left to be added.
    fn leave(&self, pass: &Pass<'_>, stream: &mut Stream, after: Option<&Norm>) -> Result<(), OpError> {
        pass.ranks.all_reduce(&mut stream.delta)?;
        if let Some(norm) = after {
            norm.forward_in_place(pass, &mut stream.delta)?;
        }
        if let Some(scale) = self.residual_scale {
            pass.device.scale(&mut stream.delta, scale)?;
        }
        stream.pending = true;
        Ok(())
    }
}

/// What a part of a layer runs with.
struct Part<'a> {
    pass: &'a Pass<'a>,
    step: AttentionStep<'a>,
    cache: &'a mut LayerKv,
    buffers: &'a mut LayerBuffers,
}

impl Order {
    fn load(
        path: &WeightPath<'_>,
        device: &Device,
        model: &DecoderSpec,
        block: Block,
    ) -> Result<Self, LoadError> {
        let norm = |name| Norm::load(&path.at(name), device, model.hidden, model.norm);
        let maybe = |name: Option<&'static str>| name.map(norm).transpose();
        Ok(match block {
            Block::Sequential { before_attention, after_attention, before_mlp, after_mlp } => {
                Self::Sequential {
                    attention: Box::new(Around {
                        before: maybe(before_attention)?,
                        after: maybe(after_attention)?,
                    }),
                    mlp: Box::new(Around { before: maybe(before_mlp)?, after: maybe(after_mlp)? }),
                }
            }
            Block::Parallel { attention, mlp } => {
                Self::Parallel { attention: norm(attention)?, mlp: maybe(mlp)? }
            }
            Block::Normed { attention, mlp } => Self::Normed { attention: norm(attention)?, mlp: norm(mlp)? },
            Block::Behind { attention, mlp } => Self::Behind { attention: norm(attention)?, mlp: norm(mlp)? },
        })
    }
}

impl Stream {
    pub(super) fn new(device: &Device, hidden: usize) -> Result<Self, OpError> {
        let tensor = || device.zeros(0, hidden);
        Ok(Self {
            residual: device.zeros_stream(0, hidden)?,
            normed: tensor()?,
            delta: tensor()?,
            pending: false,
            second: tensor()?,
        })
    }

    pub(super) fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        let Self { residual, normed, delta, second, .. } = self;
        [residual, normed, delta, second].into_iter().try_for_each(|tensor| tensor.set_rows(rows))
    }

    /// Adds what is pending, and normalizes into `normed` if there is a norm.
    fn enter(&mut self, pass: &Pass<'_>, norm: Option<&Norm>) -> Result<(), OpError> {
        let Self { residual, normed, delta, pending, .. } = self;
        match (norm, std::mem::take(pending)) {
            (Some(norm), true) => norm.add_forward(pass, residual, delta, normed),
            (Some(norm), false) => norm.forward(pass, residual, normed),
            (None, true) => pass.device.add(residual, delta),
            (None, false) => Ok(()),
        }
    }

    /// Input and output of a part.
    fn parts(&mut self, pass: &Pass<'_>, normed: bool) -> Result<(&Tensor, &mut Tensor), OpError> {
        let input = match normed {
            true => &self.normed,
            false => pass.device.from_stream(&self.residual, &mut self.normed)?,
        };
        Ok((input, &mut self.delta))
    }

    /// From here on it is the normalized states that are added to.
    fn continue_from_normed(&mut self, pass: &Pass<'_>) -> Result<(), OpError> {
        pass.device.enter_stream(&mut self.normed, &mut self.residual)
    }
}

impl LayerBuffers {
    /// One set for all layers: those of a kind have the same sizes, and run one after the other.
    pub(super) fn new(device: &Device, spec: &DecoderSpec, partition: Partition) -> Result<Self, OpError> {
        let mut buffers = Self { attention: None, latent: None, mlp: None, moe: None };
        for layer in &spec.layers {
            match &layer.attention {
                AttentionKind::Heads(spec) if buffers.attention.is_none() => {
                    buffers.attention = Some(AttentionBuffers::new(device, spec, partition)?);
                }
                AttentionKind::Latent(spec) if buffers.latent.is_none() => {
                    buffers.latent = Some(LatentBuffers::new(device, spec, partition)?);
                }
                _ => {}
            }
            match &layer.mlp {
                MlpKind::Dense(spec) if buffers.mlp.is_none() => {
                    buffers.mlp = Some(MlpBuffers::new(device, spec, partition)?);
                }
                MlpKind::Experts(spec) if buffers.moe.is_none() => {
                    buffers.moe = Some(MoeBuffers::new(device, spec, partition)?);
                }
                _ => {}
            }
        }
        Ok(buffers)
    }

    pub(super) fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        self.attention.iter_mut().try_for_each(|buffers| buffers.set_rows(rows))?;
        self.latent.iter_mut().try_for_each(|buffers| buffers.set_rows(rows))?;
        self.mlp.iter_mut().try_for_each(|buffers| buffers.set_rows(rows))?;
        self.moe.iter_mut().try_for_each(|buffers| buffers.set_rows(rows))
    }
}
