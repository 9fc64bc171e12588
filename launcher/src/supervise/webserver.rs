//! The router's process: started once the shards are ready, and again when it dies.

use std::future::pending;
use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::info;

use super::deadline;
use crate::plan::LaunchPlan;
use crate::process::{Ending, Process};

/// The router.
pub(super) struct Webserver<'a> {
    plan: &'a LaunchPlan,
    process: Option<Process>,
    phase: Phase,
    history: History,
}

enum Phase {
    /// Not there; to be started from then on.
    Down { until: Instant },
    /// Started.
    Starting,
    /// It has said that it serves.
    Ready { since: Instant },
}

/// How far a router has ever come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum History {
    NeverStarted,
    NeverReady,
    WasReady,
}

/// What happens to the router.
#[derive(Debug)]
pub(super) enum WebserverEvent {
    /// It is time to start it.
    Due,
    /// It has ended by itself.
    Ended(Ending),
}

impl<'a> Webserver<'a> {
    /// None yet; due as soon as the shards are ready.
    pub(super) fn new(plan: &'a LaunchPlan) -> Self {
        let phase = Phase::Down { until: Instant::now() };
        Self { plan, process: None, phase, history: History::NeverStarted }
    }

    /// Waits for what happens next. Nothing is lost when the wait is given up.
    pub(super) async fn next(&mut self, shards_are_ready: bool) -> WebserverEvent {
        match self.phase {
            Phase::Down { until } if shards_are_ready => {
                sleep_until(until).await;
                WebserverEvent::Due
            }
            Phase::Down { .. } => pending().await,
            Phase::Starting | Phase::Ready { .. } => match &mut self.process {
                Some(process) => WebserverEvent::Ended(process.end().await),
                None => pending().await,
            },
        }
    }

    /// Starts it, once it is due.
    pub(super) fn start(&mut self) -> io::Result<()> {
        info!("Starting Webserver");
        self.process = Some(Process::spawn("webserver", &self.plan.router)?);
        self.phase = Phase::Starting;
        self.history = self.history.max(History::NeverReady);
        Ok(())
    }

    /// It has ended; due after `pause`.
    pub(super) fn is_down(&mut self, pause: Duration) {
        self.process = None;
        self.phase = Phase::Down { until: deadline(pause) };
    }

    /// It says that it serves.
    pub(super) fn is_ready(&mut self) {
        if let Phase::Starting = self.phase {
            self.phase = Phase::Ready { since: Instant::now() };
            self.history = History::WasReady;
        }
    }

    pub(super) fn history(&self) -> History {
        self.history
    }

    /// Nothing, unless it is ready.
    pub(super) fn ready_for(&self) -> Duration {
        match self.phase {
            Phase::Ready { since } => since.elapsed(),
            Phase::Down { .. } | Phase::Starting => Duration::ZERO,
        }
    }

    /// Waits until it has ended, if it runs.
    pub(super) async fn end(&mut self) {
        if let Some(process) = &mut self.process {
            process.end().await;
        }
    }

    /// Asks it to end.
    pub(super) fn terminate(&self) {
        if let Some(process) = &self.process {
            process.terminate();
        }
    }

    /// Waits for its end until `deadline`, then kills it.
    pub(super) async fn end_by(&mut self, deadline: Instant) {
        if let Some(process) = &mut self.process {
            process.end_by(deadline).await;
        }
    }

    /// Ends it at once.
    pub(super) async fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill().await;
        }
    }
}
