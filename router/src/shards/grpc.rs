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
use super::recovery::Recovery;
use super::warmup::{self, Warm, WarmupLimits};
use super::wire::{self, Answer};
use super::{ShardError, Shards, StepOutput};
use crate::batching::{Capacity, NewBatch, StepPlan};

/// All ranks, as one.
#[derive(Debug)]
pub struct GrpcShards {
    pub(super) ranks: Ranks,
    info: ShardInfo,
    /// How they are watched, and brought back.
    recovery: Recovery,
    adapters: Option<ShardAdapters>,
    /// Batches that live on the shards, oldest first. More than one only between a prefill of whole prompts and the
    /// decode that joins them.
    held: Vec<v3::CachedBatch>,
}

/// Connects to the shard at `path` and, through it, to all of them; waits for their sockets to appear. Clears what an
/// earlier router may have left there, and asks what they serve.
///
/// Errors when not all of this is done after `deadline`.
pub async fn connect(path: &Path, deadline: Duration) -> Result<GrpcShards, ShardError> {
    let (ranks, info) = meet(path, deadline).await?;
    if info.requires_padding {
        tracing::warn!("this model pads its batches; its cache is accounted for as if it did not");
    }
    let adapters = info.extensions.adapters.then(|| ranks.adapters());
    Ok(GrpcShards { ranks, info, recovery: Recovery::none(path), adapters, held: Vec::new() })
}

/// The connections to shards that hold nothing, and what they serve.
pub(super) async fn meet(path: &Path, deadline: Duration) -> Result<(Ranks, ShardInfo), ShardError> {
    let until = Deadline::now() + deadline;
    let connected = timeout_at(until, async {
        let ranks = Ranks::discover(path, until).await?;
        ranks.clear_cache(None).await?;
        let infos = ranks
            .call(v3::InfoRequest {}, |mut rank, request| async move { rank.info(request).await })
            .await?;
        let info = ShardInfo::from_wire(infos.into_iter().next_back().ok_or(ShardError::Empty)?)?;
        Ok((ranks, info))
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
        self.adapters.clone()
    }

    /// From now on steps are watched, and shards that fail are brought back, as `recovery` says.
    pub fn recovered_by(self, recovery: Recovery) -> Self {
        Self { recovery, ..self }
    }

    /// Runs the largest step once; the shards decide how many blocks fit besides. To be called once, before any step.
    ///
    /// Errors when it does not fit into memory, or when the shards do not keep to the limits given.
    pub async fn warmup(&mut self, limits: WarmupLimits) -> Result<Warm, ShardError> {
        warmup::run(&self.ranks, &limits).await
    }

    async fn attempt(&mut self, plan: &StepPlan) -> Result<StepOutput, ShardError> {
        let started = Instant::now();
        self.drop_rows(plan).await?;
        let drops = started.elapsed();
        let answer = match &plan.batch {
            Some(batch) => self.prefill(batch, plan).await?,
            None if plan.continues => self.decode(plan).await?,
            None => Answer::default(),
        };
        let (generations, failures) = wire::generations(answer.generations)?;
        let timings = super::Timings { drops, ..answer.timings };
        Ok(StepOutput { generations, failures, timings })
    }

    /// Filters every held batch to those that stay, in the order of the shards, and clears it if none does. Where shards
    /// understand it, rows that leave a batch in which others stay do so in the step itself.
    async fn drop_rows(&mut self, plan: &StepPlan) -> Result<(), ShardError> {
        let drops = &plan.drops;
        if drops.is_empty() {
            return Ok(());
        }
        let in_step = self.info.extensions.block_grants && plan.continues;
        let mut index = 0;
        while let Some(batch) = self.held.get(index) {
            let staying: Vec<u64> =
                batch.request_ids.iter().copied().filter(|id| !drops.contains(&RequestId(*id))).collect();
            if staying.is_empty() {
                self.ranks.clear_cache(Some(batch.id)).await?;
                self.held.remove(index);
                continue;
            }
            if staying.len() < batch.request_ids.len() && !in_step {
                self.held[index] = self.filter(batch.id, staying).await?;
            }
            index += 1;
        }
        Ok(())
    }

    /// Those of the rows that leave which the shards still hold.
    fn drops(&self, plan: &StepPlan) -> Vec<u64> {
        let held = |id: &u64| self.held.iter().any(|batch| batch.request_ids.contains(id));
        match self.info.extensions.block_grants {
            true => plan.drops.iter().map(|id| id.0).filter(held).collect(),
            false => Vec::new(),
        }
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

    /// Computes new rows; if others continue, they become one batch with these.
    async fn prefill(&mut self, new: &NewBatch, plan: &StepPlan) -> Result<Answer, ShardError> {
        // Where all that were held have left, there is nothing to join.
        let joins = plan.continues && !self.held.is_empty();
        let request = v3::PrefillRequest {
            batch: Some(wire::batch(new, &self.info)),
            cached_batch: if joins { self.held.first().cloned() } else { None },
            grants: wire::grants(&plan.grants),
            drops: if joins { self.drops(plan) } else { Vec::new() },
        };
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
    async fn decode(&mut self, plan: &StepPlan) -> Result<Answer, ShardError> {
        if self.held.is_empty() {
            return Err(gone());
        }
        let request = v3::DecodeRequest {
            batches: self.held.clone(),
            grants: wire::grants(&plan.grants),
            drops: self.drops(plan),
        };
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
        let hangs = self.recovery.hangs(self.ranks.health());
        let output = tokio::select! {
            biased;
            output = self.attempt(plan) => output,
            error = hangs => Err(error),
        };
        match &output {
            Ok(output) if !output.generations.is_empty() => self.recovery.stepped(),
            // Nothing has changed, or whoever brings the shards back clears them.
            Err(error) if error.is_refusal() || self.info.extensions.resume => {}
            Err(_) => self.forget(plan).await,
            Ok(_) => {}
        }
        output
    }

    async fn restore(&mut self, error: &ShardError) -> Result<Capacity, ShardError> {
        self.held.clear();
        let (ranks, info, capacity) = self.recovery.restore(&self.ranks, error).await?;
        (self.ranks, self.info) = (ranks, info);
        if let Some(adapters) = &self.adapters {
            // A request that names one which is not there any more will hear so from the shards.
            if let Err(error) = adapters.load_again().await {
                tracing::error!("an adapter could not be loaded again: {error}");
            }
        }
        Ok(capacity)
    }
}
