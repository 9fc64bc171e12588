//! How often something is started again, and after which pause. Pure: what the clock says, others say.

use std::fmt;
use std::time::Duration;

/// The first restarts of a row come at once: most deaths are the only one, and clients wait.
const AT_ONCE: u32 = 3;

/// Before the restart after those. It doubles from one to the next.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// What has been ready for this long works, even if nobody has asked it for anything: its next death begins a new row.
const STEADY: Duration = Duration::from_secs(600);

/// The restarts of the shards, or of the router, that have led to nothing so far.
#[derive(Debug)]
pub(super) struct Restarts {
    max: u32,
    row: u32,
}

/// One restart to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Restart {
    number: u32,
    max: u32,
    /// From now until it.
    pub(super) pause: Duration,
}

impl Restarts {
    /// At most `max` in a row.
    pub(super) fn new(max: u32) -> Self {
        Self { max, row: 0 }
    }

    /// What follows on the end of something that had been ready for this long: a restart, or none any more.
    pub(super) fn next(&mut self, ready_for: Duration) -> Option<Restart> {
        if ready_for >= STEADY {
            self.row = 0;
        }
        if self.row >= self.max {
            return None;
        }
        self.row += 1;
        Some(Restart { number: self.row, max: self.max, pause: pause(self.row) })
    }

    /// The last restart was good for something: the row ends.
    pub(super) fn progress(&mut self) {
        self.row = 0;
    }

    /// How many there have been in this row.
    pub(super) fn in_a_row(&self) -> u32 {
        self.row
    }
}

fn pause(number: u32) -> Duration {
    match number.checked_sub(AT_ONCE + 1) {
        None => Duration::ZERO,
        Some(doublings) => PAUSE_MIN.saturating_mul(2_u32.saturating_pow(doublings)).min(PAUSE_MAX),
    }
}

/// What follows the words "Restarting shards" in the log.
impl fmt::Display for Restart {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, max, pause } = self;
        if !pause.is_zero() {
            write!(formatter, "in {pause:?} ")?;
        }
        write!(formatter, "({number} of at most {max})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);

    fn pauses_ms(restarts: &mut Restarts, count: usize) -> Vec<u128> {
        (0..count).map(|_| restarts.next(SOON).unwrap().pause.as_millis()).collect()
    }

    #[test]
    fn the_first_restarts_come_at_once_and_then_the_pauses_double_up_to_ten_seconds() {
        let expected = [0, 0, 0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000];
        assert_eq!(pauses_ms(&mut Restarts::new(1000), 12), expected);
        assert_eq!(pauses_ms(&mut Restarts::new(u32::MAX), 500).last(), Some(&10_000));
    }

    #[test]
    fn there_are_as_many_in_a_row_as_allowed() {
        let mut restarts = Restarts::new(2);
        assert!(restarts.next(SOON).is_some() && restarts.next(SOON).is_some());
        assert_eq!((restarts.next(SOON), restarts.next(SOON), restarts.in_a_row()), (None, None, 2));
        assert_eq!(Restarts::new(0).next(SOON), None);
    }

    #[test]
    fn progress_begins_a_new_row() {
        let mut restarts = Restarts::new(5);
        pauses_ms(&mut restarts, 5);
        restarts.progress();
        assert_eq!(restarts.in_a_row(), 0);
        assert_eq!(pauses_ms(&mut restarts, 5), [0, 0, 0, 100, 200]);
    }

    #[test]
    fn what_was_steady_for_long_begins_a_new_row_when_it_ends() {
        let mut restarts = Restarts::new(1);
        restarts.next(SOON);
        assert_eq!(restarts.next(STEADY - SOON), None);
        assert_eq!(restarts.next(STEADY).map(|restart| restart.number), Some(1));
        assert_eq!(restarts.next(SOON), None);
        assert_eq!(Restarts::new(0).next(STEADY), None);
    }

    #[test]
    fn a_restart_says_its_number_and_its_pause() {
        let mut restarts = Restarts::new(10);
        assert_eq!(restarts.next(SOON).unwrap().to_string(), "(1 of at most 10)");
        pauses_ms(&mut restarts, 3);
        assert_eq!(restarts.next(SOON).unwrap().to_string(), "in 200ms (5 of at most 10)");
    }
}
