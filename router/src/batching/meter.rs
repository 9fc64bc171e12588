//! The batcher's loop, seen by the metrics: what each turn counts, and when. What becomes of requests is
//! not counted here but where they were taken, in `infer.rs`.

use std::time::{Duration, Instant};

use super::plan::{StepKind, StepPlan};
use super::scheduler::{Load, Tally};
use crate::metrics::Metrics;
use crate::shards::{ShardError, StepOutput, Timings};

/// Follows one turn of the loop after the other.
#[derive(Debug)]
pub(super) struct Meter {
    metrics: Metrics,
    /// The step under way.
    step: Option<Step>,
}

#[derive(Debug)]
struct Step {
    kind: StepKind,
    sent: Instant,
    answered: Option<(Instant, Timings)>,
}

impl Meter {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics, step: None }
    }

    /// A step is about to be sent; `inbox` requests have not reached the queue yet.
    pub(super) fn planned(&mut self, plan: &StepPlan, load: &Load, inbox: usize) {
        self.metrics.load(load, inbox);
        if let Some(batch) = &plan.batch {
            self.metrics.batch_formed(batch.admissions.len(), batch.joins);
        }
        self.step = plan.kind().map(|kind| {
            self.metrics.step_sent(kind);
            Step { kind, sent: Instant::now(), answered: None }
        });
    }

    /// The shards have answered.
    pub(super) fn answered(&mut self, answer: &Result<StepOutput, ShardError>) {
        match (answer, &mut self.step) {
            (Ok(output), Some(step)) => {
                step.answered = Some((Instant::now(), output.timings));
                let generations = output.generations.iter();
                generations.for_each(|generation| self.metrics.generation(generation.tokens()));
            }
            (Ok(_), None) => {}
            (Err(error), step) => {
                tracing::error!(%error, "the step failed");
                if let Some(step) = step {
                    self.metrics.step_failed(step.kind);
                }
            }
        }
    }

    /// The shards were started again.
    pub(super) fn restarted(&self) {
        self.metrics.shard_restarted();
    }

    /// Tokens are out, ended rows are retired.
    pub(super) fn delivered(&mut self, load: &Load, tally: Tally, inbox: usize) {
        self.metrics.load(load, inbox);
        let Tally { preempted, prompt_tokens, cached_tokens } = tally;
        self.metrics.preempted(preempted);
        self.metrics.prompts_cached(cached_tokens, prompt_tokens);
        self.metrics.blocks_cached(load.cached);
        let Some(Step { kind, sent, answered: Some((answered, timings)) }) = self.step.take() else { return };
        let filter: Duration = timings.drops + answered.elapsed();
        self.metrics.step_done(kind, sent.elapsed(), filter, &timings);
    }
}
