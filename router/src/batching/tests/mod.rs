//! Tests of the scheduler (pure), of scheduler and shards together (random), and of the task around them.

use std::num::NonZeroUsize;
use std::time::Instant;

use proto::units::{BlockCount, BlockSize, RequestId, TokenCount, TokenId};
use tokio::sync::mpsc;

use super::{Capacity, Event, Limits, PromptPolicy, Scheduler, StepPlan, Waiting};
use crate::request::ValidRequest;
use crate::shards::scripted::{ScriptedShards, request};
use crate::shards::{Extensions, ShardError};

mod batcher;
mod on_demand;
mod scheduler;
mod simulation;

type Events = mpsc::Receiver<Result<Event, ShardError>>;

const WHOLE: PromptPolicy = PromptPolicy::Whole { waiting_served_ratio: 0.5, max_waiting_tokens: 4 };

/// Room for 160 tokens in 40 blocks, passes of 32 tokens.
fn limits(prompts: PromptPolicy) -> Limits {
    Limits {
        capacity: Capacity {
            blocks: BlockCount(41),
            block_size: BlockSize::new(4).unwrap(),
            speculate: TokenCount(0),
        },
        max_batch_prefill_tokens: TokenCount(32),
        max_batch_size: None,
        max_concurrent_requests: 64,
        prompts,
        extensions: Extensions::default(),
        shared_prompt_max: TokenCount(0),
        stretch: None,
    }
}

/// The same, with shards that understand everything.
fn on_demand() -> Limits {
    let extensions =
        Extensions { input_ids: true, resume: true, block_grants: true, ..Extensions::default() };
    Limits { extensions, shared_prompt_max: TokenCount(u32::MAX), ..limits(PromptPolicy::Chunked) }
}

fn at_most(rows: usize, limits: Limits) -> Limits {
    Limits { max_batch_size: NonZeroUsize::new(rows), ..limits }
}

/// A scheduler and its shards, driven step by step.
struct Bench {
    limits: Limits,
    scheduler: Scheduler,
    shards: ScriptedShards,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(limits.clone()),
            shards: ScriptedShards::new(limits.clone()),
            limits,
        }
    }

    fn submit(&mut self, prompt: u32, max_new_tokens: u32) -> Events {
        self.submit_request(request(prompt, max_new_tokens, 0))
    }

    fn submit_request(&mut self, request: ValidRequest) -> Events {
        let (waiting, events) = Waiting::new(request, Instant::now());
        self.scheduler.submit(waiting);
        events
    }

    /// One turn of the loop.
    fn step(&mut self) -> StepPlan {
        self.step_at(Instant::now())
    }

    fn step_at(&mut self, now: Instant) -> StepPlan {
        let plan = self.scheduler.plan(now);
        match self.shards.run(&plan) {
            Ok(output) => self.scheduler.apply(output),
            Err(error) if error.is_refusal() => {
                assert!(self.scheduler.refuse(&error), "somebody was to join")
            }
            Err(error) if self.scheduler.survives() => self.recover(&error),
            Err(error) => self.scheduler.fail(&error),
        }
        plan
    }

    /// The shards are gone, and come back as large as before.
    fn recover(&mut self, error: &ShardError) {
        self.scheduler.interrupt(error);
        self.shards.reset();
        self.scheduler.restart(self.limits.capacity);
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| drop(self.step()));
    }
}

/// Ids and chunk lengths of the rows that a plan admits.
fn admitted(plan: &StepPlan) -> Vec<(u64, u32)> {
    let rows = plan.batch.iter().flat_map(|batch| &batch.admissions);
    rows.map(|admission| (admission.id.0, admission.chunk.0)).collect()
}

fn ids(ids: &[u64]) -> Vec<RequestId> {
    ids.iter().copied().map(RequestId).collect()
}

/// What has come out of a channel so far: the tokens, and how the stream ended, if it did.
fn drain(events: &mut Events) -> (Vec<TokenId>, Option<Result<Event, ShardError>>) {
    let mut tokens = Vec::new();
    while let Ok(event) = events.try_recv() {
        match event {
            Ok(Event::Prompt(_)) => {}
            Ok(Event::Token(step)) => tokens.push(step.token.id),
            Ok(Event::Last(step, finished)) => {
                tokens.push(step.token.id);
                return (tokens, Some(Ok(Event::Last(step, finished))));
            }
            Err(error) => return (tokens, Some(Err(error))),
        }
    }
    (tokens, None)
}
