//! The decoder that families share.

use std::sync::Arc;

use kernels::OpError;

use super::layer::{Layer, LayerBuffers, Stream};
use super::spec::{AttentionKind, DecoderSpec, HeadWeight};
use super::{LoadError, Model, ModelShape, StepInput, input};
use crate::adapters::AdapterLayout;
use crate::backend::{Device, Indices, SequenceBuffer, Tensor};
use crate::cache::{KvShape, PagedKv};
use crate::collective::Ranks;
use crate::layers::{AttentionStep, Embedding, Linear, Norm, Pass, Rope, RopeSpec, TokenPlaces};
use crate::weights::{Loader, Partition, Region, Rows, WeightPath};

/// A decoder with this rank's weights, and the buffers of its steps.
pub struct Decoder {
    device: Device,
    ranks: Ranks,
    shape: ModelShape,
    embedding: Embedding,
    ropes: Vec<Rope>,
    layers: Vec<Layer>,
    last_norm: Option<Norm>,
    head: Head,
    workspace: Workspace,
    adapters: Arc<AdapterLayout>,
}

/// From hidden states to logits. Each rank has a block of the vocabulary.
struct Head {
    project: Option<Linear>,
    linear: Linear,
    /// Entries of each rank's block.
    cols: Vec<usize>,
    scale: Option<f32>,
    soft_cap: Option<f32>,
}

/// Activations. They grow to the largest step seen and are used again by every later one.
struct Workspace {
    stream: Stream,
    layers: LayerBuffers,
    /// `[T, embedding width]`, where that is not the width of hidden states.
    embedded: Tensor,
    /// `[R, hidden]`, the rows of the stream whose logits are wanted.
    residual_last: Tensor,
    delta_last: Tensor,
    normed_last: Tensor,
    /// `[R, embedding width]`, where that is not the width of hidden states.
    projected_last: Tensor,
    /// `[R, this rank's block]`, where there are several ranks.
    logits_part: Tensor,
    /// `[R, vocabulary]`
    logits: Tensor,
    step: StepArrays,
}

/// What a step says about its tokens, where the device finds it.
struct StepArrays {
    ids: Indices,
    positions: Indices,
    slots: Indices,
    logits_at: Indices,
    sequences: SequenceBuffer,
}

impl Decoder {
    /// Takes this rank's weights from below `weights`, the root of the checkpoint.
    ///
    /// Errors when a tensor is missing or wrong. That the model can be split over so many ranks has been checked.
    pub fn load(
        spec: &DecoderSpec,
        loader: &Loader,
        device: Device,
        ranks: Ranks,
    ) -> Result<Self, LoadError> {
        let weights = &loader.root();
        let body = body(spec, weights);
        let DecoderSpec { vocabulary, hidden, .. } = *spec;
        let embedding = Embedding::load(&body, &device, vocabulary, hidden, &spec.embedding)?;
        let layers = body.at(spec.layers_name);
        let layers = spec
            .layers
            .iter()
            .enumerate()
            .map(|(index, layer)| Layer::load(&layers.at(index), &device, spec, layer))
            .collect::<Result<_, _>>()?;
        let last_norm = spec.last_norm.map(|name| Norm::load(&body.at(name), &device, hidden, spec.norm));
        // The rotary tables come behind the layers, whose weights prove the sizes that the configuration claims.
        let ropes = spec.ropes.iter().map(|rope| Rope::new(&device, rope.clone()));
        let head = Head::load(spec, weights, &body, &device, &embedding)?;
        let adapters = AdapterLayout {
            device: device.clone(),
            partition: weights.partition(),
            linears: loader.linears(),
            body: body.name().to_owned(),
            bodies: spec.body,
        };
        Ok(Self {
            shape: shape(spec, &embedding, &device, weights.partition()),
            head,
            adapters: Arc::new(adapters),
            workspace: Workspace::new(&device, spec, weights.partition())?,
            ropes: ropes.collect::<Result<_, _>>()?,
            last_norm: last_norm.transpose()?,
            layers,
            embedding,
            ranks,
            device,
        })
    }

    fn run(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<(), OpError> {
        let Self { device, ranks, embedding, ropes, layers, workspace, .. } = self;
        let pass = Pass { device, ranks, adapters: input.adapters };
        let Workspace { stream, layers: buffers, embedded, step: arrays, .. } = workspace;
        arrays.set(input)?;
        let StepArrays { ids, positions, slots, sequences, .. } = arrays;
        let sequences = sequences.set(input.sequences, input.block_size)?;
        let step = AttentionStep { ropes, slots, sequences };
        embedding.forward(&pass, ids, positions, embedded, &mut stream.normed)?;
        device.enter_stream(&mut stream.normed, &mut stream.residual)?;
        stream.pending = false;
        for (index, layer) in layers.iter().enumerate() {
            layer.forward(&pass, step, cache.layer_mut(index)?, stream, buffers)?;
        }
        Ok(())
    }

    /// The last norm and the head, for the rows whose logits are wanted: most rows of a prompt have no use for them.
    fn run_head(&mut self, rows: &[u32]) -> Result<(), OpError> {
        let Self { device, ranks, last_norm, head, workspace, .. } = self;
        let pass = Pass { device, ranks, adapters: &[] };
        let Workspace { stream, residual_last, delta_last, normed_last, step, .. } = workspace;
        step.logits_at.set(rows)?;
        let rows = &step.logits_at;
        device.select_rows(&stream.residual, rows, residual_last)?;
        if stream.pending {
            device.select_rows(&stream.delta, rows, delta_last)?;
        }
        let hidden = match (last_norm, stream.pending) {
            (Some(norm), true) => {
                norm.add_forward(&pass, residual_last, delta_last, normed_last)?;
                &*normed_last
            }
            (Some(norm), false) => {
                norm.forward(&pass, residual_last, normed_last)?;
                &*normed_last
            }
            (None, true) => {
                device.add(residual_last, delta_last)?;
                device.from_stream(residual_last, normed_last)?
            }
            (None, false) => device.from_stream(residual_last, normed_last)?,
        };
        head.forward(
            &pass,
            hidden,
            &mut workspace.projected_last,
            &mut workspace.logits_part,
            &mut workspace.logits,
        )
    }
}

impl Model for Decoder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn adapters(&self) -> Arc<AdapterLayout> {
        self.adapters.clone()
    }

    fn reserve(&mut self, tokens: usize, logits: usize) -> Result<(), OpError> {
        self.workspace.set_rows(tokens, logits)
    }

    fn forward(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<&mut Tensor, OpError> {
        input::check(input, &self.shape, cache)?;
        let places = TokenPlaces { positions: input.positions, lengths: input.lengths };
        self.ropes.iter_mut().try_for_each(|rope| rope.cover(places))?;
        self.workspace.set_rows(input.ids.len(), input.logits_at.len())?;
        let device = self.device.clone();
        device.run(|| {
            if !input.ids.is_empty() {
                self.run(input, cache)?;
            }
            if !input.logits_at.is_empty() {
                self.run_head(input.logits_at)?;
            }
            Ok(())
        })?;
        Ok(&mut self.workspace.logits)
    }
}

/// The place that has the embedding.
fn body<'a>(spec: &DecoderSpec, weights: &WeightPath<'a>) -> WeightPath<'a> {
    let places = spec.body.iter().map(|place| weights.at(place));
    let found = places.clone().find(|place| place.at(spec.embedding.name).at("weight").exists());
    // Where none has it, an error names the tensor in the first place.
    found.or_else(|| places.clone().next()).unwrap_or_else(|| weights.clone())
}

fn shape(spec: &DecoderSpec, embedding: &Embedding, device: &Device, partition: Partition) -> ModelShape {
    // All layers of a model have the same heads.
    let (key_width, value_width) = match spec.layers.first().map(|layer| &layer.attention) {
        Some(AttentionKind::Heads(attention)) => {
            let width = attention.local_heads(partition).kv_width();
            (width, width)
        }
        Some(AttentionKind::Latent(attention)) => (attention.key_width(), 0),
        None => (0, 0),
    };
    ModelShape {
        vocabulary: spec.vocabulary,
        kv: KvShape {
            layers: spec.layers.len(),
            key_width,
            value_width,
            element_bytes: device.cache_element_bytes(),
        },
        positions_max: spec.positions_max,
        shared_prompt_max: spec.ropes.iter().filter_map(RopeSpec::shared_prompt_max).min(),
        dtype: embedding.dtype(),
    }
}

impl Head {
    fn load(
        spec: &DecoderSpec,
        weights: &WeightPath<'_>,
        body: &WeightPath<'_>,
        device: &Device,
        embedding: &Embedding,
    ) -> Result<Self, LoadError> {
        let partition = weights.partition();
        let DecoderSpec { vocabulary, hidden, ref head, .. } = *spec;
        let width = spec.embedding.width;
        // Adapters do not reach the head: its layers have no numbers.
        let project = head.project.map(|name| -> Result<Linear, LoadError> {
            let weight = body.at(name).at("weight").matrix(&Region::all(width, hidden))?;
            Ok(Linear::from_parts(device.place(weight)?, None))
        });
        let linear = match head.weight {
            HeadWeight::Tied => embedding.tied_head(),
            HeadWeight::Own { names, bias, normalized } => {
                let mut places = names.iter().map(|name| weights.at(name));
                let first = weights.at(names[0]);
                let path = places.find(|place| place.at("weight").exists()).unwrap_or(first);
                let rows = Rows::range(partition.vocabulary(vocabulary));
                let region = Region::all(vocabulary, width).with_rows(rows);
                match normalized {
                    true => {
                        let weight = path.at("weight").matrix(&region)?.normalize_rows();
                        Linear::from_parts(device.place(weight)?, None)
                    }
                    false => {
                        let bias = bias.then(|| path.at("bias"));
                        Linear::load_unnumbered(&path.at("weight"), bias, device, &region)?
                    }
                }
            }
        };
        let cols = partition.ranks().map(|rank| rank.vocabulary(vocabulary).len()).collect();
        Ok(Self { project: project.transpose()?, linear, cols, scale: head.scale, soft_cap: head.soft_cap })
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        hidden: &Tensor,
        projected: &mut Tensor,
        part: &mut Tensor,
        logits: &mut Tensor,
    ) -> Result<(), OpError> {
        let input = match &self.project {
            Some(project) => {
                project.forward(pass, hidden, projected)?;
                &*projected
            }
            None => hidden,
        };
        if self.cols.len() == 1 {
            self.linear.forward(pass, input, logits)?;
        } else {
            self.linear.forward(pass, input, part)?;
            pass.ranks.gather_cols(part, &self.cols, logits)?;
        }
        if let Some(scale) = self.scale {
            pass.device.scale(logits, scale)?;
        }
        match self.soft_cap {
            Some(cap) => pass.device.soft_cap(logits, cap),
            None => Ok(()),
        }
    }
}

impl StepArrays {
    fn set(&mut self, input: &StepInput<'_>) -> Result<(), OpError> {
        self.ids.set(input.ids)?;
        self.positions.set(input.positions)?;
        self.slots.set(input.slots)
    }
}

impl Workspace {
    fn new(device: &Device, spec: &DecoderSpec, partition: Partition) -> Result<Self, OpError> {
        let hidden = || device.zeros(0, spec.hidden);
        let embedded = || match spec.embedding.width == spec.hidden {
            true => device.zeros(0, 0),
            false => device.zeros(0, spec.embedding.width),
        };
        let part = if partition.is_split() { partition.vocabulary(spec.vocabulary).len() } else { 0 };
        Ok(Self {
            stream: Stream::new(device, spec.hidden)?,
            layers: LayerBuffers::new(device, spec, partition)?,
            embedded: embedded()?,
            residual_last: device.zeros_stream(0, spec.hidden)?,
            delta_last: hidden()?,
            normed_last: hidden()?,
            projected_last: embedded()?,
            logits_part: device.zeros_f32(0, part)?,
            logits: device.zeros_f32(0, spec.vocabulary)?,
            step: StepArrays {
                ids: device.indices(),
                positions: device.indices(),
                slots: device.indices(),
                logits_at: device.indices(),
                sequences: device.sequences()?,
            },
        })
    }

    /// Makes room for a step of `tokens` tokens, of which `selected` are wanted as logits.
    fn set_rows(&mut self, tokens: usize, selected: usize) -> Result<(), OpError> {
        self.stream.set_rows(tokens)?;
        self.layers.set_rows(tokens)?;
        self.embedded.set_rows(tokens)?;
        let Self { residual_last, delta_last, normed_last, projected_last, logits_part, logits, .. } = self;
        [residual_last, delta_last, normed_last, projected_last, logits_part, logits]
            .into_iter()
            .try_for_each(|tensor| tensor.set_rows(selected))
    }
}
