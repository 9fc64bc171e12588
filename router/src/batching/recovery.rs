//! From the end of the shards to their return. Requests arrive meanwhile, wait with the others, leave, and run out of time.

use std::pin::pin;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Waiting;
use super::scheduler::Scheduler;
use crate::shards::{ShardError, Shards};

/// How often departures and deadlines are looked at while there are no steps.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// For requests that arrive when it is over, and for clients to read what they have been told.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Brings the shards back, which failed with `error`.
///
/// Errors when that cannot be: then every request has heard so.
pub(super) async fn recover(
    shards: &mut impl Shards,
    scheduler: &mut Scheduler,
    mail: &mut mpsc::Receiver<Waiting>,
    error: &ShardError,
) -> Result<(), ShardError> {
    let begin = Instant::now();
    scheduler.interrupt(error);
    tracing::warn!(%error, waiting = scheduler.load().waiting, "the shards have failed: their requests wait for new ones");
    let mut restored = pin!(shards.restore(error));
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            outcome = &mut restored => match outcome {
                Ok(capacity) => {
                    scheduler.restart(capacity);
                    tracing::info!("the shards are back after {:.3?}", begin.elapsed());
                    return Ok(());
                }
                Err(error) => {
                    tracing::error!("{error}");
                    scheduler.abandon(&error);
                    return Err(error);
                }
            },
            Some(waiting) = mail.recv() => scheduler.submit(waiting),
            _ = look.tick() => scheduler.drop_departed(Instant::now()),
        }
    }
}

/// Answers whatever still arrives with an error, for as long as clients need to read what they have been told.
pub(super) async fn farewell(mail: &mut mpsc::Receiver<Waiting>, error: &ShardError) {
    let refuse = async {
        while let Some(waiting) = mail.recv().await {
            // A client that left does not hear of it.
            let _ = waiting.events.try_send(Err(error.clone()));
        }
    };
    let _ = timeout(LAST_WORDS, refuse).await;
}
