//! Executes a plan: the downloads, then shards, then the router; watches over all of them; starts again what dies; stops
//! them in reverse order.
//!
//! - `mod.rs`: what follows on what happens.
//! - `fetch`: the downloads.
//! - `ranks`: the shards, which live and die together.
//! - `webserver`: the router's process.
//! - `control`: the socket on which the router reports.
//! - `restarts`: how often something is started again, and after which pause.
//! - `stop`: the end of everything.
//!
//! Until a router has said that it is ready, whatever ends is a failed start. From then on the shards are started again,
//! all ranks together, when one dies or the router gives one up; and the router when it dies.

use std::time::Duration;

use proto::supervision::{Reason, Report};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, error, info};

use self::control::Control;
use self::ranks::{Ranks, RanksEvent, span};
use self::restarts::Restarts;
use self::webserver::{History, Webserver, WebserverEvent};
use crate::error::{LaunchError, ShardFailure};
use crate::plan::LaunchPlan;
use crate::process::Ending;
use crate::signals::StopSignals;

mod control;
mod fetch;
mod ranks;
mod restarts;
mod stop;
mod webserver;

#[cfg(test)]
mod tests;

/// How long a report may take from the router to here, on a machine that is very busy.
const READY_ON_ITS_WAY: Duration = Duration::from_millis(100);

/// Starts what the plan says and returns when a signal has ended it, after everything has stopped.
///
/// Errors when a child cannot be started, or ends by itself and is not started again, or not any more; then, too,
/// everything has stopped.
pub async fn run(plan: &LaunchPlan, signals: &mut StopSignals) -> Result<(), LaunchError> {
    let control = Control::listen(&plan.control)
        .map_err(|source| LaunchError::System { what: "listen for the webserver's reports", source })?;
    let mut stack = Stack {
        plan,
        control,
        shards: Ranks::new(plan),
        webserver: Webserver::new(plan),
        shard_restarts: Restarts::new(plan.restarts_max),
        webserver_restarts: Restarts::new(plan.restarts_max),
    };
    let outcome = stack.serve(signals).await;
    stack.shut_down(&outcome, signals).await;
    outcome
}

/// The children, and what is known of them.
struct Stack<'a> {
    plan: &'a LaunchPlan,
    control: Control,
    shards: Ranks<'a>,
    webserver: Webserver<'a>,
    shard_restarts: Restarts,
    webserver_restarts: Restarts,
}

enum Event {
    Signal(&'static str),
    Shards(RanksEvent),
    Webserver(WebserverEvent),
    Report(Report),
}

impl Stack<'_> {
    /// From the first child's start until a signal, or an end that is nothing to go on from.
    async fn serve(&mut self, signals: &mut StopSignals) -> Result<(), LaunchError> {
        for download in &self.plan.downloads {
            if !fetch::fetch(download, signals).await? {
                return Ok(());
            }
        }
        loop {
            match self.next(signals).await {
                Event::Signal(signal) => {
                    info!("{signal}: stopping");
                    return Ok(());
                }
                Event::Shards(event) => self.shards_event(event).await?,
                Event::Webserver(event) => self.webserver_event(event).await?,
                Event::Report(report) => self.report(report)?,
            }
        }
    }

    async fn next(&mut self, signals: &mut StopSignals) -> Event {
        let shards_are_ready = self.shards.are_ready();
        tokio::select! {
            biased;
            signal = signals.next() => Event::Signal(signal),
            // Before the router: it may end because a shard did, which then is what there is to say.
            event = self.shards.next() => Event::Shards(event),
            event = self.webserver.next(shards_are_ready) => Event::Webserver(event),
            // Last: however much a router says, the others are seen to.
            report = self.control.report() => Event::Report(report),
        }
    }

    async fn shards_event(&mut self, event: RanksEvent) -> Result<(), LaunchError> {
        match event {
            RanksEvent::Ready => Ok(()),
            RanksEvent::Due => match self.shards.start() {
                Err(error) if self.webserver.history() == History::WasReady => {
                    error!("{error}");
                    self.shards_failed(ShardFailure::NotStarted(Box::new(error)))
                }
                started => started,
            },
            RanksEvent::Ended(ended) => {
                let what = if self.shards.are_ready() { "crashed" } else { "could not start" };
                for (rank, ending) in &ended {
                    span(*rank).in_scope(|| error!("Shard {rank} {what}: {ending}"));
                }
                let (rank, ending) = culprit(ended);
                self.hear_whether_ready().await;
                match self.webserver.history() {
                    History::NeverStarted => Err(LaunchError::ShardNotReady { rank, ending }),
                    History::NeverReady | History::WasReady => {
                        self.shards_failed(ShardFailure::Ended { rank, ending })
                    }
                }
            }
        }
    }

    /// The shards cannot go on as they are: all are killed, and due again if that is still allowed.
    fn shards_failed(&mut self, failure: ShardFailure) -> Result<(), LaunchError> {
        let ready_for = self.shards.ready_for();
        let restart = match self.webserver.history() {
            History::WasReady => self.shard_restarts.next(ready_for),
            History::NeverStarted | History::NeverReady => None,
        };
        match restart {
            Some(restart) => {
                info!("Restarting shards {restart}");
                self.shards.bring_down(restart.pause);
                Ok(())
            }
            None => {
                self.shards.bring_down(Duration::ZERO);
                Err(LaunchError::ShardFailed { failure, restarts: self.shard_restarts.in_a_row() })
            }
        }
    }

    async fn webserver_event(&mut self, event: WebserverEvent) -> Result<(), LaunchError> {
        match event {
            WebserverEvent::Due => match self.webserver.start() {
                Ok(()) => Ok(()),
                Err(source) => {
                    error!("Webserver could not start: {source}");
                    self.webserver_failed(|_| LaunchError::WebserverCannotStart(source))
                }
            },
            WebserverEvent::Ended(ending) => {
                error!("Webserver Crashed: {ending}");
                self.hear_whether_ready().await;
                self.webserver_failed(|restarts| LaunchError::WebserverFailed { ending, restarts })
            }
        }
    }

    /// The router is gone: it is due again if that is still allowed. Its clients have lost their connections; the shards
    /// are told by the next one to forget their requests.
    fn webserver_failed(&mut self, error: impl FnOnce(u32) -> LaunchError) -> Result<(), LaunchError> {
        let restart = match self.webserver.history() {
            History::WasReady => self.webserver_restarts.next(self.webserver.ready_for()),
            History::NeverStarted | History::NeverReady => None,
        };
        let Some(restart) = restart else { return Err(error(self.webserver_restarts.in_a_row())) };
        info!("Restarting Webserver {restart}");
        self.webserver.is_down(restart.pause);
        Ok(())
    }

    /// Whoever saw the server ready may kill a part of it before the router's word has arrived here.
    async fn hear_whether_ready(&mut self) {
        let deadline = deadline(READY_ON_ITS_WAY);
        while self.webserver.history() == History::NeverReady
            && let Ok(report) = timeout_at(deadline, self.control.report()).await
        {
            if report == Report::Ready {
                self.webserver.is_ready();
            }
        }
    }

    fn report(&mut self, report: Report) -> Result<(), LaunchError> {
        match report {
            Report::Ready => {
                self.webserver.is_ready();
                Ok(())
            }
            Report::Progress => {
                self.shard_restarts.progress();
                self.webserver_restarts.progress();
                Ok(())
            }
            Report::Restart { pid, reason } => self.shard_given_up(pid, &reason),
        }
    }

    /// The router cannot go on with a shard. What it says of one that is not there any more is settled already.
    fn shard_given_up(&mut self, pid: Option<u32>, reason: &Reason) -> Result<(), LaunchError> {
        let rank = pid.and_then(|pid| self.shards.rank_of(pid));
        // Without a process id it means one that was ready; while all are loading, that one is gone.
        let is_meant = if pid.is_some() { rank.is_some() } else { self.shards.are_ready() };
        if !is_meant {
            debug!("Not there any more: the shard that the webserver gave up ({reason})");
            return Ok(());
        }
        let reason = reason.to_string();
        match rank {
            Some(rank) => span(rank).in_scope(|| error!("Shard {rank} hangs or has failed: {reason}")),
            None => error!("A shard hangs or has failed: {reason}"),
        }
        self.shards_failed(ShardFailure::GivenUp { rank, reason })
    }
}

/// The shard to name, of several that have ended: one that was killed or has crashed, rather than those that ended because
/// they missed it.
fn culprit(mut ended: Vec<(usize, Ending)>) -> (usize, Ending) {
    let index = ended.iter().position(|(_, ending)| ending.is_by_signal()).unwrap_or(0);
    ended.swap_remove(index)
}

/// Now and a while. A while beyond what the clock can count is a year.
fn deadline(patience: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
    Instant::now() + patience.min(YEAR)
}
