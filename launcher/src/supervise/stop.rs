//! The end of everything, in order: the router, then the shards.

use std::time::Duration;

use tokio::time::timeout;
use tracing::{info, warn};

use super::{Stack, deadline};
use crate::error::LaunchError;
use crate::signals::StopSignals;

/// The router ends the requests that are left when its time is up, or when there are no shards any more, and says so to
/// their clients; this is its time to say it.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Stack<'_> {
    /// Stops the router, then the shards, and removes their files. `outcome` is what has led here. An impatient signal kills
    /// what is left at once.
    pub(super) async fn shut_down(mut self, outcome: &Result<(), LaunchError>, signals: &mut StopSignals) {
        tokio::select! {
            () = self.stop_in_order(outcome) => {}
            signal = signals.impatient() => {
                warn!("{signal} while ending: killing what still runs");
                self.webserver.kill().await;
                self.shards.kill().await;
            }
        }
        self.shards.clear_away();
    }

    async fn stop_in_order(&mut self, outcome: &Result<(), LaunchError>) {
        if !self.shards.are_ready() {
            let reason = match outcome {
                Err(LaunchError::ShardFailed { failure, .. }) => failure.to_string(),
                Err(_) | Ok(()) => "the server is stopping, and its shards are not ready".to_owned(),
            };
            let is_heard = self.control.abandon(&reason);
            if is_heard && outcome.is_err() {
                // It may end by itself then. If it does not, it is asked to.
                let _ = timeout(LAST_WORDS, self.webserver.end()).await;
            }
        }
        let patience = self.plan.termination_timeout;
        self.webserver.terminate();
        self.webserver_drains(patience.saturating_add(LAST_WORDS)).await;
        info!("Shutting down shards");
        self.shards.stop(patience).await;
    }

    /// Waits for the router, which lets requests finish. Without shards they would not.
    async fn webserver_drains(&mut self, patience: Duration) {
        let deadline = deadline(patience);
        if self.shards.are_ready() {
            tokio::select! {
                biased;
                () = self.webserver.end_by(deadline) => return,
                () = self.shards.loss() => {
                    self.control.abandon("the server is stopping, and a shard has ended");
                }
            }
        }
        self.webserver.end_by(deadline).await;
    }
}
