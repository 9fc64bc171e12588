//! The real shards: one plan becomes the calls of the contract, and every call goes to every rank.
//!
//! Plans speak of rows, the contract of batches that the shards hold. What is held, and in which order, is all the
//! state here; it is taken from the shards' own answers.

use std::path::Path;
use std::time::{Duration, Instant};

use proto::units::{BatchId, RequestId};
use proto::v3;
use tokio::time::{Instant as Deadline, timeout_at};

use super::client::{Ranks, ShardAdapters, ShardHealth};
use super::info::ShardInfo;
use super::warmup::{self, Warm, WarmupLimits};
use super::wire::{self, Answer};
use super::{ShardError, Shards, StepOutput};
use crate::batching::{NewBatch, StepPlan};

/// All ranks, as one.
#[derive(Debug)]
pub struct GrpcShards {
    ranks: Ranks,
    info: ShardInfo,
    /// Batches that live on the shards, oldest first. More than one only between a prefill of whole prompts and the
    /// decode that joins them.
    held: Vec<v3::CachedBatch>,
}

/// Connects to the shard at `path` and, through it, to all of them; waits for their sockets to appear. Clears what an
/// earlier router may have left there, and asks what they serve.
///
/// Errors when not all of this is done after `deadline`.
pub async fn connect(path: &Path, deadline: Duration) -> Result<GrpcShards, ShardError> {
    let until = Deadline::now() + deadline;
    let connected = timeout_at(until, async {
        let ranks = Ranks::discover(path, until).await?;
        ranks.clear_cache(None).await?;
        let infos = ranks
            .call(v3::InfoRequest {}, |mut rank, request| async move { rank.info(request).await })
            .await?;
        let info = ShardInfo::from_wire(infos.into_iter().next_back().ok_or(ShardError::Empty)?)?;
        if info.requires_padding {
            tracing::warn!("this model pads its batches; its cache is accounted for as if it did not");
        }
        Ok(GrpcShards { ranks, info, held: Vec::new() })
    });
    let late =
        || ShardError::Connection(format!("{}: no answer within {} s", path.display(), deadline.as_secs()));
    connected.await.unwrap_or_else(|_| Err(late()))
}

impl GrpcShards {
    /// What the shards serve.
    pub fn info(&self) -> &ShardInfo {
        &self.info
    }

    /// A handle that asks the shards for their health, whatever the batcher does meanwhile.
    pub fn health(&self) -> ShardHealth {
        self.ranks.health()
    }

    /// A handle that loads and unloads adapters, whatever the batcher does meanwhile. `None` if the shards cannot do it
    /// while they run.
    pub fn adapters(&self) -> Option<ShardAdapters> {
        self.info.extensions.adapters.then(|| self.ranks.adapters())
    }

    /// Runs the largest step once; the shards decide how many blocks fit besides. To be called once, before any step.
    ///
    /// Errors when it does not fit into memory, or when the shards do not keep to the limits given.
    pub async fn warmup(&mut self, limits: WarmupLimits) -> Result<Warm, ShardError> {
        let request = warmup::request(&limits);
        let answers =
            self.ranks.call(request, |mut rank, request| async move { rank.warmup(request).await }).await?;
        warmup::result(answers, &limits)
    }

    async fn attempt(&mut self, plan: &StepPlan) -> Result<StepOutput, ShardError> {
        let started = Instant::now();
        self.drop_rows(&plan.drops).await?;
        let drops = started.elapsed();
        let answer = match &plan.batch {
            Some(batch) => self.prefill(batch, plan.continues).await?,
            None if plan.continues => self.decode().await?,
            None => Answer::default(),
        };
        let generations = answer.generations.into_iter().map(wire::generation).collect::<Result<_, _>>()?;
        let timings = super::Timings { drops, ..answer.timings };
        Ok(StepOutput { generations, timings })
    }

    /// Filters every held batch to those that stay, in the order of the shards, and clears it if none does.
    async fn drop_rows(&mut self, drops: &[RequestId]) -> Result<(), ShardError> {
        if drops.is_empty() {
            return Ok(());
        }
        let mut index = 0;
        while let Some(batch) = self.held.get(index) {
            let staying: Vec<u64> =
                batch.request_ids.iter().copied().filter(|id| !drops.contains(&RequestId(*id))).collect();
            if staying.is_empty() {
                self.ranks.clear_cache(Some(batch.id)).await?;
                self.held.remove(index);
                continue;
            }
            if staying.len() < batch.request_ids.len() {
                self.held[index] = self.filter(batch.id, staying).await?;
            }
            index += 1;
        }
        Ok(())
    }

    async fn filter(&self, batch_id: u64, request_ids: Vec<u64>) -> Result<v3::CachedBatch, ShardError> {
        let request = v3::FilterBatchRequest { batch_id, request_ids };
        let answers = self
            .ranks
            .call(request, |mut rank, request| async move { rank.filter_batch(request).await })
            .await?;
        let last = answers.into_iter().next_back().and_then(|answer| answer.batch);
        last.ok_or_else(|| ShardError::Answer(format!("batch {batch_id} is gone after filtering")))
    }

    /// Computes new rows; with `joins` they become one batch with the rows that run.
    async fn prefill(&mut self, new: &NewBatch, joins: bool) -> Result<Answer, ShardError> {
        let cached_batch = if joins { Some(self.held.first().cloned().ok_or_else(gone)?) } else { None };
        let batch = Some(wire::batch(new, &self.info));
        let request = v3::PrefillRequest { batch, cached_batch, ..Default::default() };
        let answers =
            self.ranks.call(request, |mut rank, request| async move { rank.prefill(request).await }).await?;
        let mut answer = Answer::join(answers.into_iter().map(Answer::from).collect())?;
        if joins {
            self.held.clear();
        }
        self.held.extend(answer.batch.take());
        Ok(answer)
    }

    /// Advances all rows that run; several batches become one.
    async fn decode(&mut self) -> Result<Answer, ShardError> {
        if self.held.is_empty() {
            return Err(gone());
        }
        let request = v3::DecodeRequest { batches: self.held.clone(), ..Default::default() };
        let answers =
            self.ranks.call(request, |mut rank, request| async move { rank.decode(request).await }).await?;
        let mut answer = Answer::join(answers.into_iter().map(Answer::from).collect())?;
        self.held = answer.batch.take().into_iter().collect();
        Ok(answer)
    }

    /// The batches that a failed step touched are not to be relied on: they are cleared, here at once, on the shards as
    /// far as those can still be reached.
    async fn forget(&mut self, plan: &StepPlan) {
        let new = plan.batch.as_ref().map(|batch| batch.id);
        let lost = |batch: &v3::CachedBatch| plan.touches_running() || Some(BatchId(batch.id)) == new;
        let old: Vec<BatchId> =
            self.held.extract_if(.., |batch| lost(batch)).map(|batch| BatchId(batch.id)).collect();
        for id in new.into_iter().filter(|id| !old.contains(id)).chain(old.iter().copied()) {
            if let Err(error) = self.ranks.clear_cache(Some(id.0)).await {
                tracing::warn!(batch_id = id.0, %error, "a failed batch could not be cleared");
            }
        }
    }
}

/// Rows run, but the shards answered before that all had stopped.
fn gone() -> ShardError {
    ShardError::Answer("the batch of the running requests is gone".to_owned())
}

impl Shards for GrpcShards {
    async fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ShardError> {
        let output = self.attempt(plan).await;
        if output.is_err() {
            self.forget(plan).await;
        }
        output
    }
}
