//! Who runs next.
//!
//! [`Scheduler`] is a plain struct: it owns the queue, the cache blocks and the running rows, and does no I/O and reads
//! no clock. Each turn of the batcher's loop is [`refill`](Scheduler::refill), [`plan`](Scheduler::plan), and then
//! [`apply`](Scheduler::apply) or [`fail`](Scheduler::fail).
//!
//! - Order is strictly first in, first out: nobody overtakes an older request, even one that does not fit yet.
//! - A request's blocks are leased when it is admitted, for all tokens it may reach, so a running row always fits.
//! - Every end of a running row goes through one `retire`, which gives the blocks back.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use proto::units::{BatchId, BlockCount, RequestId, TokenCount};
use tokio::sync::mpsc;

use super::Waiting;
use super::budget::{Limits, PrefillBudget, continue_prompts};
use super::dispatch::deliver;
use super::plan::{NewBatch, StepPlan};
use super::queue::{Queue, Queued};
use super::row::{Progress, Row};
use super::turns::Turns;
use crate::cache::BlockPool;
use crate::shards::{Generation, ShardError, StepOutput};

/// The queue, the cache blocks and the running rows.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    queue: Queue,
    pool: BlockPool,
    /// In the order in which the shards hold them.
    running: Vec<Row>,
    /// Rows that ended, of which the shards have not been told yet.
    drops: Vec<RequestId>,
    pass: Pass,
    turns: Turns,
    next_request: RequestId,
    next_batch: BatchId,
}

/// How a running row ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its last token is delivered.
    Finished,
    /// Its client left.
    Cancelled,
    /// Its step failed.
    Failed(ShardError),
}

/// What the planned step does to the running rows, by their index.
#[derive(Clone, Copy, Debug, Default)]
struct Pass {
    /// The first row that the pass computes; all behind it take part.
    computes_from: usize,
    /// The first row that is lost if the step fails; all behind it are.
    loses_from: usize,
}

/// How busy the scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests in the queue.
    pub waiting: usize,
    /// Requests in the batch.
    pub running: usize,
    /// Tokens that the leased blocks can hold.
    pub reserved: TokenCount,
    /// Leased blocks as a share of all, 0 to 1.
    pub cache_used: f64,
}

impl Scheduler {
    /// Nothing waits, nothing runs, all blocks are free.
    pub fn new(limits: Limits) -> Self {
        Self {
            queue: Queue::default(),
            pool: BlockPool::new(limits.capacity.blocks, limits.capacity.block_size),
            running: Vec::new(),
            drops: Vec::new(),
            pass: Pass::default(),
            turns: Turns::new(limits.prompts),
            next_request: RequestId(0),
            next_batch: BatchId(0),
            limits,
        }
    }

    /// Takes what has arrived; sleeps only when idle. False once every handle is gone and every request has ended.
    pub(super) async fn refill(&mut self, mail: &mut mpsc::Receiver<Waiting>) -> bool {
        if self.is_idle() {
            match mail.recv().await {
                Some(waiting) => self.submit(waiting),
                None => return false,
            }
        }
        while let Ok(waiting) = mail.try_recv() {
            self.submit(waiting);
        }
        true
    }

    /// Puts a request at the end of the queue, or answers it with an error if it can never run.
    pub fn submit(&mut self, waiting: Waiting) {
        let Waiting { request, events, queued } = waiting;
        if let Err(error) = self.limits.check(&request) {
            // A client that left does not hear of it.
            let _ = events.try_send(Err(error));
            return;
        }
        let id = self.next_request;
        self.next_request.0 += 1;
        self.queue.push(Queued { id, request: Arc::new(request), events, queued });
    }

    /// Decides the next step. `now` is what the admitted requests will report as their start.
    pub fn plan(&mut self, now: Instant) -> StepPlan {
        self.drop_departed();
        let drops = std::mem::take(&mut self.drops);
        let old = self.running.len();
        let batch = self.admit(now);
        self.turns.planned(batch.is_some());
        let continues = old > 0 && (batch.is_none() || self.turns.shares_passes());
        let plan = StepPlan { drops, batch, continues };
        self.pass = Pass {
            computes_from: if plan.continues { 0 } else { old },
            loses_from: if plan.touches_running() { 0 } else { old },
        };
        plan
    }

    /// Takes in what the planned step made: tokens go out, rows that ended give their blocks back.
    pub fn apply(&mut self, output: StepOutput) {
        self.advance();
        let mut answers: HashMap<RequestId, Generation> =
            output.generations.into_iter().map(|generation| (generation.request, generation)).collect();
        self.sweep(0, |row| deliver(row, answers.remove(&row.id)?));
        for id in answers.keys() {
            tracing::warn!(request_id = id.0, "the shards answered for a request that does not run");
        }
        self.check_integrity();
    }

    /// The planned step failed, and the shards have forgotten the rows it touched: each of them hears why.
    pub fn fail(&mut self, error: &ShardError) {
        self.sweep(self.pass.loses_from, |_| Some(Ending::Failed(error.clone())));
        self.drops.clear();
        self.check_integrity();
    }

    /// How busy the scheduler is.
    pub fn load(&self) -> Load {
        let (leased, total) = (self.pool.leased(), self.pool.total());
        Load {
            waiting: self.queue.len(),
            running: self.running.len(),
            reserved: leased.tokens(self.limits.capacity.block_size),
            cache_used: f64::from(leased.0) / f64::from(total.0.max(1)),
        }
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty() && self.drops.is_empty()
    }

    fn drop_departed(&mut self) {
        self.queue.drop_departed();
        self.sweep(0, |row| row.events.is_closed().then_some(Ending::Cancelled));
    }

    /// Moves waiting requests into the batch, as long as the oldest one fits.
    fn admit(&mut self, now: Instant) -> Option<NewBatch> {
        let old = self.running.len();
        let opening = self.turns.opening(old)?;
        if self.queue.len() < opening.at_least {
            return None;
        }
        let mut budget = PrefillBudget::new(&self.limits, self.tokens_next());
        while let Some(row) = self.admit_oldest(&mut budget, now) {
            self.running.push(row);
        }
        if self.running.len() - old < opening.at_least {
            self.put_back(old);
            return None;
        }
        let id = self.next_batch;
        self.next_batch.0 += 1;
        let admissions = self.running[old..].iter().map(Row::admission).collect();
        Some(NewBatch { id, admissions, joins: opening.reason })
    }

    /// A row for the oldest waiting request, if the batch, the pass and the cache have room for it.
    fn admit_oldest(&mut self, budget: &mut PrefillBudget, now: Instant) -> Option<Row> {
        if self.running.len() >= self.limits.rows_max() {
            return None;
        }
        let request = &self.queue.front()?.request;
        let prompt = request.prompt.length();
        let reach = self.limits.capacity.need(prompt, request.stopping.max_new_tokens);
        let chunk = budget.first_chunk(prompt)?;
        let lease = self.pool.lease(reach)?;
        budget.spend(chunk);
        let Queued { id, request, events, queued } = self.queue.pop().expect("it was at the front");
        let progress = Progress::Prompt { remaining: prompt, chunk };
        Some(Row { id, request, events, queued, started: now, lease, reach, progress })
    }

    /// Undoes admissions: the rows from `old` on wait again, in their order.
    fn put_back(&mut self, old: usize) {
        for row in self.running.drain(old..).rev() {
            let (entry, lease) = row.into_queued();
            self.pool.release(lease);
            self.queue.put_back(entry);
        }
    }

    /// Tokens that the running rows will feed into their next pass.
    fn tokens_next(&self) -> TokenCount {
        TokenCount(self.running.iter().map(|row| row.progress.tokens_next().0).sum())
    }

    /// Keeps the account of the prompts: one piece computed, the next piece set.
    fn advance(&mut self) {
        let rows = &mut self.running[self.pass.computes_from..];
        rows.iter_mut().for_each(|row| row.progress.advance());
        continue_prompts(rows.iter_mut().map(|row| &mut row.progress), self.limits.max_batch_prefill_tokens);
    }

    /// Asks every row from index `from` on whether it ends now, and retires those that do.
    fn sweep(&mut self, from: usize, mut verdict: impl FnMut(&Row) -> Option<Ending>) {
        // From the back, so that retiring many rows moves few.
        for index in (from..self.running.len()).rev() {
            if let Some(ending) = verdict(&self.running[index]) {
                let row = self.running.remove(index);
                self.retire(row, ending);
            }
        }
    }

    /// The one way out of the batch.
    fn retire(&mut self, row: Row, ending: Ending) {
        if let Ending::Failed(error) = ending {
            // A client that left does not hear of it.
            let _ = row.events.try_send(Err(error));
        }
        self.drops.push(row.id);
        self.pool.release(row.lease);
    }

    /// In debug builds: every block is free or leased, and every lease belongs to a running row.
    fn check_integrity(&self) {
        if cfg!(debug_assertions) {
            self.pool.integrity().expect("no block is lost");
            let held: u32 = self.running.iter().map(|row| row.lease.count().0).sum();
            assert_eq!(BlockCount(held), self.pool.leased(), "every lease belongs to a running row");
        }
    }
}

impl Drop for Scheduler {
    /// The runtime may stop while requests run; their leases go back like all others.
    fn drop(&mut self) {
        for row in self.running.drain(..) {
            self.pool.release(row.lease);
        }
    }
}
