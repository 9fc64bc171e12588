//! Shards that fail, and their return: how a step is seen to hang, who is asked for new shards, and what is done with them
//! until they are as the old ones were.

use std::future::{Future, pending};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::units::TokenCount;
use tokio::time::{sleep, timeout};

use super::client::{Ranks, ShardHealth};
use super::info::ShardInfo;
use super::warmup::{self, WarmupLimits};
use super::{ShardError, grpc};
use crate::batching::Capacity;
use crate::supervisor::Supervisor;

/// While a step is made, its shards are asked how they are so often, at least.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A shard's health does not wait for its steps; no answer for so long is none.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// Pause between attempts to meet new shards.
const RETRY: Duration = Duration::from_millis(20);
/// How long one attempt may take; the sockets may be there already, while their owners are being killed.
const MEETING_TIME_MAX: Duration = Duration::from_secs(5);
/// Where nobody starts shards again, somebody may all the same, within this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is needed to bring shards back.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// The socket of the first shard.
    path: PathBuf,
    /// The limits that hold, which new shards have to keep as well.
    limits: Option<WarmupLimits>,
    /// Tokens of the cache that the user wants to be used.
    tokens_max: Option<TokenCount>,
    /// How long shards may give no sign of life; `None` is for ever.
    silence_max: Option<Duration>,
    supervisor: Supervisor,
    /// Whether a step has been made since the shards were new.
    has_stepped: bool,
}

impl Recovery {
    /// For shards that are not warm yet: if they fail, they have failed.
    pub(super) fn none(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            limits: None,
            tokens_max: None,
            silence_max: None,
            supervisor: Supervisor::none(),
            has_stepped: false,
        }
    }

    /// Of shards at `path` that were warmed up within `limits`. `tokens_max` is how much of their cache the user wants to be
    /// used, and `silence_max` how long they may give no sign of life; the shards themselves say how long a step may take.
    pub fn new(
        path: &Path,
        limits: WarmupLimits,
        tokens_max: Option<TokenCount>,
        silence_max: Option<Duration>,
        supervisor: Supervisor,
    ) -> Self {
        Self { limits: Some(limits), tokens_max, silence_max, supervisor, ..Self::none(path) }
    }

    /// A step has been made.
    pub(super) fn stepped(&mut self) {
        if !std::mem::replace(&mut self.has_stepped, true) {
            self.supervisor.progress();
        }
    }

    /// Ready when a step that begins now has to be given up: the shards' own heartbeat says that it will not end, or they do
    /// not answer at all.
    pub(super) fn hangs(&self, health: ShardHealth) -> impl Future<Output = ShardError> + use<> {
        // Shards that cannot be brought back are left alone.
        let silence_max = self.silence_max.filter(|_| self.limits.is_some());
        async move {
            let Some(silence_max) = silence_max else { return pending().await };
            let answer_max = silence_max.min(ANSWER_TIME_MAX);
            loop {
                sleep((silence_max / 4).min(ASK_EVERY)).await;
                match timeout(answer_max, health.check()).await {
                    // The step itself hears of a broken connection.
                    Ok(Ok(()) | Err(ShardError::Connection(_))) => {}
                    Ok(Err(error)) => return ShardError::Hung(error.to_string()),
                    Err(_) => {
                        let seconds = answer_max.as_secs_f64();
                        return ShardError::Hung(format!("no sign of life for {seconds} s"));
                    }
                }
            }
        }
    }

    /// Waits for shards in the place of `lost`, which have failed with `error`, and warms them up.
    ///
    /// Errors when there will be none.
    pub(super) async fn restore(
        &mut self,
        lost: &Ranks,
        error: &ShardError,
    ) -> Result<(Ranks, ShardInfo, Capacity), ShardError> {
        let Some(limits) = self.limits else { return Err(ShardError::Abandoned(error.to_string())) };
        self.has_stepped = false;
        // Shards that are still there are to go. Those that are gone need not be asked for.
        let mut unwanted = Vec::new();
        if self.supervisor.is_there() && !matches!(error, ShardError::Connection(_)) {
            unwanted = lost.processes();
            self.supervisor.restart(unwanted.first().copied(), &error.to_string());
        }
        let supervisor = self.supervisor.clone();
        let hopeless = async {
            if supervisor.is_there() {
                return supervisor.abandoned().await;
            }
            sleep(PATIENCE).await;
            format!("{error}; no new one within {} s", PATIENCE.as_secs())
        };
        tokio::select! {
            reason = hopeless => Err(ShardError::Abandoned(reason)),
            restored = self.meet(limits, unwanted) => Ok(restored),
        }
    }

    /// Tries until it succeeds.
    async fn meet(&self, limits: WarmupLimits, mut unwanted: Vec<u32>) -> (Ranks, ShardInfo, Capacity) {
        loop {
            match grpc::meet(&self.path, MEETING_TIME_MAX).await {
                Ok((ranks, _)) if ranks.processes().iter().any(|process| unwanted.contains(process)) => {}
                Ok((ranks, info)) => match warmup::run(&ranks, &limits).await {
                    Ok(warm) => {
                        let capacity = warm.capacity(&info, self.tokens_max, limits.max_batch_prefill_tokens);
                        return (ranks, info, capacity);
                    }
                    Err(ShardError::Connection(error)) => tracing::debug!(error, "new shards are gone again"),
                    Err(error) => {
                        tracing::error!(%error, "new shards cannot be warmed up");
                        unwanted = ranks.processes();
                        self.supervisor.restart(unwanted.first().copied(), &error.to_string());
                    }
                },
                Err(error) => tracing::debug!(%error, "no new shards yet"),
            }
            sleep(RETRY).await;
        }
    }
}
