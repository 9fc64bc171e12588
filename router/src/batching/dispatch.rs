//! The output of a step, to each request's own channel.

use proto::units::TokenCount;
use tokio::sync::mpsc::error::TrySendError;

use super::events::{Event, Finished};
use super::row::Row;
use super::scheduler::Ending;
use crate::shards::Generation;

/// Sends what a row generated in one step. Returns how the row ended, if it did.
pub(super) fn deliver(row: &Row, generation: Generation) -> Option<Ending> {
    let Generation { prompt, earlier, newest, end, .. } = generation;
    let last = match end {
        None => Event::Token(newest),
        Some(end) => {
            let (queued, started) = (row.queued, row.started);
            let finished = Finished {
                text: end.text,
                tokens: end.tokens,
                reason: end.reason,
                seed: end.seed,
                queued,
                started,
                cached: TokenCount(0),
            };
            Event::Last(newest, finished)
        }
    };
    let finishes = matches!(last, Event::Last(..));
    let events =
        prompt.map(Event::Prompt).into_iter().chain(earlier.into_iter().map(Event::Token)).chain([last]);
    for event in events {
        if let Err(ending) = send(row, event) {
            return Some(ending);
        }
    }
    finishes.then_some(Ending::Finished)
}

/// Never waits: a slow client must not stop the others.
fn send(row: &Row, event: Event) -> Result<(), Ending> {
    match row.events.try_send(Ok(event)) {
        Ok(()) => Ok(()),
        Err(TrySendError::Closed(_)) => Err(Ending::Cancelled),
        Err(TrySendError::Full(_)) => {
            // The channel holds as many events as the request may have tokens, so the shard sent more than that.
            tracing::error!(request_id = row.id.0, "more tokens than were asked for: the request is dropped");
            Err(Ending::Cancelled)
        }
    }
}
