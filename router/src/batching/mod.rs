//! One task that owns the queue, the blocks and the running batch.

use std::time::Instant;

use thiserror::Error;
use tokio::sync::mpsc;

use crate::request::ValidRequest;
use crate::shards::ShardError;

pub mod events;

pub use events::{Event, FinishReason, Finished, PromptToken, Step, Token};

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

/// The batcher has ended; no request can be served any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the batcher has stopped")]
pub struct Stopped;

/// Handle to the batcher. Cheap to clone; all state lives in one task.
#[derive(Clone, Debug)]
pub struct Batcher {
    pub(crate) inbox: mpsc::Sender<Waiting>,
}

impl Batcher {
    /// Hands a request over. Errors when the batcher has ended.
    pub async fn submit(&self, waiting: Waiting) -> Result<(), Stopped> {
        self.inbox.send(waiting).await.map_err(|_| Stopped)
    }

    /// Whether the task still runs.
    pub fn is_alive(&self) -> bool {
        !self.inbox.is_closed()
    }
}
