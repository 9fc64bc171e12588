//! Waiting requests enter the batch: in the order of their rank, as long as batch, pass and cache have room for them.
//!
//! One that does not fit holds up those behind it, but for a while: so many may overtake it, and then nobody does.

use std::time::Instant;

use proto::units::{BlockCount, TokenCount, TokenId};

use super::budget::PrefillBudget;
use super::entry::{Entry, Rank};
use super::plan::NewBatch;
use super::row::{Progress, Row};
use super::scheduler::Scheduler;
use super::turns::Company;

/// Requests that may be admitted before one that came earlier, because they fit into the cache and it does not.
const OVERTAKEN_MAX: u32 = 16;
/// Waiting requests that are looked at in one step behind one that does not fit.
const LOOK_AHEAD: usize = 16;

impl Scheduler {
    /// Moves waiting requests into the batch.
    pub(super) fn admit(&mut self, company: Company, now: Instant) -> Option<NewBatch> {
        let old = self.running.len();
        let opening = self.turns.opening(old)?;
        if self.queue.len() < opening.at_least {
            return None;
        }
        match company {
            Company::Others => self.admit_others(),
            Company::Tried => self.admit_tried(),
        }
        if self.running.len() - old < opening.at_least {
            self.put_back(old);
            return None;
        }
        let id = self.next_batch;
        self.next_batch.0 += 1;
        self.running[old..]
            .iter_mut()
            .for_each(|row| row.entry.enter(row.progress.computed, now, &mut self.tally));
        let admissions = self.running[old..].iter().map(|row| row.admission(self.reach_at_once(&row.entry)));
        Some(NewBatch { id, admissions: admissions.collect(), joins: opening.reason })
    }

    fn admit_others(&mut self) {
        let mut budget = self.prefill_budget();
        let mut blocked: Vec<Rank> = Vec::new();
        loop {
            if self.running.len() >= self.limits.rows_max() {
                return;
            }
            let candidates = self.queue.iter().filter(|(_, entry)| !entry.standing.is_tried());
            let Some((rank, entry)) = candidates.skip(blocked.len()).take(1).next() else { return };
            let Some(chunk) = budget.first_chunk(self.uncached(entry)) else { return };
            if !self.has_room(entry) {
                let waits = entry.overtaken >= OVERTAKEN_MAX || blocked.len() >= LOOK_AHEAD;
                if waits || !self.limits.on_demand() {
                    return;
                }
                blocked.push(rank);
                continue;
            }
            budget.spend(chunk);
            self.queue.note_overtaken(&blocked);
            self.start(rank, chunk);
        }
    }

    /// A request that is tried enters a pass of its own, unless one is running already.
    fn admit_tried(&mut self) {
        let is_running = self.running.iter().any(|row| row.entry.standing.is_tried());
        if is_running || self.running.len() >= self.limits.rows_max() {
            return;
        }
        let Some((rank, entry)) = self.queue.iter().find(|(_, entry)| entry.standing.is_tried()) else {
            return;
        };
        let chunk = self.prefill_budget().first_chunk(self.uncached(entry));
        if let (true, Some(chunk)) = (self.has_room(entry), chunk) {
            self.start(rank, chunk);
        }
    }

    fn prefill_budget(&self) -> PrefillBudget {
        match self.limits.on_demand() {
            true => PrefillBudget::new(&self.limits, TokenCount(0), self.prompt_tokens_max()),
            false => {
                let running = self.running.iter().map(|row| row.progress.next.0).sum();
                PrefillBudget::new(&self.limits, TokenCount(running), TokenCount(u32::MAX))
            }
        }
    }

    /// Tokens that a request would have to compute.
    fn uncached(&self, entry: &Entry) -> TokenCount {
        let (cached, _) = self.cache.probe(entry.request.adapter_key(), self.lookup(entry));
        TokenCount(entry.length().0 - cached.0)
    }

    /// Whether the cache has room for all that a request comes with and its next token, and leaves a block for each running
    /// row; or for all it may ever reach.
    fn has_room(&self, entry: &Entry) -> bool {
        let (cached, available) = self.cache.probe(entry.request.adapter_key(), self.lookup(entry));
        let block_size = self.limits.capacity.block_size;
        let blocks =
            |tokens: TokenCount| BlockCount(tokens.blocks(block_size).0 - cached.blocks(block_size).0);
        match self.reach_at_once(entry) {
            Some(reach) => blocks(reach) <= available,
            None => {
                let reach = TokenCount(entry.length().0 + 1).min(self.reach(entry));
                blocks(reach).0 + self.running.len() as u32 <= available.0
            }
        }
    }

    /// The tokens whose keys and values may come from the cache: none if their logits are wanted, or if they depend on more
    /// than the tokens before them.
    fn lookup<'a>(&self, entry: &'a Entry) -> &'a [TokenId] {
        let wants_all = entry.request.prompt_logprobs && entry.generated() == TokenCount(0);
        if wants_all || !self.shares(entry) { &[] } else { &entry.tokens }
    }

    fn shares(&self, entry: &Entry) -> bool {
        entry.request.prompt.length() <= self.limits.shared_prompt_max
    }

    /// Tokens whose keys and values a request may have to store.
    fn reach(&self, entry: &Entry) -> TokenCount {
        let request = &entry.request;
        self.limits.capacity.need(request.prompt.length(), request.stopping.max_new_tokens)
    }

    /// The same, where a row gets blocks for all of it at once.
    fn reach_at_once(&self, entry: &Entry) -> Option<TokenCount> {
        (!self.limits.on_demand()).then(|| self.reach(entry))
    }

    /// Makes a row of a waiting request that fits, and whose first pass computes `chunk` tokens.
    fn start(&mut self, rank: Rank, chunk: TokenCount) {
        let entry = self.queue.take(rank).expect("it was found there");
        let (mut lease, cached) = self.cache.lease(entry.request.adapter_key(), self.lookup(&entry));
        let first = TokenCount(cached.0 + chunk.0);
        let reach = self.reach_at_once(&entry).unwrap_or(first);
        let fits = self.cache.extend(&mut lease, reach);
        debug_assert!(fits, "there was room a moment ago");
        let progress = Progress { computed: cached, input: entry.length(), next: chunk };
        let shares = self.shares(&entry);
        self.running.push(Row { entry, lease, told: 0, shares, progress });
    }

    /// Undoes admissions: the rows from `old` on wait again, in their order.
    fn put_back(&mut self, old: usize) {
        for row in self.running.drain(old..).rev() {
            self.cache.release(row.lease);
            self.queue.push(row.entry);
        }
    }
}
