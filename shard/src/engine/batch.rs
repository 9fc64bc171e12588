//! Rows that step together: joining, filtering, and how much of unfinished prompts comes next.

use std::collections::HashSet;

use proto::units::{BatchId, BlockSize, RequestId, TokenCount};

use super::answer::BatchSummary;
use super::error::EngineError;
use super::row::{Progress, Row};

/// Requests under one id, in order.
#[derive(Debug)]
pub struct Batch {
    id: BatchId,
    rows: Vec<Row>,
}

impl Batch {
    /// A batch of these rows.
    pub fn new(id: BatchId, rows: Vec<Row>) -> Self {
        Self { id, rows }
    }

    /// Its id.
    pub fn id(&self) -> BatchId {
        self.id
    }

    /// Its rows.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Its rows, to step.
    pub fn rows_mut(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    /// Puts another batch's rows behind its own.
    pub fn join(&mut self, other: Self) {
        self.rows.extend(other.rows);
    }

    /// The first request that both batches have, but for those that leave this one.
    pub fn shared_request(&self, other: &Self, leaving: &HashSet<RequestId>) -> Option<RequestId> {
        let others: HashSet<RequestId> = other.rows.iter().map(Row::id).collect();
        self.rows.iter().map(Row::id).find(|id| others.contains(id) && !leaving.contains(id))
    }

    /// Lets requests go; those that it does not have are ignored.
    pub fn drop_requests(&mut self, requests: &HashSet<RequestId>) {
        self.rows.retain(|row| !requests.contains(&row.id()));
    }

    /// Keeps the named requests, in the named order. On an error the batch is as it was.
    pub fn filter(&mut self, keep: &[RequestId]) -> Result<(), EngineError> {
        if keep.is_empty() {
            return Err(EngineError::KeepsNothing(self.id));
        }
        let batch = self.id;
        let mut taken = vec![false; self.rows.len()];
        let mut order = Vec::with_capacity(keep.len());
        for request in keep {
            let index = self
                .rows
                .iter()
                .position(|row| row.id() == *request)
                .ok_or(EngineError::UnknownRequest { batch, request: *request })?;
            if std::mem::replace(&mut taken[index], true) {
                return Err(EngineError::RepeatedRequest { batch, request: *request });
            }
            order.push(index);
        }
        let mut rows: Vec<Option<Row>> = self.rows.drain(..).map(Some).collect();
        self.rows = order.into_iter().filter_map(|index| rows[index].take()).collect();
        Ok(())
    }

    /// Decides what the next step computes, if the router does not: one token of each request, and of unfinished prompts
    /// `prefill_max` tokens less one for each other request, those that have just stopped included. They are spent from the
    /// last request to the first, and each unfinished prompt gets at least one. Routers keep this account too, to the token.
    pub fn plan(&mut self, prefill_max: TokenCount) {
        let mut budget = (prefill_max.0 as usize).saturating_sub(self.rows.len().saturating_sub(1));
        for row in self.rows.iter_mut().rev().filter(|row| !row.is_stopped()) {
            let unfinished = row.remaining();
            row.set_next(unfinished.min(budget).max(1));
            budget = budget.saturating_sub(if unfinished > 0 { row.progress().next } else { 0 });
        }
    }

    /// Whether no request takes part in a further step.
    pub fn is_stopped(&self) -> bool {
        self.rows.iter().all(Row::is_stopped)
    }

    /// A hash of what the next step computes: which requests, how much of them and into which slots, and the token each has
    /// got to (FNV-1a).
    pub fn fingerprint(&self) -> u64 {
        let words = self.rows.iter().flat_map(|row| {
            let last = row.ids().last().copied().unwrap_or(0);
            let Progress { cached, next } = row.progress();
            let slots = row.slots().raw().get(cached..cached + next).unwrap_or_default();
            [row.id().0, cached as u64, next as u64, row.ids().len() as u64, last.into()]
                .into_iter()
                .chain(slots.iter().map(|slot| u64::from(*slot)))
        });
        std::iter::once(self.id.0)
            .chain(words)
            .fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3))
    }

    /// What a router needs to know.
    pub fn summary(&self, block_size: BlockSize) -> BatchSummary {
        let tokens = |count: usize| TokenCount(u32::try_from(count).unwrap_or(u32::MAX));
        let blocks: usize = self.rows.iter().map(|row| row.blocks().0 as usize).sum();
        let running = self.rows.iter().filter(|row| !row.is_stopped());
        BatchSummary {
            id: self.id,
            requests: self.rows.iter().map(Row::id).collect(),
            tokens_max: tokens(blocks * block_size.get() as usize),
            tokens_next: tokens(running.map(|row| row.progress().next).sum()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::units::BlockCount;

    use super::*;
    use crate::engine::request::Stopping;
    use crate::engine::row::Parts;
    use crate::engine::slots::SlotTable;
    use crate::sampling::tests::greedy;

    const SIXTEEN: BlockSize = BlockSize::new(16).unwrap();

    /// A request with this many prompt tokens, of which the first step computes `chunk`.
    fn row(id: u64, prompt: usize, chunk: u32) -> Row {
        Row::new(Parts {
            id: RequestId(id),
            ids: vec![1; prompt],
            progress: Progress::new(prompt, TokenCount(0), Some(TokenCount(chunk))).unwrap(),
            blocks: BlockCount(2),
            slots: SlotTable::from_wire((0..32).collect()),
            granted: false,
            sampling: greedy(),
            stopping: Stopping { tokens_max: TokenCount(4), strings: vec![], ignore_end_of_sequence: false },
            prompt_logprobs: false,
            top: 0,
            adapter: None,
        })
    }

    fn batch(ids: &[u64]) -> Batch {
        Batch::new(BatchId(7), ids.iter().map(|id| row(*id, 8, 8)).collect())
    }

    fn requests(batch: &Batch) -> Vec<u64> {
        batch.summary(SIXTEEN).requests.iter().map(|id| id.0).collect()
    }

    #[test]
    fn a_filter_keeps_the_listed_requests_in_the_listed_order() {
        let mut batch = batch(&[1, 2, 3, 4]);
        batch.filter(&[4, 1, 2].map(RequestId)).unwrap();
        assert_eq!(requests(&batch), [4, 1, 2]);
        batch.filter(&[1, 4, 2].map(RequestId)).unwrap();
        assert_eq!(requests(&batch), [1, 4, 2]);
    }

    #[test]
    fn a_filter_that_cannot_be_leaves_the_batch_alone() {
        let mut batch = batch(&[1, 2]);
        for (keep, text) in [
            (&[][..], "no request of batch 7 is kept"),
            (&[9][..], "request 9 is not in batch 7"),
            (&[1, 1][..], "request 1 is in batch 7 twice"),
        ] {
            let keep: Vec<RequestId> = keep.iter().copied().map(RequestId).collect();
            assert!(batch.filter(&keep).unwrap_err().to_string().contains(text));
            assert_eq!(requests(&batch), [1, 2]);
        }
    }

    #[test]
    fn joined_batches_keep_the_first_id_and_both_orders() {
        let mut first = batch(&[3, 1]);
        let second = Batch::new(BatchId(8), vec![row(2, 8, 8)]);
        assert_eq!(first.shared_request(&second, &HashSet::new()), None);
        first.join(second);
        assert_eq!((first.id(), requests(&first)), (BatchId(7), vec![3, 1, 2]));
        let other = batch(&[9, 1]);
        assert_eq!(first.shared_request(&other, &HashSet::new()), Some(RequestId(1)));
        assert_eq!(first.shared_request(&other, &HashSet::from([RequestId(1)])), None);
    }

    #[test]
    fn later_chunks_are_planned_from_the_last_request_to_the_first() {
        let check = |prefill_max: u32, expected: [usize; 3]| {
            let mut batch = Batch::new(BatchId(0), vec![row(0, 20, 1), row(1, 10, 1), row(2, 5, 1)]);
            for row in batch.rows_mut() {
                row.advance(1);
            }
            batch.plan(TokenCount(prefill_max));
            let next: Vec<usize> = batch.rows().iter().map(|row| row.progress().next).collect();
            assert_eq!(next, expected, "prefill_max = {prefill_max}");
        };
        check(100, [19, 9, 4]);
        check(17, [2, 9, 4]);
        check(8, [1, 2, 4]);
        check(0, [1, 1, 1]);
    }

    #[test]
    fn the_summary_counts_reserved_blocks_and_the_next_tokens() {
        let batch = Batch::new(BatchId(7), vec![row(0, 20, 20), row(1, 10, 3)]);
        let summary = batch.summary(SIXTEEN);
        assert_eq!((summary.tokens_max, summary.tokens_next), (TokenCount(64), TokenCount(23)));
    }
}
