//! A running request: what it is, what it holds, how far it got.

use std::sync::Arc;
use std::time::Instant;

use proto::units::{RequestId, TokenCount};
use tokio::sync::mpsc;

use super::events::Event;
use super::plan::Admission;
use super::queue::Queued;
use crate::cache::BlockLease;
use crate::request::ValidRequest;
use crate::shards::ShardError;

/// A request that has a place in the batch.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: RequestId,
    pub(super) request: Arc<ValidRequest>,
    pub(super) events: mpsc::Sender<Result<Event, ShardError>>,
    pub(super) queued: Instant,
    pub(super) started: Instant,
    pub(super) lease: BlockLease,
    /// Tokens the lease is for.
    pub(super) reach: TokenCount,
    pub(super) progress: Progress,
}

/// How far a row got. The shards keep the same account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Prompt tokens are still to be computed: `chunk` of the `remaining` ones in the next pass.
    Prompt { remaining: TokenCount, chunk: TokenCount },
    /// The prompt is complete; every pass yields at least one token.
    Output,
}

impl Progress {
    /// Tokens the row feeds into its next pass.
    pub(super) fn tokens_next(self) -> TokenCount {
        match self {
            Self::Prompt { chunk, .. } => chunk,
            Self::Output => TokenCount(1),
        }
    }

    /// The row took part in a pass.
    pub(super) fn advance(&mut self) {
        if let Self::Prompt { remaining, chunk } = self {
            remaining.0 -= chunk.0;
            if remaining.0 == 0 {
                *self = Self::Output;
            }
        }
    }
}

impl Row {
    /// The request as its first pass needs it.
    pub(super) fn admission(&self) -> Admission {
        Admission {
            id: self.id,
            request: Arc::clone(&self.request),
            blocks: self.lease.blocks().to_vec(),
            reach: self.reach,
            cached: TokenCount(0),
            chunk: self.progress.tokens_next(),
        }
    }

    /// Back to the queue, for a row that has not computed anything: its entry there, and the lease to be released.
    pub(super) fn into_queued(self) -> (Queued, BlockLease) {
        let Self { id, request, events, queued, lease, .. } = self;
        (Queued { id, request, events, queued }, lease)
    }
}
