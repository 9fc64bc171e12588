//! One task that owns the queue, the blocks and the running batch.
//!
//! - `mod.rs`: the [`Batcher`] handle, and the loop.
//! - [`scheduler`]: who runs next: refill, plan, apply, and what becomes of a step that failed.
//! - `admission`: waiting requests enter the batch; `grants`: what running ones get for a step, and who has to leave.
//! - [`plan`]: what one step does.
//! - `entry`: a request from arrival to end, and its rank; `queue`: those that wait; `row`: one that runs.
//! - [`budget`]: token arithmetic: what fits, how to cut a long prompt; `pace`: how much of one beside running rows.
//! - `turns`: when new prompts may join running rows, and whose turn it is; `trial`: who may have made the shards fail.
//! - `recovery`: from the end of the shards to their return.
//! - `dispatch`: step output, to each request's own channel.
//! - [`events`]: what a request hears.
//! - `meter`: the loop, seen by the metrics.
//!
//! What is absent: I/O, which is behind [`Shards`], and locks, because one task owns all of it.

use std::time::Instant;

use thiserror::Error;
use tokio::sync::{Semaphore, mpsc};

use self::meter::Meter;
use self::recovery::{farewell, recover};
use crate::availability::Availability;
use crate::metrics::Metrics;
use crate::request::ValidRequest;
use crate::shards::{ShardError, Shards};

mod admission;
pub mod budget;
mod dispatch;
mod entry;
pub mod events;
mod grants;
mod meter;
mod pace;
pub mod plan;
mod queue;
mod recovery;
mod row;
pub mod scheduler;
mod trial;
mod turns;

#[cfg(test)]
mod tests;

pub use budget::{Capacity, Limits, PromptPolicy};
pub use events::{Event, FinishReason, Finished, PromptToken, Step, Token};
pub use plan::{Admission, Grant, JoinReason, NewBatch, StepKind, StepPlan};
pub use scheduler::{Load, Scheduler, Tally};

/// A request on its way into the queue.
#[derive(Debug)]
pub struct Waiting {
    /// What to generate.
    pub request: ValidRequest,
    /// Where its events go. As deep as its number of tokens and events can be, so that the batcher never waits for a
    /// client; closed when the client leaves.
    pub events: mpsc::Sender<Result<Event, ShardError>>,
    /// When it was handed over.
    pub queued: Instant,
}

impl Waiting {
    /// A request with a channel of the right depth, and the end where its events come out.
    pub fn new(request: ValidRequest, queued: Instant) -> (Self, mpsc::Receiver<Result<Event, ShardError>>) {
        // One event per token, one for the prompt, one for an error.
        let depth = request.stopping.max_new_tokens.0 as usize + 2;
        let (events, stream) = mpsc::channel(depth);
        (Self { request, events, queued }, stream)
    }
}

/// The batcher has ended; no request can be served any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the batcher has stopped")]
pub struct Stopped;

/// Handle to the batcher. Cheap to clone; all state lives in one task.
#[derive(Clone, Debug)]
pub struct Batcher {
    pub(crate) inbox: mpsc::Sender<Waiting>,
    pub(crate) metrics: Metrics,
}

impl Batcher {
    /// Starts the task that owns the queue, the blocks and the running batch.
    ///
    /// It ends once every handle is dropped and every request has ended. Must be called inside a tokio runtime.
    pub fn start(shards: impl Shards, limits: Limits, metrics: Metrics, availability: Availability) -> Self {
        metrics.capacity(limits.capacity.usable());
        // As deep as the admission limit, so that whoever holds a permit finds room, except behind requests whose clients
        // have left: these stay here until the step under way ends, and the handler waits as long.
        let (inbox, mail) = mpsc::channel(limits.max_concurrent_requests.clamp(1, Semaphore::MAX_PERMITS));
        tokio::spawn(run(mail, shards, Scheduler::new(limits), Meter::new(metrics.clone()), availability));
        Self { inbox, metrics }
    }

    /// Hands a request over. Errors when the batcher has ended.
    pub async fn submit(&self, waiting: Waiting) -> Result<(), Stopped> {
        // Counted before it is sent: the batcher sets the exact number once it has it.
        self.metrics.queue_entered();
        self.inbox.send(waiting).await.map_err(|_| {
            self.metrics.queue_refused();
            Stopped
        })
    }

    /// Resolves when the task has ended, which it does not while there are handles, unless it has panicked.
    pub async fn ended(&self) {
        self.inbox.closed().await;
    }

    /// Whether the task still runs.
    pub fn is_alive(&self) -> bool {
        !self.inbox.is_closed()
    }
}

async fn run(
    mut mail: mpsc::Receiver<Waiting>,
    mut shards: impl Shards,
    mut scheduler: Scheduler,
    mut meter: Meter,
    availability: Availability,
) {
    // Take what has arrived; sleep only when idle.
    while scheduler.refill(&mut mail).await {
        let plan = scheduler.plan(Instant::now()); // decide: pure, no I/O
        meter.planned(&plan, &scheduler.load(), mail.len());
        let answer = shards.step(&plan).await; // one forward pass, on every shard
        meter.answered(&answer);
        match answer {
            Ok(output) => scheduler.apply(output), // tokens out, blocks of finished requests back
            Err(error) if error.is_refusal() && scheduler.refuse(&error) => {} // the new ones are told
            Err(error) if scheduler.survives() => {
                // Everybody goes on when the shards are back.
                availability.recovering(&error.to_string());
                if let Err(error) = recover(&mut shards, &mut scheduler, &mut mail, &error).await {
                    availability.failed(&error.to_string());
                    return farewell(&mut mail, &error).await;
                }
                availability.serving();
                meter.restarted();
            }
            Err(error) => scheduler.fail(&error), // every request the step touched is told
        }
        meter.delivered(&scheduler.load(), scheduler.take_tally(), mail.len());
    }
}
