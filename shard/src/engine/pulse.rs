//! The engine's heartbeat: what Health reads without queueing behind a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::error::Unhealthy;

/// A step may take this many times as long as the longest step so far, or as the largest step is expected to take after the warm-up.
const PATIENCE_FACTOR: u64 = 8;

/// `started` while no step is running.
const IDLE: u64 = 0;

/// Written by the engine thread, read by anybody.
#[derive(Debug)]
pub struct Pulse {
    origin: Instant,
    /// A step may always take this long, in milliseconds.
    patience_ms: u64,
    alive: AtomicBool,
    /// Whether there is a cache to step on.
    warm: AtomicBool,
    /// Milliseconds since the origin plus one, or [`IDLE`].
    started: AtomicU64,
    longest_ms: AtomicU64,
}

/// The engine thread lives as long as this value.
#[derive(Debug)]
pub(super) struct Life(Arc<Pulse>);

/// A step is running as long as this value lives.
#[derive(Debug)]
pub(super) struct Beat<'a>(&'a Pulse);

impl Pulse {
    /// Of an engine whose steps may always take as long as `patience`.
    pub(super) fn new(patience: Duration) -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            patience_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
            alive: AtomicBool::new(true),
            warm: AtomicBool::new(false),
            started: AtomicU64::new(IDLE),
            longest_ms: AtomicU64::new(0),
        })
    }

    /// Healthy while the thread lives, is warm, and is idle or in a step that is not suspiciously old.
    pub fn check(&self) -> Result<(), Unhealthy> {
        self.check_at(self.now_ms())
    }

    fn check_at(&self, now_ms: u64) -> Result<(), Unhealthy> {
        if !self.alive.load(Ordering::Acquire) {
            return Err(Unhealthy::Stopped);
        }
        if !self.warm.load(Ordering::Acquire) {
            return Err(Unhealthy::Cold);
        }
        let started = self.started.load(Ordering::Acquire);
        if started == IDLE {
            return Ok(());
        }
        let age_ms = now_ms.saturating_sub(started - 1);
        let patience_ms =
            self.patience_ms.max(self.longest_ms.load(Ordering::Relaxed).saturating_mul(PATIENCE_FACTOR));
        if age_ms < patience_ms { Ok(()) } else { Err(Unhealthy::Stuck { seconds: age_ms / 1000 }) }
    }

    pub(super) fn life(self: &Arc<Self>) -> Life {
        Life(Arc::clone(self))
    }

    pub(super) fn beat(&self) -> Beat<'_> {
        self.started.store(self.now_ms() + 1, Ordering::Release);
        Beat(self)
    }

    /// Whether steps can be made at all.
    pub(super) fn set_warm(&self, warm: bool) {
        self.warm.store(warm, Ordering::Release);
    }

    /// A step of this length is normal.
    pub(super) fn observe(&self, length: Duration) {
        self.longest_ms.fetch_max(length.as_millis() as u64, Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Release);
    }
}

impl Drop for Beat<'_> {
    fn drop(&mut self) {
        let started = self.0.started.swap(IDLE, Ordering::AcqRel);
        self.0.observe(Duration::from_millis(self.0.now_ms().saturating_sub(started.saturating_sub(1))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warm() -> Arc<Pulse> {
        let pulse = Pulse::new(Duration::from_secs(60));
        pulse.set_warm(true);
        pulse
    }

    #[test]
    fn an_engine_without_a_cache_is_not_healthy() {
        let pulse = Pulse::new(Duration::from_secs(60));
        assert_eq!(pulse.check(), Err(Unhealthy::Cold));
        pulse.set_warm(true);
        assert_eq!(pulse.check(), Ok(()));
    }

    #[test]
    fn an_idle_engine_is_healthy_for_ever() {
        let pulse = warm();
        assert_eq!(pulse.check_at(u64::MAX), Ok(()));
        drop(pulse.beat());
        assert_eq!(pulse.check_at(u64::MAX), Ok(()));
    }

    #[test]
    fn a_step_that_does_not_come_back_is_not_healthy() {
        let pulse = warm();
        let _beat = pulse.beat();
        assert_eq!(pulse.check(), Ok(()));
        assert_eq!(pulse.check_at(61_000), Err(Unhealthy::Stuck { seconds: 61 }));
    }

    #[test]
    fn slow_steps_are_normal_where_they_were_seen() {
        let pulse = warm();
        pulse.observe(Duration::from_secs(30));
        let _beat = pulse.beat();
        assert_eq!(pulse.check_at(200_000), Ok(()));
        assert!(pulse.check_at(250_000).is_err());
    }

    #[test]
    fn a_dead_engine_is_not_healthy() {
        let pulse = warm();
        drop(pulse.life());
        assert_eq!(pulse.check(), Err(Unhealthy::Stopped));
    }
}
