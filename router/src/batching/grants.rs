//! What running rows get for the next pass, where blocks are granted on demand.
//!
//! Rows that generate come first, each with room for its next token. Prompts share what the pass has left, in the order of
//! their rank. When there are no blocks left, the row of the last rank leaves the batch: what it has computed stays in the
//! tree of prefixes while there is room, and it comes back when it fits. The row of the first rank is never stopped by
//! others, so that somebody always gets on.

use proto::units::TokenCount;

use super::entry::Rank;
use super::row::Row;
use super::scheduler::Scheduler;
use super::turns::Company;

impl Scheduler {
    /// Sets what every running row feeds into the next pass, and takes the blocks for it.
    pub(super) fn grant(&mut self, company: Company) {
        self.running.iter_mut().for_each(|row| row.progress.next = TokenCount(0));
        match company {
            Company::Others => {
                self.grant_generating(|row| !row.entry.standing.is_tried());
                self.grant_prompts(|row| !row.entry.standing.is_tried());
            }
            Company::Tried => {
                let tried = self.running.iter().filter(|row| row.entry.standing.is_tried());
                let Some(first) = tried.map(|row| row.entry.rank()).min() else { return };
                self.grant_generating(|row| row.entry.rank() == first);
                self.grant_prompts(|row| row.entry.rank() == first);
            }
        }
    }

    fn grant_generating(&mut self, takes_part: impl Fn(&Row) -> bool) {
        let generates = |row: &Row| takes_part(row) && !row.progress.is_input();
        loop {
            let rows = self.running.iter().filter(|row| generates(row));
            let missing: u32 = rows.map(|row| self.cache.missing(&row.lease, row.reach_next()).0).sum();
            // A row that is alone fits: requests that never would are not taken.
            if missing <= self.cache.available().0 || self.running.len() <= 1 {
                break;
            }
            self.preempt_last();
        }
        for row in self.running.iter_mut().filter(|row| generates(row)) {
            if self.cache.extend(&mut row.lease, row.entry.length()) {
                row.progress.next = TokenCount(1);
            }
        }
    }

    fn grant_prompts(&mut self, takes_part: impl Fn(&Row) -> bool) {
        let unfinished = self.running.iter().filter(|row| takes_part(row) && row.progress.is_input());
        let mut ranks: Vec<Rank> = unfinished.map(|row| row.entry.rank()).collect();
        ranks.sort_unstable();
        let mut left = self.prompt_tokens_max();
        for rank in ranks {
            while left.0 > 0 {
                // It is gone if it has had to leave for another one.
                let Some(row) = self.running.iter_mut().find(|row| row.entry.rank() == rank) else { break };
                let chunk = row.progress.remaining().min(left);
                let reach = TokenCount(row.progress.computed.0 + chunk.0);
                if self.cache.extend(&mut row.lease, reach) {
                    row.progress.next = chunk;
                    left.0 -= chunk.0;
                    break;
                }
                let is_last = self.last_rank() == Some(rank);
                if is_last {
                    // It waits for blocks where it is.
                    break;
                }
                self.preempt_last();
            }
        }
    }

    /// Tokens of prompts that the next pass has room for, beside what it has been given already.
    pub(super) fn prompt_tokens_max(&self) -> TokenCount {
        let granted: u32 = self.running.iter().map(|row| row.progress.next.0).sum();
        let prompts = |row: &&Row| row.progress.is_input();
        let of_prompts: u32 = self.running.iter().filter(prompts).map(|row| row.progress.next.0).sum();
        let pass = self.limits.max_batch_prefill_tokens.0.saturating_sub(granted);
        let generates = granted > of_prompts;
        let pace = if generates { self.pace.prompt_tokens().0.saturating_sub(of_prompts) } else { u32::MAX };
        TokenCount(pass.min(pace))
    }

    fn last_rank(&self) -> Option<Rank> {
        self.running.iter().map(|row| row.entry.rank()).max()
    }

    /// The row of the last rank leaves the batch, and waits again.
    fn preempt_last(&mut self) {
        let Some(last) = self.last_rank() else { return };
        let index = self.running.iter().position(|row| row.entry.rank() == last);
        let row = self.running.remove(index.expect("its rank was found a moment ago"));
        tracing::debug!(request_id = row.entry.id.0, "preempted: the cache is full");
        let entry = self.leave(row);
        self.queue.push(entry);
        self.tally.preempted += 1;
    }
}
