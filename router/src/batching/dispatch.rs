//! The output of a step, to each request's own channel.

use proto::units::TokenCount;
use tokio::sync::mpsc::error::TrySendError;

use super::entry::Entry;
use super::events::{Event, Finished};
use super::row::Row;
use super::scheduler::Ending;
use super::trial::Standing;
use crate::shards::Generation;

/// Takes in what a row generated in one step, and sends it. Returns how the row ended, if it did.
pub(super) fn deliver(row: &mut Row, generation: Generation) -> Option<Ending> {
    let Generation { prompt, earlier, newest, end, .. } = generation;
    let Row { entry, progress, .. } = row;
    entry.standing = Standing::Clear;
    entry.tokens.extend(earlier.iter().chain([&newest]).map(|step| step.token.id));
    // The newest token is fed into the next pass; guesses before it have been in this one.
    progress.computed = TokenCount(entry.length().0 - 1);
    progress.next = TokenCount(1);
    let last = match end {
        None => Event::Token(newest),
        Some(end) => {
            let finished = Finished {
                text: end.text,
                tokens: end.tokens,
                reason: end.reason,
                seed: end.seed,
                queued: entry.queued,
                started: entry.started.unwrap_or(entry.queued),
                cached: entry.cached,
            };
            Event::Last(newest, finished)
        }
    };
    let finishes = matches!(last, Event::Last(..));
    let events =
        prompt.map(Event::Prompt).into_iter().chain(earlier.into_iter().map(Event::Token)).chain([last]);
    for event in events {
        if let Err(ending) = send(entry, event) {
            return Some(ending);
        }
    }
    finishes.then_some(Ending::Finished)
}

/// Never waits: a slow client must not stop the others.
fn send(entry: &Entry, event: Event) -> Result<(), Ending> {
    match entry.events.try_send(Ok(event)) {
        Ok(()) => Ok(()),
        Err(TrySendError::Closed(_)) => Err(Ending::Cancelled),
        Err(TrySendError::Full(_)) => {
            // The channel holds as many events as the request may have tokens, so the shard sent more than that.
            tracing::error!(
                request_id = entry.id.0,
                "more tokens than were asked for: the request is dropped"
            );
            Err(Ending::Cancelled)
        }
    }
}
