//! Who runs next.
//!
//! [`Scheduler`] is a plain struct: it owns the queue, the cache blocks and the running rows, and does no I/O and reads
//! no clock. Each turn of the batcher's loop is [`refill`](Scheduler::refill), [`plan`](Scheduler::plan), and then
//! [`apply`](Scheduler::apply), [`refuse`](Scheduler::refuse), [`fail`](Scheduler::fail), or
//! [`interrupt`](Scheduler::interrupt) and [`restart`](Scheduler::restart).
//!
//! - Requests are served in the order of their [`Rank`](super::entry::Rank): first in, first out, but for priorities.
//! - Where the shards understand it, a row has blocks for what it has computed and for its next pass (`grants.rs`), and
//!   leaves the batch for a while when there are none left. Otherwise it gets blocks for all it may reach when it is
//!   admitted (`admission.rs`).
//! - Every end of a running row goes through one `retire`, which gives the blocks back.

use std::collections::HashMap;
use std::time::Instant;

use proto::units::{BatchId, BlockCount, RequestId, TokenCount};
use tokio::sync::mpsc;

use super::Waiting;
use super::budget::{Capacity, Limits, continue_prompts};
use super::dispatch::deliver;
use super::entry::{Departure, Entry};
use super::pace::Pace;
use super::plan::{NewBatch, StepPlan};
use super::queue::Queue;
use super::row::Row;
use super::turns::{Company, Turns};
use crate::cache::BlockCache;
use crate::shards::{Generation, ShardError, StepOutput};

/// The queue, the cache blocks and the running rows.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) limits: Limits,
    pub(super) queue: Queue,
    pub(super) cache: BlockCache,
    /// In the order in which the shards hold them.
    pub(super) running: Vec<Row>,
    /// Rows that ended or left, of which the shards have not been told yet.
    drops: Vec<RequestId>,
    pass: Pass,
    pub(super) turns: Turns,
    pub(super) pace: Pace,
    pub(super) tally: Tally,
    next_request: RequestId,
    pub(super) next_batch: BatchId,
}

/// How a running row ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its last token is delivered.
    Finished,
    /// Its client left.
    Cancelled,
    /// Its step failed, or its time is over.
    Failed(ShardError),
}

/// What the planned step does to the running rows, by their index.
#[derive(Clone, Debug, Default)]
struct Pass {
    /// The first row that the pass computes; all behind it take part, unless they sit it out.
    computes_from: usize,
    /// The first row that is lost if the step fails; all behind it are.
    loses_from: usize,
    /// The first row that joins.
    joins_from: usize,
    /// Whether those before it go on.
    continues: bool,
    /// What the shards are told to drop.
    drops: Vec<RequestId>,
}

/// How busy the scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests in the queue.
    pub waiting: usize,
    /// Requests in the batch.
    pub running: usize,
    /// Tokens that the blocks of the running rows can hold.
    pub reserved: TokenCount,
    /// These blocks as a share of all, 0 to 1.
    pub cache_used: f64,
    /// Blocks that no row holds, and that are kept for requests that begin as others did.
    pub cached: BlockCount,
}

/// What has happened since the last [`Scheduler::take_tally`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows that had to leave the batch for others.
    pub preempted: u64,
    /// Tokens of the prompts that were admitted, each prompt once.
    pub prompt_tokens: u64,
    /// Those of them that were in the cache.
    pub cached_tokens: u64,
}

impl Scheduler {
    /// Nothing waits, nothing runs, all blocks are free.
    pub fn new(limits: Limits) -> Self {
        Self {
            queue: Queue::default(),
            cache: cache(&limits),
            running: Vec::new(),
            drops: Vec::new(),
            pass: Pass::default(),
            turns: Turns::new(limits.prompts),
            pace: Pace::new(limits.stretch),
            tally: Tally::default(),
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

    /// Puts a request into the queue, or answers it with an error if it can never run.
    pub fn submit(&mut self, waiting: Waiting) {
        let Waiting { request, events, queued } = waiting;
        let id = self.next_request;
        self.next_request.0 += 1;
        let entry = Entry::new(id, request, events, queued);
        match self.limits.check(&entry.request) {
            Ok(()) => self.queue.push(entry),
            Err(error) => entry.fail(error),
        }
    }

    /// Decides the next step. `now` is what the admitted requests will report as their start.
    pub fn plan(&mut self, now: Instant) -> StepPlan {
        self.drop_departed(now);
        let company = self.company();
        let (mut old, mut batch) = self.gather(company, now);
        let is_empty = batch.is_none() && self.running.iter().all(|row| row.progress.next.0 == 0);
        if company == Company::Tried && is_empty {
            // It does not fit yet: the others need not wait for it.
            (old, batch) = self.gather(Company::Others, now);
        }
        self.turns.planned(batch.is_some());
        let continues = match self.limits.on_demand() {
            true => old > 0 && self.running.iter().any(|row| row.progress.next.0 > 0),
            false => old > 0 && (batch.is_none() || self.turns.shares_passes()),
        };
        let mut plan =
            StepPlan { drops: std::mem::take(&mut self.drops), batch, continues, grants: Vec::new() };
        if self.limits.on_demand() && continues {
            plan.grants = self.running[..old].iter().filter_map(Row::grant).collect();
        }
        self.pass = Pass {
            computes_from: if plan.continues { 0 } else { old },
            loses_from: if plan.touches_running() { 0 } else { old },
            joins_from: old,
            continues: plan.continues,
            drops: plan.drops.clone(),
        };
        plan
    }

    /// Gives running rows what they need for the next pass and admits others. How many of the rows ran before.
    fn gather(&mut self, company: Company, now: Instant) -> (usize, Option<NewBatch>) {
        if self.limits.on_demand() {
            self.grant(company);
        }
        let old = self.running.len();
        (old, self.admit(company, now))
    }

    /// Takes in what the planned step made: tokens go out, what was computed is there for others, rows that ended give
    /// their blocks back.
    pub fn apply(&mut self, output: StepOutput) {
        self.observe(&output);
        self.advance();
        let mut answers: HashMap<RequestId, Generation> =
            output.generations.into_iter().map(|generation| (generation.request, generation)).collect();
        let mut failures: HashMap<RequestId, ShardError> = output.failures.into_iter().collect();
        self.sweep(|row| {
            if let Some(error) = failures.remove(&row.entry.id) {
                return Some(Ending::Failed(error));
            }
            match answers.remove(&row.entry.id) {
                Some(generation) => deliver(row, generation),
                None => row.is_owed_a_token().then(|| Ending::Failed(no_token(row.entry.id))),
            }
        });
        for id in answers.keys().chain(failures.keys()) {
            tracing::warn!(request_id = id.0, "the shards answered for a request that does not run");
        }
        self.check_integrity();
    }

    /// The shards would not carry the planned step out, and nothing has changed there: the rows that were to join hear why.
    /// False if there were none, so that the fault lies elsewhere.
    pub fn refuse(&mut self, error: &ShardError) -> bool {
        let joining = self.pass.joins_from;
        if joining == self.running.len() {
            return false;
        }
        for row in self.running.drain(joining..).rev() {
            row.entry.fail(error.clone());
            self.cache.release(row.lease);
        }
        self.drops.append(&mut self.pass.drops);
        self.check_integrity();
        true
    }

    /// The planned step failed, and the shards have forgotten the rows it touched: each of them hears why.
    pub fn fail(&mut self, error: &ShardError) {
        for row in self.running.drain(self.pass.loses_from..).rev() {
            row.entry.fail(error.clone());
            self.cache.release(row.lease);
        }
        self.drops.clear();
        self.check_integrity();
    }

    /// The shards are gone, and all they held. Running rows wait again, in their old places; those that may be to blame
    /// are on trial when they come back, and those that are have their answer.
    pub fn interrupt(&mut self, error: &ShardError) {
        let computes_from = self.pass.computes_from;
        for (index, row) in self.running.drain(..).enumerate() {
            let Row { mut entry, lease, progress, .. } = row;
            self.cache.release(lease);
            if index >= computes_from && progress.next.0 > 0 {
                match entry.standing.after_failure(entry.generated()) {
                    Some(standing) => entry.standing = standing,
                    None => {
                        entry.fail(ShardError::Poisonous(error.to_string()));
                        continue;
                    }
                }
            }
            self.queue.push(entry);
        }
        self.drops.clear();
        self.pass = Pass::default();
        self.check_integrity();
    }

    /// There are shards again, with an empty cache of this size. Requests that do not fit into it any more hear so.
    pub fn restart(&mut self, capacity: Capacity) {
        debug_assert!(self.running.is_empty(), "rows were interrupted");
        self.limits.capacity = capacity;
        self.cache = cache(&self.limits);
        self.turns = Turns::new(self.limits.prompts);
        let Self { queue, limits, .. } = self;
        queue.fail_where(|entry| limits.check(&entry.request).err());
    }

    /// There will be no shards any more.
    pub fn abandon(&mut self, error: &ShardError) {
        debug_assert!(self.running.is_empty(), "rows were interrupted");
        self.queue.fail_where(|_| Some(error.clone()));
    }

    /// Ends what nobody wants any more.
    pub fn drop_departed(&mut self, now: Instant) {
        self.queue.drop_departed(now);
        self.sweep(|row| match row.entry.is_over(now)? {
            Departure::Left => Some(Ending::Cancelled),
            Departure::Late(after) => Some(Ending::Failed(ShardError::Deadline(after))),
        });
    }

    /// How busy the scheduler is.
    pub fn load(&self) -> Load {
        let (held, total) = (self.cache.held(), self.cache.total());
        Load {
            waiting: self.queue.len(),
            running: self.running.len(),
            reserved: held.tokens(self.limits.capacity.block_size),
            cache_used: f64::from(held.0) / f64::from(total.0.max(1)),
            cached: self.cache.idle(),
        }
    }

    /// What has happened since this was asked last.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Whether requests survive the end of their shards.
    pub fn survives(&self) -> bool {
        self.limits.extensions.input_ids && self.limits.extensions.resume
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty() && self.drops.is_empty()
    }

    /// Whose turn it is, if a request is tried: its own, and that of all others, alternate.
    fn company(&mut self) -> Company {
        let standings = || {
            let running = self.running.iter().map(|row| row.entry.standing);
            running.chain(self.queue.iter().map(|(_, entry)| entry.standing))
        };
        let tried = self.limits.on_demand() && standings().any(|standing| standing.is_tried());
        let others = tried && standings().any(|standing| !standing.is_tried());
        self.turns.company(tried, others)
    }

    /// Keeps the account of the passes: what was computed, and which pieces of prompts come next.
    fn advance(&mut self) {
        let on_demand = self.limits.on_demand();
        let most = self.limits.max_batch_prefill_tokens;
        let rows = &mut self.running[self.pass.computes_from..];
        rows.iter_mut().for_each(|row| row.progress.advance());
        if !on_demand {
            continue_prompts(rows.iter_mut().map(|row| &mut row.progress), most);
        }
        // Where nobody went on, nobody was granted anything, whatever had been planned for a step that was refused.
        let told_from = if self.pass.continues { 0 } else { self.pass.joins_from };
        self.running[told_from..].iter_mut().for_each(|row| row.told = row.lease.blocks().len());
    }

    fn observe(&mut self, output: &StepOutput) {
        let rows = &self.running[self.pass.computes_from..];
        let (input, generating): (Vec<&Row>, Vec<&Row>) =
            rows.iter().filter(|row| row.progress.next.0 > 0).partition(|row| row.progress.is_input());
        let prompt = TokenCount(input.iter().map(|row| row.progress.next.0).sum());
        if prompt.0 > 0 || !generating.is_empty() {
            self.pace.observe(generating.len(), prompt, output.timings.total);
        }
    }

    /// Asks every row whether it ends now, and retires those that do. What the others have computed is published.
    fn sweep(&mut self, mut verdict: impl FnMut(&mut Row) -> Option<Ending>) {
        // From the back, so that retiring many rows moves few.
        for index in (0..self.running.len()).rev() {
            let row = &mut self.running[index];
            match verdict(row) {
                None if row.shares => {
                    self.cache.publish(&mut row.lease, &row.entry.tokens, row.progress.computed);
                }
                None => {}
                Some(ending) => {
                    let row = self.running.remove(index);
                    self.retire(row, ending);
                }
            }
        }
    }

    /// The one way out of the batch for good.
    fn retire(&mut self, row: Row, ending: Ending) {
        let entry = self.leave(row);
        if let Ending::Failed(error) = ending {
            entry.fail(error);
        }
    }

    /// The one way out of the batch, while there are shards: its blocks go back, the shards will be told, and what it has
    /// computed may be used by others.
    pub(super) fn leave(&mut self, row: Row) -> Entry {
        let Row { entry, lease, shares, progress, .. } = row;
        self.drops.push(entry.id);
        match shares {
            true => self.cache.finish(lease, &entry.tokens, progress.computed),
            false => self.cache.release(lease),
        }
        entry
    }

    /// In debug builds: every block is free, cached or leased, and every lease belongs to a running row.
    fn check_integrity(&self) {
        if cfg!(debug_assertions) {
            self.cache.integrity().expect("no block is lost");
            let own: u32 = self.running.iter().map(|row| row.lease.own().0).sum();
            assert_eq!(BlockCount(own), self.cache.leased(), "every lease belongs to a running row");
        }
    }
}

fn cache(limits: &Limits) -> BlockCache {
    let Capacity { blocks, block_size, .. } = limits.capacity;
    BlockCache::new(blocks, block_size, limits.shares())
}

fn no_token(id: RequestId) -> ShardError {
    ShardError::Answer(format!("no token for request {id}"))
}

impl Drop for Scheduler {
    /// The runtime may stop while requests run; their leases go back like all others.
    fn drop(&mut self) {
        for row in self.running.drain(..) {
            self.cache.release(row.lease);
        }
    }
}
