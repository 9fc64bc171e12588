//! The engine as a router sees it, over a model whose next token is a hash of the history that it reads back from the cache:
//! a wrong slot, position or order shows as a wrong token.

mod batches;
mod failures;
mod grants;
mod ranks;
mod requests;
mod resumption;

use std::num::NonZeroUsize;
use std::sync::Arc;

use kernels::{DType, OpError};
use proto::units::{BatchId, BlockCount, BlockId, RequestId, SlotIndex, TokenCount};

use super::Engine;
use super::answer::{Generation, StepReport};
use super::commands::{BLOCK_SIZE, Parts};
use super::error::EngineError;
use super::request::{NewBatch, NewRequest, Placement, Prompt, Stopping};
use super::slots::SlotTable;
use super::step_plan::StepPlan;
use super::warmup::{MemoryShare, Warmup};
use crate::adapters::AdapterLayout;
use crate::backend::{Device, Tensor};
use crate::cache::{KvShape, PagedKv};
use crate::collective::Ranks;
use crate::model::{Model, ModelShape, StepInput};
use crate::sampling::tests::greedy;
use crate::text::tokenizer::tests::byte_tokenizer;
use crate::weights::Partition;

pub(super) const VOCABULARY: usize = 259;
/// A token that makes the model panic when it is fed.
const POISON: u32 = 13;
/// An id that breaks the device.
const BREAKS: u32 = 15;
/// A token after which the logits are not numbers.
const NAN: u32 = 14;

/// What a token leaves in the cache: its id, its position, the length of its sequence when it came, and whether an adapter
/// changed it.
type Cell = (u32, [u32; 3]);

/// Its cache holds cells, its logits are a hash of those it finds at the slots of its sequence.
struct Hashing {
    shape: ModelShape,
    device: Device,
    /// By slot.
    cells: Vec<Cell>,
    logits: Tensor,
}

impl Hashing {
    fn new() -> Self {
        let shape = ModelShape {
            vocabulary: VOCABULARY,
            kv: KvShape { layers: 1, key_width: 8, value_width: 8, element_bytes: 4 },
            positions_max: 256,
            shared_prompt_max: None,
            dtype: DType::F32,
        };
        let device = device();
        let logits = device.upload(Vec::new(), VOCABULARY).unwrap();
        Self { shape, device, cells: vec![(0, [0; 3]); 1 << 16], logits }
    }
}

impl Model for Hashing {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn adapters(&self) -> Arc<AdapterLayout> {
        Arc::new(AdapterLayout {
            device: self.device.clone(),
            partition: Partition::WHOLE,
            linears: vec![],
            body: String::new(),
            bodies: &[],
        })
    }

    fn reserve(&mut self, _: usize, _: usize) -> Result<(), OpError> {
        Ok(())
    }

    fn forward(&mut self, input: &StepInput<'_>, _: &mut PagedKv) -> Result<&mut Tensor, OpError> {
        assert!(!input.ids.contains(&POISON), "poisoned");
        assert!(
            input.sequences.iter().all(|sequence| !sequence.rows.is_empty()),
            "who sits out is not there"
        );
        if input.ids.contains(&BREAKS) {
            return Err(OpError::Device { op: "norm", reason: "an illegal address".to_owned() });
        }
        for (token, slot) in input.slots.iter().enumerate() {
            let changed = input.adapters.iter().any(|adapter| adapter.rows.contains(&token));
            let place = [input.positions[token], input.lengths[token], u32::from(changed)];
            self.cells[*slot as usize] = (input.ids[token], place);
        }
        let mut logits = Vec::new();
        for token in input.logits_at {
            let token = *token as usize;
            let sequence = input.sequences.iter().find(|sequence| sequence.rows.contains(&token)).unwrap();
            let position = sequence.start + token - sequence.rows.start;
            let past = sequence.slots[..=position].iter().map(|slot| self.cells[*slot as usize]);
            logits.extend(row_of(past));
        }
        self.logits = self.device.upload(logits, VOCABULARY)?;
        Ok(&mut self.logits)
    }
}

/// Logits after this history.
fn row_of(past: impl Iterator<Item = Cell>) -> Vec<f32> {
    let mix =
        |hash: u64, value: u32| (hash ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let mut last = 0;
    let hash = past.fold(1, |hash, (id, place)| {
        last = id;
        place.into_iter().fold(mix(hash, id), mix)
    });
    let spread =
        |id: u32| if last == NAN { f32::NAN } else { (mix(hash, id) >> 40) as f32 / (1 << 21) as f32 };
    // Control tokens, and those with a meaning in these tests, are never the best.
    let plain = |id: u32| (97..123).contains(&id);
    (0..VOCABULARY as u32).map(|id| spread(id) - if plain(id) { 0.0 } else { 20.0 }).collect()
}

fn device() -> Device {
    Device::cpu(NonZeroUsize::MIN).unwrap()
}

/// What the base model leaves of a history that began with a prompt of this length.
fn cells_of(ids: &[u32], prompt: usize) -> impl Iterator<Item = Cell> {
    let length = move |position: u32| (position + 1).max(prompt as u32);
    ids.iter().copied().zip(0..).map(move |(id, position)| (id, [position, length(position), 0]))
}

/// The greedy continuation by the definition of the model, without an engine.
fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let row = row_of(cells_of(&ids, prompt.len()));
        let best = (0..VOCABULARY).fold(0, |best, id| if row[id] > row[best] { id } else { best });
        ids.push(best as u32);
    }
    ids.split_off(prompt.len())
}

pub(super) fn request(id: u64, prompt: &str, tokens_max: u32) -> NewRequest {
    NewRequest {
        id: RequestId(id),
        prompt: Prompt::Ids(ids_of(prompt)),
        generated: TokenCount(0),
        sampling: greedy(),
        stopping: Stopping {
            tokens_max: TokenCount(tokens_max),
            strings: Vec::new(),
            ignore_end_of_sequence: false,
        },
        prompt_logprobs: false,
        top: 0,
        placement: at_blocks(&[10 * id as u32 + 1, 10 * id as u32 + 5, 10 * id as u32 + 3]),
        cached: TokenCount(0),
        chunk: None,
        adapter: None,
    }
}

fn at_blocks(blocks: &[u32]) -> Placement {
    let slots =
        blocks.iter().flat_map(|id| BlockId(*id).slots(BLOCK_SIZE)).map(|SlotIndex(slot)| slot).collect();
    Placement::Given { blocks: BlockCount(blocks.len() as u32), slots: SlotTable::from_wire(slots) }
}

fn ids_of(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// About a megabyte of cache, 1 KiB per block.
pub(super) fn parts() -> Parts {
    Parts {
        model: Box::new(Hashing::new()),
        device: device(),
        tokenizer: byte_tokenizer(),
        memory: MemoryShare(1e-4),
        step_patience: std::time::Duration::from_secs(60),
        ranks: Ranks::alone(),
    }
}

/// An engine after its warm-up, and the calls of a router, waited for.
struct Shard {
    engine: Engine,
    runtime: tokio::runtime::Runtime,
    /// Of the cache.
    blocks: u32,
}

impl Shard {
    /// `prefill_max` is the chunk budget.
    fn start(prefill_max: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let engine = Engine::start(parts()).unwrap();
        let warmup = Warmup {
            batch: NewBatch { id: BatchId(0), requests: vec![request(0, &"warm".repeat(100), 1)] },
            prefill_max: TokenCount(prefill_max),
            input_max: None,
            total_max: None,
        };
        let capacity = runtime.block_on(engine.warm_up(warmup)).unwrap();
        Self { engine, runtime, blocks: capacity.supported.blocks(BLOCK_SIZE).0 }
    }

    fn prefill(
        &self,
        id: u64,
        requests: Vec<NewRequest>,
        onto: Option<u64>,
    ) -> Result<StepReport, EngineError> {
        self.prefill_by(id, requests, onto, StepPlan::default())
    }

    fn prefill_by(
        &self,
        id: u64,
        requests: Vec<NewRequest>,
        onto: Option<u64>,
        plan: StepPlan,
    ) -> Result<StepReport, EngineError> {
        let batch = NewBatch { id: BatchId(id), requests };
        self.runtime.block_on(self.engine.prefill(batch, onto.map(BatchId), plan))
    }

    fn decode(&self, ids: &[u64]) -> Result<StepReport, EngineError> {
        self.decode_by(ids, StepPlan::default())
    }

    fn decode_by(&self, ids: &[u64], plan: StepPlan) -> Result<StepReport, EngineError> {
        self.runtime.block_on(self.engine.decode(ids.iter().copied().map(BatchId).collect(), plan))
    }

    fn filter(&self, id: u64, keep: &[u64]) -> Result<Vec<u64>, EngineError> {
        let keep = keep.iter().copied().map(RequestId).collect();
        let batch = self.runtime.block_on(self.engine.filter(BatchId(id), keep))?;
        Ok(batch.requests.iter().map(|id| id.0).collect())
    }

    /// One request alone, to its end.
    fn alone(&self, request: NewRequest) -> Vec<Generation> {
        let mut report = self.prefill(99, vec![request], None).unwrap();
        let mut generations = report.generations;
        while report.batch.is_some() {
            report = self.decode(&[99]).unwrap();
            generations.append(&mut report.generations);
        }
        generations
    }
}

fn tokens(generations: &[Generation]) -> Vec<u32> {
    generations.iter().map(|generation| generation.token.id.0).collect()
}

fn requests(report: &StepReport) -> Vec<u64> {
    report.generations.iter().map(|generation| generation.request.0).collect()
}

/// The tokens of one request among several reports.
fn tokens_of(request: u64, reports: &[StepReport]) -> Vec<u32> {
    let all = reports.iter().flat_map(|report| &report.generations);
    all.filter(|generation| generation.request.0 == request).map(|generation| generation.token.id.0).collect()
}
