//! Requests that wait for a place in the batch, in order of arrival.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use proto::units::RequestId;
use tokio::sync::mpsc;

use super::events::Event;
use crate::request::ValidRequest;
use crate::shards::ShardError;

/// A request that waits.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) id: RequestId,
    pub(super) request: Arc<ValidRequest>,
    pub(super) events: mpsc::Sender<Result<Event, ShardError>>,
    pub(super) queued: Instant,
}

/// First in, first out. Whoever left is skipped.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<Queued>,
}

impl Queue {
    pub(super) fn push(&mut self, entry: Queued) {
        self.waiting.push_back(entry);
    }

    /// Returns an entry that was taken but could not start to the front.
    pub(super) fn put_back(&mut self, entry: Queued) {
        self.waiting.push_front(entry);
    }

    /// The oldest entry.
    pub(super) fn front(&self) -> Option<&Queued> {
        self.waiting.front()
    }

    pub(super) fn pop(&mut self) -> Option<Queued> {
        self.waiting.pop_front()
    }

    /// Forgets those whose client left, wherever they stand: behind a blocked front they would pile up.
    pub(super) fn drop_departed(&mut self) {
        self.waiting.retain(|entry| !entry.events.is_closed());
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
