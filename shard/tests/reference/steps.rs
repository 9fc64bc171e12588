use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use kernels::Sequence;
use proto::units::{BlockCount, BlockSize};
use shard::backend::Device;
use shard::cache::PagedKv;
use shard::collective::Ranks;
use shard::layers::{Adapter, AdapterRows};
use shard::model::{self, LoadOptions, Model, StepInput};

const BLOCKS: BlockCount = BlockCount(256);
const BLOCK_SIZE: BlockSize = BlockSize::new(16).unwrap();

/// A model with a cache whose blocks are handed out in no useful order.
pub(crate) struct Runner {
    model: Box<dyn Model>,
    cache: PagedKv,
    blocks_taken: u32,
}

/// One request: its tokens so far, of which the first `computed` are in the cache, and a slot for each.
pub(crate) struct Request {
    pub(crate) ids: Vec<u32>,
    slots: Vec<u32>,
    prompt_length: usize,
    computed: usize,
    pub(crate) adapter: Option<Arc<Adapter>>,
}

impl Request {
    /// The positions that its next step computes.
    fn next(&self, tokens_max: usize) -> Range<usize> {
        self.computed..self.ids.len().min(self.computed.saturating_add(tokens_max))
    }
}

/// Logits of each row that a step computed for a request.
pub(crate) type Logits = Vec<Vec<f32>>;

impl Runner {
    pub(crate) fn new(directory: &Path, threads: usize) -> Self {
        Self::open(directory, threads).expect("the checkpoint is good")
    }

    /// Errors when the checkpoint cannot be loaded.
    pub(crate) fn open(directory: &Path, threads: usize) -> Result<Self, String> {
        Self::open_ranks(directory, threads, Ranks::alone())
    }

    /// One of several ranks.
    pub(crate) fn open_ranks(directory: &Path, threads: usize, ranks: Ranks) -> Result<Self, String> {
        let threads = NonZeroUsize::new(threads).expect("at least one thread");
        Self::open_on(directory, Device::cpu(threads).expect("the CPU is always there"), ranks)
    }

    /// One of several ranks, on this device.
    pub(crate) fn open_on(directory: &Path, device: Device, ranks: Ranks) -> Result<Self, String> {
        let ranks = ranks.on(&device).map_err(|error| error.to_string())?;
        let model = model::load(directory, &LoadOptions::default(), device.clone(), ranks)
            .map_err(|error| error.to_string())?;
        let cache = PagedKv::new(&device, model.shape().kv, BLOCKS, BLOCK_SIZE).expect("a small cache fits");
        Ok(Self { model, cache, blocks_taken: 0 })
    }

    /// An adapter for this model.
    pub(crate) fn adapter(&self, directory: &Path) -> Result<Arc<Adapter>, String> {
        self.model.adapters().load(directory).map(Arc::new).map_err(|error| error.to_string())
    }

    /// A request with this prompt, and slots for `tokens_more` further tokens.
    pub(crate) fn request(&mut self, prompt: &[u32], tokens_more: usize) -> Request {
        let blocks = (prompt.len() + tokens_more).div_ceil(BLOCK_SIZE.get() as usize);
        let slots = (0..blocks).flat_map(|_| self.block()).collect();
        Request { ids: prompt.to_vec(), slots, prompt_length: prompt.len(), computed: 0, adapter: None }
    }

    /// Computes the tokens that are new since the last step, at most `tokens_max` of each request, in one batch.
    /// Returns the logits of all of them.
    pub(crate) fn step(&mut self, requests: &mut [&mut Request], tokens_max: usize) -> Vec<Logits> {
        self.try_step(requests, tokens_max).expect("the step is well formed")
    }

    /// The same, with the model's error.
    pub(crate) fn try_step(
        &mut self,
        requests: &mut [&mut Request],
        tokens_max: usize,
    ) -> Result<Vec<Logits>, String> {
        let rows = |count: usize| (0..count as u32).collect::<Vec<_>>();
        let logits = self.forward(requests, tokens_max, rows)?;
        let mut logits = logits.into_iter();
        let mut answers = Vec::new();
        for request in requests {
            let count = request.next(tokens_max).len();
            request.computed += count;
            answers.push(logits.by_ref().take(count).collect());
        }
        Ok(answers)
    }

    /// Computes a request's prompt and returns only the last token's logits, as the engine does.
    pub(crate) fn last_logits(&mut self, request: &mut Request) -> Vec<f32> {
        let logits = self
            .forward(&[&mut *request], usize::MAX, |count| vec![count as u32 - 1])
            .expect("the step is well formed");
        request.computed = request.ids.len();
        logits.into_iter().next().expect("one row was asked for")
    }

    fn forward(
        &mut self,
        requests: &[&mut Request],
        tokens_max: usize,
        logits_at: impl FnOnce(usize) -> Vec<u32>,
    ) -> Result<Logits, String> {
        let (mut ids, mut positions, mut lengths) = (vec![], vec![], vec![]);
        let (mut slots, mut sequences) = (vec![], vec![]);
        for request in requests {
            let Range { start, end } = request.next(tokens_max);
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
        let logits = self.model.forward(&input, &mut self.cache).map_err(|error| error.to_string())?;
        assert_eq!(logits.rows(), logits_at.len());
        Ok(logits
            .read()
            .map_err(|error| error.to_string())?
            .chunks(logits.width())
            .map(<[f32]>::to_vec)
            .collect())
    }

    /// The slots of a block that no other request has: multiplying by an odd number permutes a power of two.
    fn block(&mut self) -> Range<u32> {
        assert!(self.blocks_taken < BLOCKS.0, "the cache is full");
        let block = (self.blocks_taken * 77 + 11) % BLOCKS.0;
        self.blocks_taken += 1;
        block * BLOCK_SIZE.get()..(block + 1) * BLOCK_SIZE.get()
    }
}

/// Natural logarithm of the softmax.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit - max) - sum.ln()).collect()
}

/// The first of the largest.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, (at, logit): (usize, &f32)| if *logit > logits[best] { at } else { best };
    logits.iter().enumerate().fold(0, better) as u32
}
