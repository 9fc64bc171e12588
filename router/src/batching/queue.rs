//! Requests that wait for a place in the batch, in the order in which they are to be served.

use std::collections::BTreeMap;
use std::time::Instant;

use super::entry::{Departure, Entry, Rank};
use crate::shards::ShardError;

/// Those that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Rank, Entry>,
}

impl Queue {
    /// Puts a request where it belongs, be it new or back from the batch.
    pub(super) fn push(&mut self, entry: Entry) {
        self.waiting.insert(entry.rank(), entry);
    }

    /// In order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Rank, &Entry)> {
        self.waiting.iter().map(|(rank, entry)| (*rank, entry))
    }

    pub(super) fn take(&mut self, rank: Rank) -> Option<Entry> {
        self.waiting.remove(&rank)
    }

    /// Counts for each of these that somebody came before it.
    pub(super) fn note_overtaken(&mut self, ranks: &[Rank]) {
        for rank in ranks {
            if let Some(entry) = self.waiting.get_mut(rank) {
                entry.overtaken += 1;
            }
        }
    }

    /// Forgets those whose client left, wherever they stand, and ends those whose time is over.
    pub(super) fn drop_departed(&mut self, now: Instant) {
        self.waiting.retain(|_, entry| match entry.is_over(now) {
            None => true,
            Some(Departure::Left) => false,
            Some(Departure::Late(after)) => {
                entry.fail(ShardError::Deadline(after));
                false
            }
        });
    }

    /// Ends those for which there is an error.
    pub(super) fn fail_where(&mut self, mut why: impl FnMut(&Entry) -> Option<ShardError>) {
        self.waiting.retain(|_, entry| match why(entry) {
            None => true,
            Some(error) => {
                entry.fail(error);
                false
            }
        });
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
