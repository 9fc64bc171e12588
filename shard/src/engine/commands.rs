//! What the engine thread owns, and what each command does to it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use proto::units::{BatchId, BlockCount, BlockSize, RequestId, TokenCount};

use super::adapters::Adapters;
use super::answer::{BatchSummary, Capacity, StepReport};
use super::batch::Batch;
use super::error::{EngineError, PlanError, WarmupError};
use super::request::{Admission, NewBatch};
use super::row::Row;
use super::step::{Machine, Stepper};
use super::step_plan::StepPlan;
use super::warmup::{self, MemoryShare, Warmup};
use crate::backend::Device;
use crate::cache::PagedKv;
use crate::collective::Ranks;
use crate::model::Model;
use crate::text::tokenizer::Tokenizer;

/// Tokens per cache block.
pub const BLOCK_SIZE: BlockSize = BlockSize::new(16).expect("sixteen is not zero");

/// What an engine is made of.
pub struct Parts {
    /// The model.
    pub model: Box<dyn Model>,
    /// Where it runs.
    pub device: Device,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The memory its cache may take, together with those of the other ranks.
    pub memory: MemoryShare,
    /// How long a step may always take until it counts as hung.
    pub step_patience: Duration,
    /// The processes of this model.
    pub ranks: Ranks,
}

/// Model, cache and batches.
pub(super) struct Core {
    parts: Parts,
    /// Made by the warm-up.
    cache: Option<PagedKv>,
    /// Most tokens of a prefill, as the warm-up said.
    prefill_max: TokenCount,
    /// How long the largest prefill will take, going by the warm-up's small one.
    step_expected: Duration,
    batches: HashMap<BatchId, Batch>,
    adapters: Adapters,
    stepper: Stepper,
}

impl Core {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            cache: None,
            prefill_max: TokenCount(0),
            step_expected: Duration::ZERO,
            batches: HashMap::new(),
            adapters: Adapters::default(),
            stepper: Stepper::new(&parts.device),
            parts,
        }
    }

    /// The processes of this model.
    pub(super) fn ranks(&self) -> &Ranks {
        &self.parts.ranks
    }

    /// Adds a batch, behind the requests of `onto` if one is named, for which the plan is, and runs a step.
    pub(super) fn prefill(
        &mut self,
        new: NewBatch,
        onto: Option<BatchId>,
        plan: &StepPlan,
    ) -> Result<StepReport, EngineError> {
        let begin = Instant::now();
        let held = onto.map(|id| self.held(id)).transpose()?;
        if onto != Some(new.id) && self.batches.contains_key(&new.id) {
            return Err(EngineError::BatchExists(new.id));
        }
        let admission = self.admission()?;
        plan.check(held.into_iter(), BLOCK_SIZE, admission.slots)?;
        let new = admission.batch(new)?;
        match onto {
            None => self.run(new, begin, None),
            Some(id) => {
                if let Some(request) = self.held(id)?.shared_request(&new, &plan.drops) {
                    return Err(EngineError::RepeatedRequest { batch: id, request });
                }
                let joining = Instant::now();
                let mut batch = self.take(id)?;
                plan.apply(&mut batch, BLOCK_SIZE);
                batch.join(new);
                self.run(batch, begin, Some(joining.elapsed()))
            }
        }
    }

    /// Joins the named batches in order, and runs a step by the plan.
    pub(super) fn decode(&mut self, ids: &[BatchId], plan: &StepPlan) -> Result<StepReport, EngineError> {
        let begin = Instant::now();
        let (first, others) = ids.split_first().ok_or(EngineError::NoBatch)?;
        for (index, id) in ids.iter().enumerate() {
            let batch = self.held(*id)?;
            if ids[..index].contains(id) {
                return Err(EngineError::RepeatedBatch(*id));
            }
            let shared = ids[..index]
                .iter()
                .find_map(|before| self.batches[before].shared_request(batch, &plan.drops));
            if let Some(request) = shared {
                return Err(EngineError::RepeatedRequest { batch: *first, request });
            }
        }
        let slots = self.cache.as_ref().ok_or(EngineError::NotWarm)?.slots();
        plan.check(ids.iter().map(|id| &self.batches[id]), BLOCK_SIZE, slots)?;
        let leaves = |row: &Row| plan.drops.contains(&row.id());
        if ids.iter().flat_map(|id| self.batches[id].rows()).all(leaves) {
            return Err(PlanError::NobodyStays.into());
        }
        let mut batch = self.take(*first)?;
        for id in others {
            batch.join(self.take(*id)?);
        }
        plan.apply(&mut batch, BLOCK_SIZE);
        let joined = (!others.is_empty()).then(|| begin.elapsed());
        self.run(batch, begin, joined)
    }

    /// Keeps the named requests of a batch, in the named order.
    pub(super) fn filter(&mut self, id: BatchId, keep: &[RequestId]) -> Result<BatchSummary, EngineError> {
        let batch = self.batches.get_mut(&id).ok_or(EngineError::UnknownBatch(id))?;
        batch.filter(keep)?;
        Ok(batch.summary(BLOCK_SIZE))
    }

    /// Forgets one batch, or all.
    pub(super) fn clear(&mut self, id: Option<BatchId>) {
        match id {
            Some(id) => drop(self.batches.remove(&id)),
            None => self.batches.clear(),
        }
    }

    /// Takes the memory of the largest prefill, decides how many blocks fit beside it, and makes the cache.
    pub(super) fn warm_up(&mut self, warmup: Warmup) -> Result<Capacity, EngineError> {
        // A cache that is left from before counts as free.
        self.batches.clear();
        self.cache = None;
        self.prefill_max = warmup.prefill_max;
        self.rehearse(&warmup)?;
        let shape = self.parts.model.shape().kv;
        let ranks = &self.parts.ranks;
        let budget = self.parts.memory.budget(&self.parts.device, ranks.partition().world)?;
        // Agreed on before anybody takes memory for it.
        let blocks = BlockCount(ranks.least(warmup::blocks(shape, BLOCK_SIZE, budget).0)?);
        let limits = warmup::Limits {
            input: warmup.input_max,
            total: warmup.total_max,
            sequence: self.parts.tokenizer.length_max(),
            positions: self.parts.model.shape().positions_max,
        };
        let capacity = warmup::capacity(blocks, BLOCK_SIZE, budget, limits)?;
        let cache =
            PagedKv::new(&self.parts.device, shape, blocks, BLOCK_SIZE).map_err(WarmupError::Cache)?;
        tracing::info!(blocks = blocks.0, tokens = capacity.supported.0, budget, "cache is ready");
        self.cache = Some(cache);
        Ok(capacity)
    }

    /// The adapters that requests can name.
    pub(super) fn adapters(&mut self) -> &mut Adapters {
        &mut self.adapters
    }

    /// How long the largest prefill may well take.
    pub(super) fn step_expected(&self) -> Duration {
        self.step_expected
    }

    /// Takes the memory of the largest step, and runs a small one on a cache of just its size.
    fn rehearse(&mut self, warmup: &Warmup) -> Result<(), EngineError> {
        let Parts { model, device, tokenizer, ranks, .. } = &mut self.parts;
        let shape = model.shape().clone();
        let admission = Admission {
            tokenizer,
            shape: &shape,
            slots: u32::MAX as usize,
            block_size: BLOCK_SIZE,
            adapters: &self.adapters,
        };
        let (batch, size) = warmup::rehearsal(&warmup.batch, &admission, device.rehearsal_tokens())?;
        let mut batch = admission.batch(batch)?;
        let logits = size.requests + size.tokens.min(self.stepper.prompt_logits_max(shape.vocabulary));
        model
            .reserve(size.tokens, logits)
            .map_err(|source| WarmupError::Prefill { tokens: size.tokens, source })?;
        let blocks = batch.summary(BLOCK_SIZE).tokens_max.blocks(BLOCK_SIZE);
        let mut cache = PagedKv::new(device, shape.kv, blocks, BLOCK_SIZE).map_err(WarmupError::Cache)?;
        let mut machine = Machine { device, model: model.as_mut(), cache: &mut cache, tokenizer, ranks };
        let begin = Instant::now();
        let tokens: usize = batch.rows().iter().map(|row| row.ids().len()).sum();
        self.stepper.step(&mut machine, &mut batch).map_err(|source| WarmupError::Step(Box::new(source)))?;
        let largest = size.tokens.max(warmup.prefill_max.0 as usize);
        self.step_expected =
            begin.elapsed() * u32::try_from(largest.div_ceil(tokens.max(1))).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Runs a step and keeps the batch, unless every request has stopped. A batch whose step fails is lost.
    fn run(
        &mut self,
        mut batch: Batch,
        begin: Instant,
        concat: Option<Duration>,
    ) -> Result<StepReport, EngineError> {
        let cache = self.cache.as_mut().ok_or(EngineError::NotWarm)?;
        let Parts { model, device, tokenizer, ranks, .. } = &mut self.parts;
        let mut machine = Machine { device, model: model.as_mut(), cache, tokenizer, ranks };
        let report = self.stepper.step(&mut machine, &mut batch);
        let mut report = report.map_err(|error| error.in_step(batch.rows().iter().map(Row::id)))?;
        if !batch.is_stopped() {
            batch.plan(self.prefill_max);
            report.batch = Some(batch.summary(BLOCK_SIZE));
            self.batches.insert(batch.id(), batch);
        }
        report.timings.concat = concat;
        report.timings.total = begin.elapsed();
        Ok(report)
    }

    fn admission(&self) -> Result<Admission<'_>, EngineError> {
        let cache = self.cache.as_ref().ok_or(EngineError::NotWarm)?;
        Ok(Admission {
            tokenizer: &self.parts.tokenizer,
            shape: self.parts.model.shape(),
            slots: cache.slots(),
            block_size: BLOCK_SIZE,
            adapters: &self.adapters,
        })
    }

    fn held(&self, id: BatchId) -> Result<&Batch, EngineError> {
        self.batches.get(&id).ok_or(EngineError::UnknownBatch(id))
    }

    fn take(&mut self, id: BatchId) -> Result<Batch, EngineError> {
        self.batches.remove(&id).ok_or(EngineError::UnknownBatch(id))
    }
}
