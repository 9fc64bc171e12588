//! Drives a model as the engine does: a batch of requests, a paged cache, scattered blocks.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use kernels::Sequence;
use proto::units::{BlockCount, BlockSize};

use crate::backend::Device;
use crate::cache::PagedKv;
use crate::collective::Ranks;
use crate::layers::{Adapter, AdapterRows};
use crate::model::{self, LoadOptions, Model, StepInput};

const BLOCKS: BlockCount = BlockCount(256);
const BLOCK_SIZE: BlockSize = BlockSize::new(16).expect("sixteen is not zero");

/// A model with a cache whose blocks are handed out in no useful order. It is driven as the engine drives one, and every
/// logit is looked at.
pub struct Runner {
    model: Box<dyn Model>,
    cache: PagedKv,
    blocks_taken: u32,
}

/// One request: its tokens so far, of which the first `computed` are in the cache, and a slot for each.
#[derive(Debug)]
pub struct Request {
    /// The prompt, and what has been added to it. There may be no more than slots.
    pub ids: Vec<u32>,
    /// What changes the model for it.
    pub adapter: Option<Arc<Adapter>>,
    slots: Vec<u32>,
    prompt_length: usize,
    computed: usize,
}

/// Logits of each row that a step computed for a request.
pub type Logits = Vec<Vec<f32>>;

impl Request {
    /// The positions that its next step computes.
    fn next(&self, tokens_max: usize) -> Range<usize> {
        self.computed..self.ids.len().min(self.computed.saturating_add(tokens_max))
    }
}

impl Runner {
    /// The checkpoint in `directory`, or the part of it that one of several ranks has.
    ///
    /// Errors when it cannot be loaded.
    pub fn open(directory: &Path, device: &Device, ranks: Ranks) -> anyhow::Result<Self> {
        let ranks = ranks.on(device)?;
        Self::new(model::load(directory, &LoadOptions::default(), device.clone(), ranks)?, device)
    }

    /// A model on this device.
    ///
    /// Errors when there is no memory for its cache.
    pub fn new(model: Box<dyn Model>, device: &Device) -> anyhow::Result<Self> {
        let cache = PagedKv::new(device, model.shape().kv, BLOCKS, BLOCK_SIZE)?;
        Ok(Self { model, cache, blocks_taken: 0 })
    }

    /// An adapter for this model.
    ///
    /// Errors when it is none, or one for another model.
    pub fn adapter(&self, directory: &Path) -> anyhow::Result<Arc<Adapter>> {
        Ok(Arc::new(self.model.adapters().load(directory)?))
    }

    /// A request with this prompt, and slots for `tokens_more` further tokens.
    ///
    /// Errors when the cache has no room for it.
    pub fn request(&mut self, prompt: &[u32], tokens_more: usize) -> anyhow::Result<Request> {
        let blocks = (prompt.len() + tokens_more).div_ceil(BLOCK_SIZE.get() as usize);
        let slots = (0..blocks).map(|_| self.block()).collect::<anyhow::Result<Vec<_>>>()?;
        let slots = slots.into_iter().flatten().collect();
        Ok(Request { ids: prompt.to_vec(), slots, prompt_length: prompt.len(), computed: 0, adapter: None })
    }

    /// Computes the tokens that are new since the last step, at most `tokens_max` of each request, in one batch.
    /// Returns the logits of all of them.
    ///
    /// Errors when the model does, or a request has more tokens than slots.
    pub fn step(&mut self, requests: &mut [&mut Request], tokens_max: usize) -> anyhow::Result<Vec<Logits>> {
        let rows = |count: usize| (0..count as u32).collect::<Vec<_>>();
        let mut logits = self.forward(requests, tokens_max, rows)?.into_iter();
        let mut answers = Vec::new();
        for request in requests {
            let count = request.next(tokens_max).len();
            request.computed += count;
            answers.push(logits.by_ref().take(count).collect());
        }
        Ok(answers)
    }

    /// Computes a request's prompt and returns only the last token's logits, as the engine does.
    ///
    /// Errors as [`step`](Self::step).
    pub fn last_logits(&mut self, request: &mut Request) -> anyhow::Result<Vec<f32>> {
        let last = |count: usize| vec![(count as u32).saturating_sub(1)];
        let logits = self.forward(&[&mut *request], usize::MAX, last)?;
        request.computed = request.ids.len();
        logits.into_iter().next().context("one row was asked for")
    }

    fn forward(
        &mut self,
        requests: &[&mut Request],
        tokens_max: usize,
        logits_at: impl FnOnce(usize) -> Vec<u32>,
    ) -> anyhow::Result<Logits> {
        let (mut ids, mut positions, mut lengths) = (vec![], vec![], vec![]);
        let (mut slots, mut sequences) = (vec![], vec![]);
        for request in requests {
            let Range { start, end } = request.next(tokens_max);
            ensure!(end <= request.slots.len(), "{end} tokens in {} slots", request.slots.len());
            let first = ids.len();
            ids.extend_from_slice(&request.ids[start..end]);
            positions.extend(start as u32..end as u32);
            lengths.extend((start..end).map(|position| request.prompt_length.max(position + 1) as u32));
            slots.extend_from_slice(&request.slots[start..end]);
            sequences.push(Sequence { rows: first..ids.len(), start, slots: &request.slots[..end] });
        }
        let logits_at = logits_at(ids.len());
        let adapters: Vec<AdapterRows<'_>> = requests
            .iter()
            .zip(&sequences)
            .filter_map(|(request, sequence)| {
                let adapter = request.adapter.as_deref()?;
                Some(AdapterRows { rows: sequence.rows.clone(), adapter })
            })
            .collect();
        let input = StepInput {
            ids: &ids,
            positions: &positions,
            lengths: &lengths,
            slots: &slots,
            sequences: &sequences,
            block_size: BLOCK_SIZE.get() as usize,
            logits_at: &logits_at,
            adapters: &adapters,
        };
        let logits = self.model.forward(&input, &mut self.cache)?;
        ensure!(logits.rows() == logits_at.len(), "{} rows, {} expected", logits.rows(), logits_at.len());
        Ok(logits.read()?.chunks(logits.width()).map(<[f32]>::to_vec).collect())
    }

    /// The slots of a block that no other request has: multiplying by an odd number permutes a power of two.
    fn block(&mut self) -> anyhow::Result<Range<u32>> {
        ensure!(self.blocks_taken < BLOCKS.0, "more tokens than a cache of {BLOCKS} blocks holds");
        let block = (self.blocks_taken * 77 + 11) % BLOCKS.0;
        self.blocks_taken += 1;
        Ok(block * BLOCK_SIZE.get()..(block + 1) * BLOCK_SIZE.get())
    }
}

/// Natural logarithm of the softmax.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit - max) - sum.ln()).collect()
}

/// The first of the largest.
pub fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, (at, logit): (usize, &f32)| if *logit > logits[best] { at } else { best };
    logits.iter().enumerate().fold(0, better) as u32
}
