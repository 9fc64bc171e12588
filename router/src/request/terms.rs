//! What a client says about a request beside its body: headers, the same on every route that generates.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::{Deadline, Priority, ValidRequest};

/// `x-priority`: how urgent the request is, from 0 to 9.
pub(crate) const PRIORITY: &str = "x-priority";
/// `x-request-timeout`: the seconds after which the client wants no answer any more.
pub(crate) const TIMEOUT: &str = "x-request-timeout";

/// A header that cannot be kept to. The text names it and its value.
#[derive(Clone, Debug, Error, PartialEq)]
pub(crate) enum TermsError {
    #[error("Input validation error: `{name}` is `{value}`, but must be a number")]
    NoNumber { name: &'static str, value: String },
    #[error("Input validation error: `{name}` is {value}, but must be {range}")]
    Range { name: &'static str, value: String, range: &'static str },
}

/// `None` is not said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Terms {
    pub(crate) priority: Option<Priority>,
    pub(crate) patience: Option<Duration>,
}

impl Terms {
    /// Reads the values of [`PRIORITY`] and [`TIMEOUT`].
    pub(crate) fn read(priority: Option<&str>, timeout: Option<&str>) -> Result<Self, TermsError> {
        let priority = priority.map(|value| read_priority(value.trim())).transpose()?;
        let patience = timeout.map(|value| read_timeout(value.trim())).transpose()?;
        Ok(Self { priority, patience })
    }

    /// Holds a request to them. A priority in the headers outweighs the body's: headers are set by whoever stands between
    /// a client and the server, too.
    pub(crate) fn apply(self, request: &mut ValidRequest, received: Instant) {
        request.priority = self.priority.unwrap_or(request.priority);
        request.deadline = self.patience.and_then(|after| {
            // What is later than the clock can tell never comes.
            received.checked_add(after).map(|at| Deadline { at, after })
        });
    }
}

fn read_priority(value: &str) -> Result<Priority, TermsError> {
    let number: f64 = number(PRIORITY, value)?;
    let whole = number.fract() == 0.0 && (0.0..=9.0).contains(&number);
    let priority = if whole { Priority::new(number as u8) } else { None };
    priority.ok_or_else(|| TermsError::Range {
        name: PRIORITY,
        value: value.to_owned(),
        range: Priority::RANGE,
    })
}

fn read_timeout(value: &str) -> Result<Duration, TermsError> {
    let seconds: f64 = number(TIMEOUT, value)?;
    if seconds > 0.0 && seconds.is_finite() {
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    } else {
        Err(TermsError::Range { name: TIMEOUT, value: value.to_owned(), range: "above 0 (seconds)" })
    }
}

fn number(name: &'static str, value: &str) -> Result<f64, TermsError> {
    value.parse().map_err(|_| TermsError::NoNumber { name, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(priority: Option<&str>, timeout: Option<&str>, complaint: &str) {
        assert_eq!(Terms::read(priority, timeout).unwrap_err().to_string(), complaint);
    }

    #[test]
    fn a_priority_is_a_whole_number_from_0_to_9() {
        let read = |value| Terms::read(Some(value), None).unwrap().priority.map(Priority::get);
        assert_eq!([read("0"), read(" 9 "), read("5")], [Some(0), Some(9), Some(5)]);
        assert_eq!(Terms::read(None, None).unwrap(), Terms::default());
        for wrong in ["10", "-1", "2.5", "NaN", "1e300"] {
            let complaint = "but must be a whole number from 0 to 9";
            check(
                Some(wrong),
                None,
                &format!("Input validation error: `x-priority` is {wrong}, {complaint}"),
            );
        }
        for wrong in ["high", "", "1 2"] {
            let complaint = "but must be a number";
            check(
                Some(wrong),
                None,
                &format!("Input validation error: `x-priority` is `{wrong}`, {complaint}"),
            );
        }
    }

    #[test]
    fn a_timeout_is_in_seconds_and_above_zero() {
        let read = |value| Terms::read(None, Some(value)).unwrap().patience;
        assert_eq!(read("2"), Some(Duration::from_secs(2)));
        assert_eq!(read("0.25"), Some(Duration::from_millis(250)));
        assert_eq!(read("1e300"), Some(Duration::MAX));
        for wrong in ["0", "-1", "inf", "NaN"] {
            let complaint = "but must be above 0 (seconds)";
            check(
                None,
                Some(wrong),
                &format!("Input validation error: `x-request-timeout` is {wrong}, {complaint}"),
            );
        }
        check(None, Some("2s"), "Input validation error: `x-request-timeout` is `2s`, but must be a number");
    }
}
