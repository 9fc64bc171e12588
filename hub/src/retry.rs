//! When to try again, and when to give up.

use std::time::Duration;

use tracing::warn;

use crate::client::Failure;
use crate::config::Patience;
use crate::error::HubError;

/// Counts the failures in a row of one thing that is being fetched.
#[derive(Debug)]
pub(crate) struct Retry {
    patience: Patience,
    failures: u32,
}

impl Retry {
    pub(crate) fn new(patience: Patience) -> Self {
        Self { patience, failures: 0 }
    }

    /// Something came: what failed before no longer counts.
    pub(crate) fn progressed(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next attempt.
    ///
    /// Errors when there shall be none.
    pub(crate) fn after(&mut self, failure: Failure) -> Result<Duration, HubError> {
        let (url, reason, asked) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing { url, reason, wait } => (url, reason, wait),
        };
        self.failures += 1;
        if self.failures >= self.patience.attempts {
            return Err(HubError::Unreachable { url, reason, attempts: self.failures });
        }
        let doubled = self.patience.pause * 2_u32.saturating_pow(self.failures - 1).min(64);
        let pause = asked.unwrap_or(doubled);
        if pause > self.patience.pause_max {
            let reason = format!("{reason}, and the server asks to wait for {} s", pause.as_secs());
            return Err(HubError::Unreachable { url, reason, attempts: self.failures });
        }
        warn!("{url}: {reason}; trying again in {:.1} s", pause.as_secs_f64());
        Ok(pause)
    }

    /// Does something until it succeeds.
    ///
    /// Errors when it fails for good, or too often.
    pub(crate) fn until_done<T>(
        patience: Patience,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        let mut retry = Self::new(patience);
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(failure) => std::thread::sleep(retry.after(failure)?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(attempts: u32) -> Retry {
        Retry::new(Patience { attempts, ..Patience::default() })
    }

    fn failure(wait: Option<u64>) -> Failure {
        let wait = wait.map(Duration::from_secs);
        Failure::Passing { url: "http://hub/a".into(), reason: "status 503".into(), wait }
    }

    #[test]
    fn pauses_double_until_the_last_attempt() {
        let mut retry = retry(4);
        let pauses: Vec<_> = (0..3).map(|_| retry.after(failure(None)).unwrap().as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000]);
        let error = retry.after(failure(None)).unwrap_err().to_string();
        assert_eq!(error, "cannot fetch http://hub/a: status 503 (attempts in a row: 4)");
    }

    #[test]
    fn progress_makes_good_what_failed_before() {
        let mut retry = retry(2);
        for _ in 0..10 {
            assert_eq!(retry.after(failure(None)).unwrap().as_millis(), 500);
            retry.progressed();
        }
    }

    #[test]
    fn a_server_may_ask_for_a_pause_but_not_for_any_pause() {
        assert_eq!(retry(6).after(failure(Some(7))).unwrap().as_secs(), 7);
        let error = retry(6).after(failure(Some(4000))).unwrap_err().to_string();
        assert!(error.contains("asks to wait for 4000 s"), "{error}");
    }

    #[test]
    fn what_is_final_is_not_tried_again() {
        let error = HubError::BadRevision("..".into());
        assert!(matches!(retry(6).after(Failure::Final(error)), Err(HubError::BadRevision(_))));
    }
}
