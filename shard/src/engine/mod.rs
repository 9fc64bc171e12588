//! The engine: one thread that owns model, cache and batches, and takes commands from a mailbox.
//!
//! - [`request`]: a request that arrives, and every check on its way into a batch; [`step_plan`]: what a router decides
//!   about those that are in one.
//! - [`row`], [`batch`]: a request on the shard, and those that step together; [`slots`]: where their tokens lie.
//! - [`inputs`], [`step`]: rows to flat inputs; inputs to forward pass to tokens to text.
//! - [`adapters`]: the adapters that requests can name.
//! - [`commands`]: what the thread owns, and what each command does; [`warmup`]: how large the cache is.
//! - [`answer`], [`error`]: what comes back.
//! - [`pulse`]: the heartbeat that Health reads.
//!
//! Invariants: only the engine thread touches the model; commands run one after another, in the order of the mailbox; a
//! command that fails, or panics, costs at most the batches it named. Where several processes serve one model, a step that
//! fails in one ends the engines of all: they could never again be sure to be at the same step. A device that fails ends the
//! engine as well: whoever started the process starts it again.

pub mod adapters;
pub mod answer;
pub mod batch;
pub mod commands;
pub mod error;
pub mod inputs;
pub mod pulse;
pub mod request;
pub mod row;
pub mod slots;
pub mod step;
pub mod step_plan;
pub mod warmup;

#[cfg(test)]
mod tests;

use std::any::Any;
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use proto::units::{BatchId, RequestId};
use tokio::sync::{mpsc, oneshot};

use self::adapters::AdapterId;
use self::answer::{BatchSummary, Capacity, StepReport};
use self::commands::{Core, Parts};
use self::error::{EngineError, Unhealthy};
use self::pulse::Pulse;
use self::request::NewBatch;
use self::step_plan::StepPlan;
use self::warmup::Warmup;
use crate::collective::Ranks;
use crate::layers::Adapter;

/// Commands that may wait. A router has one or two under way.
const MAILBOX: usize = 16;

/// Handle to the engine. Cheap to clone; the thread ends when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Engine {
    mailbox: mpsc::Sender<Command>,
    pulse: Arc<Pulse>,
}

type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

#[derive(Debug)]
enum Command {
    Prefill { batch: NewBatch, onto: Option<BatchId>, plan: StepPlan, reply: Reply<StepReport> },
    Decode { batches: Vec<BatchId>, plan: StepPlan, reply: Reply<StepReport> },
    Filter { batch: BatchId, keep: Vec<RequestId>, reply: Reply<BatchSummary> },
    Clear { batch: Option<BatchId>, reply: Reply<()> },
    WarmUp { warmup: Warmup, reply: Reply<Capacity> },
    AddAdapter { id: AdapterId, adapter: Arc<Adapter>, reply: Reply<()> },
    RemoveAdapter { id: AdapterId, reply: Reply<()> },
    Adapters { reply: Reply<Vec<AdapterId>> },
}

impl Engine {
    /// Starts the engine thread. Errors when the system has no thread to give.
    pub fn start(parts: Parts) -> io::Result<Self> {
        let (mailbox, mail) = mpsc::channel(MAILBOX);
        let pulse = Pulse::new(parts.step_patience);
        let own = Arc::clone(&pulse);
        let span = tracing::Span::current();
        thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || span.in_scope(|| run(Core::new(parts), mail, &own)))?;
        Ok(Self { mailbox, pulse })
    }

    /// Adds a batch, behind the requests of `onto` if one is named, for which the plan is, and runs a step.
    pub async fn prefill(
        &self,
        batch: NewBatch,
        onto: Option<BatchId>,
        plan: StepPlan,
    ) -> Result<StepReport, EngineError> {
        self.ask(|reply| Command::Prefill { batch, onto, plan, reply }).await
    }

    /// Joins the named batches in order, and runs a step by the plan.
    pub async fn decode(&self, batches: Vec<BatchId>, plan: StepPlan) -> Result<StepReport, EngineError> {
        self.ask(|reply| Command::Decode { batches, plan, reply }).await
    }

    /// Keeps the named requests of a batch, in the named order.
    pub async fn filter(&self, batch: BatchId, keep: Vec<RequestId>) -> Result<BatchSummary, EngineError> {
        self.ask(|reply| Command::Filter { batch, keep, reply }).await
    }

    /// Forgets one batch, or all. Unknown ids are ignored.
    pub async fn clear(&self, batch: Option<BatchId>) -> Result<(), EngineError> {
        self.ask(|reply| Command::Clear { batch, reply }).await
    }

    /// Takes the memory of the largest prefill, runs a small one, and makes the cache. All batches are forgotten.
    pub async fn warm_up(&self, warmup: Warmup) -> Result<Capacity, EngineError> {
        self.ask(|reply| Command::WarmUp { warmup, reply }).await
    }

    /// Lets requests name this adapter. Errors when the id is taken.
    pub async fn add_adapter(&self, id: AdapterId, adapter: Adapter) -> Result<(), EngineError> {
        let adapter = Arc::new(adapter);
        self.ask(|reply| Command::AddAdapter { id, adapter, reply }).await
    }

    /// Forgets an adapter; requests that have begun with it keep it. Unknown ids are ignored.
    pub async fn remove_adapter(&self, id: AdapterId) -> Result<(), EngineError> {
        self.ask(|reply| Command::RemoveAdapter { id, reply }).await
    }

    /// The adapters that requests can name, in the order of their ids.
    pub async fn adapters(&self) -> Result<Vec<AdapterId>, EngineError> {
        self.ask(|reply| Command::Adapters { reply }).await
    }

    /// Whether steps can be made. Answers at once, whatever the engine is doing.
    pub fn health(&self) -> Result<(), Unhealthy> {
        self.pulse.check()
    }

    /// Ready when the engine has ended by itself, which it does when this process can make no more steps.
    pub async fn ended(&self) {
        self.mailbox.closed().await;
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(command(reply)).await.map_err(|_| EngineError::Gone)?;
        answer.await.map_err(|_| EngineError::Gone)?
    }
}

fn run(mut core: Core, mut mail: mpsc::Receiver<Command>, pulse: &Arc<Pulse>) {
    let _life = pulse.life();
    let ranks = core.ranks().clone();
    while let Some(command) = mail.blocking_recv() {
        let next = match command {
            Command::Prefill { batch, onto, plan, reply } => {
                let _beat = pulse.beat();
                answer(&ranks, reply, || core.prefill(batch, onto, &plan))
            }
            Command::Decode { batches, plan, reply } => {
                let _beat = pulse.beat();
                answer(&ranks, reply, || core.decode(&batches, &plan))
            }
            Command::Filter { batch, keep, reply } => answer(&ranks, reply, || core.filter(batch, &keep)),
            Command::Clear { batch, reply } => answer(&ranks, reply, || {
                core.clear(batch);
                Ok(())
            }),
            Command::AddAdapter { id, adapter, reply } => {
                answer(&ranks, reply, || core.adapters().add(id, adapter))
            }
            Command::RemoveAdapter { id, reply } => answer(&ranks, reply, || {
                core.adapters().remove(&id);
                Ok(())
            }),
            Command::Adapters { reply } => answer(&ranks, reply, || Ok(core.adapters().ids())),
            // Not a beat: how long it may take is what it finds out.
            Command::WarmUp { warmup, reply } => {
                pulse.set_warm(false);
                answer(&ranks, reply, || {
                    let capacity = core.warm_up(warmup)?;
                    pulse.observe(core.step_expected());
                    pulse.set_warm(true);
                    Ok(capacity)
                })
            }
        };
        if next.is_break() {
            return;
        }
    }
}

/// Does the work and sends what comes of it, be it a panic. After one, the core is whole: the batches of the step have been
/// taken out of it, and caches and buffers hold nothing that a later step reads before it writes.
///
/// But other ranks may wait for this one in the middle of that step. They are told, and then it is over for all.
fn answer<T>(
    ranks: &Ranks,
    reply: Reply<T>,
    work: impl FnOnce() -> Result<T, EngineError>,
) -> ControlFlow<()> {
    let outcome = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(panic.as_ref()))));
    let mut next = ControlFlow::Continue(());
    if let Err(error) = &outcome {
        tracing::error!(%error, "command failed");
        if error.parts_ranks() && ranks.give_up() {
            tracing::error!("the shards of this model are no longer in step: this one ends");
            next = ControlFlow::Break(());
        } else if error.is_final() {
            tracing::error!("the device has failed: this shard ends");
            next = ControlFlow::Break(());
        }
    }
    // A caller that has gone away wants no answer.
    drop(reply.send(outcome));
    next
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}
