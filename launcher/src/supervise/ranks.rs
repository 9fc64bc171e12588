//! The shards, one per rank, which live and die together: a rank cannot compute without the others.

use std::fs;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tracing::{info, info_span, warn};

use super::deadline;
use crate::error::LaunchError;
use crate::plan::{LaunchPlan, ShardPlan};
use crate::process::{Ending, Process};
use crate::socket;

/// How often the log says that something takes its time.
const WAITING_LINE_EVERY: Duration = Duration::from_secs(10);

/// All shards.
pub(super) struct Ranks<'a> {
    plan: &'a LaunchPlan,
    /// In the order of ranks; those of an earlier start until they have ended.
    processes: Vec<Process>,
    phase: Phase<'a>,
}

enum Phase<'a> {
    /// Not there, or being killed; to be started from then on.
    Down { until: Instant },
    /// Started; the future waits until all of them are ready.
    Loading(Pin<Box<dyn Future<Output = ()> + 'a>>),
    /// Each listens on its socket.
    Ready { since: Instant },
}

/// What happens to the shards.
#[derive(Debug)]
pub(super) enum RanksEvent {
    /// It is time to start them, and nothing of an earlier start is left.
    Due,
    /// All are ready.
    Ready,
    /// These have ended by themselves, at least one.
    Ended(Vec<(usize, Ending)>),
}

impl<'a> Ranks<'a> {
    /// None yet; due at once.
    pub(super) fn new(plan: &'a LaunchPlan) -> Self {
        Self { plan, processes: Vec::new(), phase: Phase::Down { until: Instant::now() } }
    }

    /// Waits for what happens next. Nothing is lost when the wait is given up.
    pub(super) async fn next(&mut self) -> RanksEvent {
        match &mut self.phase {
            Phase::Down { until } => {
                all_ended(&mut self.processes).await;
                sleep_until(*until).await;
                RanksEvent::Due
            }
            Phase::Loading(ready) => tokio::select! {
                biased;
                ended = some_ended(&mut self.processes) => RanksEvent::Ended(ended),
                () = ready => {
                    self.phase = Phase::Ready { since: Instant::now() };
                    RanksEvent::Ready
                }
            },
            Phase::Ready { .. } => RanksEvent::Ended(some_ended(&mut self.processes).await),
        }
    }

    /// Starts all of them, once they are due.
    ///
    /// Errors when one cannot be started; those before it run then.
    pub(super) fn start(&mut self) -> Result<(), LaunchError> {
        self.clear_away();
        for ShardPlan { rank, socket, command } in &self.plan.shards {
            let rank = *rank;
            socket::clear(socket)?;
            span(rank).in_scope(|| info!("Starting shard"));
            let process = Process::spawn(format!("shard {rank}"), command)
                .map_err(|source| LaunchError::ShardCannotStart { rank, source })?;
            self.processes.push(process);
        }
        self.phase = Phase::Loading(Box::pin(all_ready(&self.plan.shards)));
        Ok(())
    }

    /// Kills what runs. They are due when that is over and `pause` too.
    pub(super) fn bring_down(&mut self, pause: Duration) {
        self.processes.iter().for_each(Process::send_kill);
        self.phase = Phase::Down { until: deadline(pause) };
    }

    /// The rank whose process has this id, unless it is being killed anyway.
    pub(super) fn rank_of(&self, pid: u32) -> Option<usize> {
        match self.phase {
            Phase::Down { .. } => None,
            Phase::Loading(_) | Phase::Ready { .. } => {
                self.processes.iter().position(|process| process.pid() == Some(pid))
            }
        }
    }

    pub(super) fn are_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready { .. })
    }

    /// Nothing, unless they are ready.
    pub(super) fn ready_for(&self) -> Duration {
        match self.phase {
            Phase::Ready { since } => since.elapsed(),
            Phase::Down { .. } | Phase::Loading(_) => Duration::ZERO,
        }
    }

    /// Waits until one has ended.
    pub(super) async fn loss(&mut self) {
        some_ended(&mut self.processes).await;
    }

    /// Asks all of them to end, and kills those that have not after `patience`.
    pub(super) async fn stop(&mut self, patience: Duration) {
        self.processes.iter().for_each(Process::terminate);
        let deadline = deadline(patience);
        for process in &mut self.processes {
            process.end_by(deadline).await;
        }
    }

    /// Ends all of them at once.
    pub(super) async fn kill(&mut self) {
        self.processes.iter().for_each(Process::send_kill);
        for process in &mut self.processes {
            process.kill().await;
        }
    }

    /// Removes the files of those that have run. Most of them remove these themselves.
    pub(super) fn clear_away(&mut self) {
        if self.processes.is_empty() {
            return;
        }
        self.processes.clear();
        for shard in &self.plan.shards {
            let _ = fs::remove_file(&shard.socket);
        }
        if self.plan.shards.len() > 1 {
            let _ = fs::remove_file(&self.plan.group);
        }
    }
}

/// Log lines about a shard stand in this span.
pub(super) fn span(rank: usize) -> tracing::Span {
    info_span!("shard-manager", rank)
}

/// Waits until one of the processes has ended, and returns all that have by then. Without any it waits forever.
async fn some_ended(processes: &mut [Process]) -> Vec<(usize, Ending)> {
    poll_fn(|context| {
        let mut ended = Vec::new();
        for (rank, process) in processes.iter_mut().enumerate() {
            if let Poll::Ready(ending) = process.poll_end(context) {
                ended.push((rank, ending));
            }
        }
        if ended.is_empty() { Poll::Pending } else { Poll::Ready(ended) }
    })
    .await
}

/// Waits until all of the killed processes have ended: what they hold of a device is free only then.
async fn all_ended(processes: &mut [Process]) {
    for (rank, process) in processes.iter_mut().enumerate() {
        while tokio::time::timeout(WAITING_LINE_EVERY, process.end()).await.is_err() {
            span(rank).in_scope(|| warn!("Killed, but the system has not ended it yet"));
        }
    }
}

/// Waits until all of the shards are ready; each says so when it is.
async fn all_ready(shards: &[ShardPlan]) {
    let mut waits: Vec<_> = shards.iter().map(|shard| Box::pin(ready(shard))).collect();
    poll_fn(|context| {
        waits.retain_mut(|wait| wait.as_mut().poll(context).is_pending());
        if waits.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

async fn ready(shard: &ShardPlan) {
    let start = Instant::now();
    let mut waiting = interval_at(start + WAITING_LINE_EVERY, WAITING_LINE_EVERY);
    waiting.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut appears = std::pin::pin!(socket::appears(&shard.socket));
    loop {
        tokio::select! {
            () = &mut appears => break,
            _ = waiting.tick() => span(shard.rank).in_scope(|| info!("Waiting for shard to be ready...")),
        }
    }
    span(shard.rank).in_scope(|| info!("Shard ready in {:.3?}", start.elapsed()));
}
