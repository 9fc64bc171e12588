//! Whether requests can be served, and if not, why: one state, from which `/health` and the doors of the routes answer.
//!
//! Every transition has one writer: the start says which part of it is under way, the batcher when the shards come and
//! go, a stop signal when the end begins. Beside them the heartbeat asks the shards once a second, so that a probe
//! waits for nobody. Requests under way are counted here as well: the end may come when there are none.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::shards::ShardError;

/// From one heartbeat to the next question.
const PAUSE: Duration = Duration::from_secs(1);
/// A shard answers from a thread of its own, in a long step too.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Hits and misses come at least every three seconds; after this long the heart itself has stopped.
const FRESH: Duration = Duration::from_secs(10);

/// The state of the server. Cheap to clone; every clone is the same state.
#[derive(Clone, Debug)]
pub struct Availability(Arc<watch::Sender<Standing>>);

#[derive(Debug)]
struct Standing {
    phase: Phase,
    heart: Heart,
    /// Requests under way, from their head to the end of their answer.
    in_flight: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Not yet: what is being done.
    Starting(&'static str),
    Serving,
    /// Not now: why.
    Recovering(String),
    /// Not any more: why.
    Failed(String),
    /// Until the requests under way have ended.
    Draining,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Heart {
    /// When the last question was answered, or not.
    beat: Instant,
    /// Why the last question had no good answer.
    missed: Option<String>,
}

/// Requests cannot be served, or those that are served make no progress.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{reason}")]
pub struct Unavailable {
    /// For machines.
    pub status: Status,
    /// For people.
    pub reason: String,
}

/// In what way requests cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not yet.
    Starting,
    /// Not now: those that come wait.
    Recovering,
    /// Not any more, because the server was stopped.
    Draining,
    /// Something is wrong.
    Unhealthy,
}

/// A request under way. Whoever holds it keeps the server from ending, for as long as its patience lasts.
#[derive(Debug)]
pub(crate) struct InFlight(Availability);

impl Availability {
    /// Of a server that begins to start.
    pub fn starting() -> Self {
        let heart = Heart { beat: Instant::now(), missed: None };
        let standing = Standing { phase: Phase::Starting("the server is starting"), heart, in_flight: 0 };
        Self(Arc::new(watch::Sender::new(standing)))
    }

    /// Says what the start does next.
    pub(crate) fn starting_with(&self, what: &'static str) {
        self.enter_phase(Phase::Starting(what));
    }

    /// The start is over. What has happened meanwhile stands.
    pub(crate) fn started(&self) {
        let starting = matches!(self.0.borrow().phase, Phase::Starting(_));
        if starting {
            self.serving();
        }
    }

    /// Steps can be made. Whoever says so has just heard from the shards.
    pub fn serving(&self) {
        self.beat(Ok(()));
        self.enter_phase(Phase::Serving);
    }

    /// No steps can be made now, but again soon.
    pub fn recovering(&self, reason: &str) {
        self.enter_phase(Phase::Recovering(reason.to_owned()));
    }

    /// No steps can be made any more.
    pub fn failed(&self, reason: &str) {
        self.enter_phase(Phase::Failed(reason.to_owned()));
    }

    /// The server is to end: no new requests.
    pub(crate) fn draining(&self) {
        self.enter_phase(Phase::Draining);
    }

    /// Nothing undoes the end, and only the end undoes a failure.
    fn enter_phase(&self, phase: Phase) {
        self.0.send_if_modified(|standing| {
            let later = match &standing.phase {
                Phase::Draining => false,
                Phase::Failed(_) => phase == Phase::Draining,
                _ => standing.phase != phase,
            };
            if later {
                tracing::debug!("from {:?} to {phase:?}", standing.phase);
                standing.phase = phase;
            }
            later
        });
    }

    /// Errors while requests cannot be served, or the shards do not answer.
    pub fn check(&self) -> Result<(), Unavailable> {
        let standing = self.0.borrow();
        match standing.phase.trouble() {
            Some(trouble) => Err(trouble),
            None => standing.heart.check(),
        }
    }

    /// Takes a request in. Errors before the start has ended and once the end has begun; in between requests are taken
    /// whatever the shards do, and wait for them.
    pub(crate) fn enter(&self) -> Result<InFlight, Unavailable> {
        let mut refused = None;
        self.0.send_if_modified(|standing| {
            if matches!(standing.phase, Phase::Starting(_) | Phase::Draining) {
                refused = standing.phase.trouble();
                return false;
            }
            standing.in_flight += 1;
            true
        });
        match refused {
            Some(trouble) => Err(trouble),
            None => Ok(InFlight(self.clone())),
        }
    }

    /// Resolves once the end has begun and no request is under way any more.
    pub(crate) async fn drained(&self) {
        let mut changes = self.0.subscribe();
        let drained = |standing: &Standing| standing.phase == Phase::Draining && standing.in_flight == 0;
        changes.wait_for(drained).await.expect("the sender is here");
    }

    /// Asks the shards for as long as it is polled, and remembers what they say. A shard that does not answer in time is
    /// a heartbeat missed; the next good answer makes up for it.
    pub(crate) async fn follow<F>(&self, ask: impl Fn() -> F)
    where
        F: Future<Output = Result<(), ShardError>>,
    {
        loop {
            self.beat(match timeout(ANSWER_MAX, ask()).await {
                Ok(answer) => answer.map_err(|error| error.to_string()),
                Err(_) => Err(format!("the model server did not answer within {} s", ANSWER_MAX.as_secs())),
            });
            sleep(PAUSE).await;
        }
    }

    fn beat(&self, answer: Result<(), String>) {
        let missed = answer.err();
        self.0.send_modify(|standing| {
            match (&standing.heart.missed, &missed) {
                (None, Some(reason)) => tracing::error!(reason, "unhealthy"),
                (Some(_), None) => tracing::info!("healthy again"),
                _ => {}
            }
            standing.heart = Heart { beat: Instant::now(), missed };
        });
    }
}

impl Phase {
    fn trouble(&self) -> Option<Unavailable> {
        let (status, reason) = match self {
            Self::Serving => return None,
            Self::Starting(what) => (Status::Starting, *what),
            Self::Recovering(reason) => (Status::Recovering, reason.as_str()),
            Self::Failed(reason) => (Status::Unhealthy, reason.as_str()),
            Self::Draining => (Status::Draining, "the server is shutting down and takes no new requests"),
        };
        Some(Unavailable { status, reason: reason.to_owned() })
    }
}

impl Heart {
    fn check(&self) -> Result<(), Unavailable> {
        let reason = match &self.missed {
            Some(reason) => reason.clone(),
            None if self.beat.elapsed() > FRESH => {
                format!("nobody has asked the model server for {} s", self.beat.elapsed().as_secs())
            }
            None => return Ok(()),
        };
        Err(Unavailable::unhealthy(reason))
    }
}

impl Unavailable {
    /// Something is wrong.
    pub(crate) fn unhealthy(reason: String) -> Self {
        Self { status: Status::Unhealthy, reason }
    }
}

impl fmt::Display for Status {
    /// As `/health` writes it.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Starting => "starting",
            Self::Recovering => "recovering",
            Self::Draining => "draining",
            Self::Unhealthy => "unhealthy",
        })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.0.send_modify(|standing| standing.in_flight -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::pin::pin;
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::FutureExt as _;

    use super::*;

    fn serving() -> Availability {
        let availability = Availability::starting();
        availability.serving();
        availability
    }

    #[track_caller]
    fn check(availability: &Availability, status: Status, reason: &str) {
        let trouble = availability.check().unwrap_err();
        assert_eq!((trouble.status, trouble.reason.as_str()), (status, reason));
    }

    #[tokio::test]
    async fn a_server_starts_serves_recovers_and_serves_again() {
        let availability = Availability::starting();
        check(&availability, Status::Starting, "the server is starting");
        assert_eq!(availability.enter().unwrap_err().status, Status::Starting);
        availability.starting_with("warming up");
        check(&availability, Status::Starting, "warming up");
        availability.started();
        assert_eq!(availability.check(), Ok(()));
        availability.recovering("shard 0 has ended");
        availability.started();
        check(&availability, Status::Recovering, "shard 0 has ended");
        assert!(availability.enter().is_ok(), "requests wait for the shards");
        availability.serving();
        assert_eq!(availability.check(), Ok(()));
    }

    #[tokio::test]
    async fn nothing_undoes_a_failure_but_the_end_and_nothing_the_end() {
        let availability = serving();
        availability.failed("no shard starts any more");
        availability.serving();
        availability.recovering("again");
        check(&availability, Status::Unhealthy, "no shard starts any more");
        availability.draining();
        availability.serving();
        availability.recovering("again");
        availability.failed("again");
        let reason = "the server is shutting down and takes no new requests";
        check(&availability, Status::Draining, reason);
        assert_eq!(availability.enter().unwrap_err().reason, reason);
    }

    #[tokio::test]
    async fn it_is_drained_once_the_last_request_has_ended() {
        let availability = serving();
        let mut drained = pin!(availability.drained());
        assert!(drained.as_mut().now_or_never().is_none(), "the end has not begun");
        let [first, second] = [(); 2].map(|()| availability.enter().unwrap());
        availability.draining();
        drop(first);
        assert!(drained.as_mut().now_or_never().is_none());
        drop(second);
        assert!(drained.now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_missed_heartbeat_is_unhealthy_until_the_next_good_one() {
        let (availability, asked) = (serving(), AtomicU32::new(0));
        let heart = availability.follow(|| match asked.fetch_add(1, Ordering::Relaxed) {
            1 => ready(Err(ShardError::Empty)).boxed(),
            2 => pending().boxed(),
            _ => ready(Ok(())).boxed(),
        });
        let moments = async {
            let second = || sleep(Duration::from_millis(1001));
            assert_eq!(availability.check(), Ok(()));
            second().await;
            check(&availability, Status::Unhealthy, "Sharded results are empty");
            // Asked, and without an answer.
            second().await;
            check(&availability, Status::Unhealthy, "Sharded results are empty");
            sleep(ANSWER_MAX).await;
            check(&availability, Status::Unhealthy, "the model server did not answer within 2 s");
            second().await;
            assert_eq!(availability.check(), Ok(()));
        };
        tokio::select! {
            () = heart => unreachable!(),
            () = moments => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_anybody_who_asks_health_grows_stale() {
        let availability = serving();
        tokio::time::advance(FRESH).await;
        assert_eq!(availability.check(), Ok(()));
        tokio::time::advance(PAUSE).await;
        check(&availability, Status::Unhealthy, "nobody has asked the model server for 11 s");
        availability.serving();
        assert_eq!(availability.check(), Ok(()));
    }
}
