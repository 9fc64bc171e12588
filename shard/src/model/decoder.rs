//! The decoder that families share, and the spec that says how they differ.

use kernels::OpError;

use super::{LoadError, Model, ModelShape, StepInput, input};
use crate::backend::{Device, Tensor};
use crate::cache::PagedKv;
use crate::layers::{
    Attention, AttentionBuffers, AttentionIo, AttentionSpec, AttentionStep, Embedding, Linear, LinearSpec,
    Mlp, MlpBuffers, MlpSpec, Norm, Rope, RopeSpec,
};
use crate::weights::WeightPath;

/// What a family's decoder is made of. A family builds one from its configuration.
#[derive(Clone, Debug)]
pub struct DecoderSpec {
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Added to the mean of squares in norms.
    pub norm_eps: f32,
    /// Each layer's attention.
    pub attention: AttentionSpec,
    /// Positions.
    pub rope: RopeSpec,
    /// Each layer's MLP.
    pub mlp: MlpSpec,
    /// From hidden states to logits.
    pub head: Head,
}

/// Where the output head's weight comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// It is the embedding's; a `lm_head.weight` in the checkpoint is left alone.
    Tied,
    /// `lm_head.weight`.
    Own,
}

/// A decoder with its weights, and the buffers of its steps.
pub struct Decoder {
    device: Device,
    shape: ModelShape,
    embedding: Embedding,
    rope: Rope,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    workspace: Workspace,
}

/// `x += attention(norm(x)); x += mlp(norm(x))`
struct Layer {
    attention_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    mlp: Mlp,
}

/// Activations. They grow to the largest step seen and are used again by every later one.
struct Workspace {
    /// `[T, hidden]`, what the layers add to.
    residual: Tensor,
    /// `[T, hidden]`, input of an attention or an MLP.
    normed: Tensor,
    /// `[T, hidden]`, its output, not added yet: the addition is one pass with the next norm.
    delta: Tensor,
    attention: AttentionBuffers,
    mlp: MlpBuffers,
    /// `[R, hidden]`, the rows of `residual`, `delta` and `normed` whose logits are wanted.
    residual_last: Tensor,
    delta_last: Tensor,
    normed_last: Tensor,
    /// `[R, vocabulary]`
    logits: Tensor,
}

impl Decoder {
    /// Takes the weights from their usual names below `weights`: `model.embed_tokens`, `model.layers.{i}`, `model.norm`,
    /// `lm_head`.
    pub fn load(spec: DecoderSpec, weights: &WeightPath<'_>, device: Device) -> Result<Self, LoadError> {
        let model = weights.at("model");
        let DecoderSpec { vocabulary, hidden, norm_eps, .. } = spec;
        let embedding = Embedding::load(&model.at("embed_tokens"), vocabulary, hidden)?;
        let layers = model.at("layers");
        Ok(Self {
            shape: shape(&spec, &embedding),
            layers: (0..spec.layers)
                .map(|index| Layer::load(&layers.at(index), &device, &spec))
                .collect::<Result<_, _>>()?,
            norm: Norm::load(&model.at("norm"), &device, hidden, norm_eps)?,
            head: match spec.head {
                Head::Tied => embedding.tied_head(),
                Head::Own => {
                    let head = LinearSpec { inputs: hidden, outputs: vocabulary, bias: false };
                    Linear::load(&weights.at("lm_head"), &device, head)?
                }
            },
            workspace: Workspace::new(&device, &spec)?,
            // Behind the layers, whose weights prove the sizes that the configuration claims.
            rope: Rope::new(&device, spec.rope)?,
            embedding,
            device,
        })
    }

    /// Embedding and layers. Leaves the last layer's output in `residual` and `delta`, not added yet.
    fn run_layers(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<(), OpError> {
        let Self { device, layers, workspace, .. } = self;
        let Workspace { residual, normed, delta, attention, mlp, .. } = workspace;
        let step = AttentionStep {
            angles: self.rope.angles(),
            positions: input.positions,
            slots: input.slots,
            sequences: input.sequences,
        };
        self.embedding.forward(device, input.ids, residual)?;
        for (index, layer) in layers.iter().enumerate() {
            match index {
                0 => layer.attention_norm.forward(device, residual, normed)?,
                _ => layer.attention_norm.add_forward(device, residual, delta, normed)?,
            }
            let cache = cache.layer_mut(index)?;
            let io = AttentionIo { input: normed, cache, buffers: attention, out: delta };
            layer.attention.forward(device, step, io)?;
            layer.mlp_norm.add_forward(device, residual, delta, normed)?;
            layer.mlp.forward(device, normed, mlp, delta)?;
        }
        Ok(())
    }

    /// Final norm and head, for the rows whose logits are wanted: most rows of a prompt have no use for them.
    fn run_head(&mut self, rows: &[u32]) -> Result<(), OpError> {
        let Self { device, workspace, .. } = self;
        let Workspace { residual, delta, residual_last, delta_last, normed_last, logits, .. } = workspace;
        device.select_rows(residual, rows, residual_last)?;
        device.select_rows(delta, rows, delta_last)?;
        self.norm.add_forward(device, residual_last, delta_last, normed_last)?;
        self.head.forward(device, normed_last, logits)
    }
}

impl Model for Decoder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn reserve(&mut self, tokens: usize, logits: usize) -> Result<(), OpError> {
        self.workspace.set_rows(tokens, logits)
    }

    fn forward(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<&Tensor, OpError> {
        input::check(input, &self.shape, cache)?;
        self.rope.cover(input.positions)?;
        self.workspace.set_rows(input.ids.len(), input.logits_at.len())?;
        let device = self.device.clone();
        device.run(|| {
            if !input.ids.is_empty() {
                self.run_layers(input, cache)?;
            }
            if !input.logits_at.is_empty() {
                self.run_head(input.logits_at)?;
            }
            Ok(())
        })?;
        Ok(&self.workspace.logits)
    }
}

fn shape(spec: &DecoderSpec, embedding: &Embedding) -> ModelShape {
    ModelShape {
        vocabulary: spec.vocabulary,
        layers: spec.layers,
        kv_heads: spec.attention.heads.kv_heads,
        head_dim: spec.attention.heads.head_dim,
        positions_max: spec.rope.positions_max,
        dtype: embedding.dtype(),
    }
}

impl Layer {
    fn load(path: &WeightPath<'_>, device: &Device, spec: &DecoderSpec) -> Result<Self, LoadError> {
        let norm = |name| Norm::load(&path.at(name), device, spec.hidden, spec.norm_eps);
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::load(&path.at("self_attn"), device, &spec.attention)?,
            mlp_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(&path.at("mlp"), device, spec.mlp)?,
        })
    }
}

impl Workspace {
    fn new(device: &Device, spec: &DecoderSpec) -> Result<Self, OpError> {
        let hidden = || device.zeros(0, spec.hidden);
        Ok(Self {
            residual: hidden()?,
            normed: hidden()?,
            delta: hidden()?,
            attention: AttentionBuffers::new(device, &spec.attention)?,
            mlp: MlpBuffers::new(device, spec.mlp)?,
            residual_last: hidden()?,
            delta_last: hidden()?,
            normed_last: hidden()?,
            logits: device.zeros(0, spec.vocabulary)?,
        })
    }

    /// Makes room for a step of `tokens` tokens, of which `selected` are wanted as logits.
    fn set_rows(&mut self, tokens: usize, selected: usize) -> Result<(), OpError> {
        for tensor in [&mut self.residual, &mut self.normed, &mut self.delta] {
            tensor.set_rows(tokens)?;
        }
        self.attention.set_rows(tokens)?;
        self.mlp.set_rows(tokens)?;
        for tensor in [&mut self.residual_last, &mut self.delta_last, &mut self.normed_last, &mut self.logits]
        {
            tensor.set_rows(selected)?;
        }
        Ok(())
    }
}
