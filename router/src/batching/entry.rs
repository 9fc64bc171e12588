//! A request from its arrival to its end, whether it waits or runs: all that is needed to go on with it, on shards that
//! have never seen it too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::units::{RequestId, TokenCount, TokenId};
use tokio::sync::mpsc;

use super::events::Event;
use super::scheduler::Tally;
use super::trial::Standing;
use crate::request::{Priority, ValidRequest};
use crate::shards::ShardError;

/// A level of priority is worth this much waiting: a request overtakes those of the next level below that came up to so
/// much earlier, and none that has waited longer. So nobody waits for ever.
const AGEING: Duration = Duration::from_secs(10);

/// A request that has not ended.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: RequestId,
    pub(super) request: Arc<ValidRequest>,
    pub(super) events: mpsc::Sender<Result<Event, ShardError>>,
    pub(super) queued: Instant,
    /// When it entered a batch first.
    pub(super) started: Option<Instant>,
    /// Prompt tokens that were found in the cache then.
    pub(super) cached: TokenCount,
    /// Prompt and generated tokens.
    pub(super) tokens: Vec<TokenId>,
    /// Requests that were admitted before it though they came later, because it did not fit and they did.
    pub(super) overtaken: u32,
    pub(super) standing: Standing,
}

/// The order in which requests are served: earlier first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// When it would have come, had it the highest priority.
    due: Instant,
    id: RequestId,
}

impl Entry {
    /// A request that arrives.
    pub(super) fn new(
        id: RequestId,
        request: ValidRequest,
        events: mpsc::Sender<Result<Event, ShardError>>,
        queued: Instant,
    ) -> Self {
        let tokens = request.prompt.ids.to_vec();
        Self {
            id,
            request: Arc::new(request),
            events,
            queued,
            started: None,
            cached: TokenCount(0),
            tokens,
            overtaken: 0,
            standing: Standing::default(),
        }
    }

    /// Its place among all requests. The same from arrival to end, so that a request that had to leave the batch comes back
    /// before those that came after it.
    pub(super) fn rank(&self) -> Rank {
        let levels = Priority::HIGHEST.get() - self.request.priority.get();
        Rank { due: self.queued + AGEING * u32::from(levels), id: self.id }
    }

    /// It enters a batch, and finds `cached` of its tokens in the cache. Only the first time counts.
    pub(super) fn enter(&mut self, cached: TokenCount, now: Instant, tally: &mut Tally) {
        if self.started.is_some() {
            return;
        }
        self.started = Some(now);
        self.cached = cached;
        tally.prompt_tokens += u64::from(self.length().0);
        tally.cached_tokens += u64::from(cached.0);
    }

    /// Prompt and generated tokens.
    pub(super) fn length(&self) -> TokenCount {
        TokenCount(self.tokens.len() as u32)
    }

    /// Tokens that were generated.
    pub(super) fn generated(&self) -> TokenCount {
        TokenCount(self.length().0 - self.request.prompt.length().0)
    }

    /// Why nobody wants it any more, if so.
    pub(super) fn is_over(&self, now: Instant) -> Option<Departure> {
        if self.events.is_closed() {
            return Some(Departure::Left);
        }
        let deadline = self.request.deadline.filter(|deadline| deadline.at <= now)?;
        Some(Departure::Late(deadline.after))
    }

    /// Tells the client that it ends here.
    pub(super) fn fail(&self, error: ShardError) {
        // A client that left does not hear of it.
        let _ = self.events.try_send(Err(error));
    }
}

/// A request that ends because of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Departure {
    /// The client is gone.
    Left,
    /// The client has given it so much time.
    Late(Duration),
}
