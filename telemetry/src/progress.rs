//! How far something long has come: one bar on a terminal, a log line every few seconds elsewhere.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::info;

/// How often the log says how far it is.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How often the bar is drawn.
const BAR_EVERY: Duration = Duration::from_millis(100);

/// Letters of the bar itself.
const BAR_WIDTH: u64 = 24;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressStyle {
    /// One line on standard error that is drawn again and again.
    Bar,
    /// Log lines.
    Lines,
}

impl ProgressStyle {
    /// A bar if people watch: standard error is a terminal, and the log is not for programs.
    pub fn fitting(format: super::LogFormat) -> Self {
        match format {
            super::LogFormat::Text if io::stderr().is_terminal() => Self::Bar,
            _ => Self::Lines,
        }
    }
}

/// The progress of one thing that is counted in bytes. Shared by all threads that work on it.
#[derive(Debug)]
pub struct Progress {
    style: ProgressStyle,
    what: String,
    total: Option<u64>,
    begun: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Bytes that are there.
    done: u64,
    /// Those of them that came since the beginning; the others had come before.
    moved: u64,
    shown: Instant,
}

impl Progress {
    /// Progress towards `total` bytes, where that is known, of which `done` are there already.
    pub fn new(style: ProgressStyle, what: impl Into<String>, total: Option<u64>, done: u64) -> Self {
        let begun = Instant::now();
        let state = Mutex::new(State { done, moved: 0, shown: begun });
        Self { style, what: what.into(), total, begun, state }
    }

    /// More bytes are there.
    pub fn add(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.done += bytes;
        state.moved += bytes;
        let every = if self.style == ProgressStyle::Bar { BAR_EVERY } else { LINE_EVERY };
        if state.shown.elapsed() >= every {
            state.shown = Instant::now();
            self.show(&state);
        }
    }

    /// Bytes turned out to be wrong and will come again.
    pub fn take_back(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.done = state.done.saturating_sub(bytes);
    }

    /// Everything is there: says how long it took.
    pub fn finish(&self) {
        let state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.clear();
        let seconds = self.begun.elapsed().as_secs_f64();
        let rate = Bytes(rate(state.moved, seconds) as u64);
        info!("{}: {} in {seconds:.1} s ({rate}/s)", self.what, Bytes(state.moved));
    }

    fn show(&self, state: &State) {
        let text = text(state, self.total, self.begun.elapsed().as_secs_f64());
        match self.style {
            ProgressStyle::Bar => {
                let full = self.total.map_or(0, |total| share(state.done, total) * BAR_WIDTH / 100);
                let bar: String = (0..BAR_WIDTH).map(|place| if place < full { '#' } else { '.' }).collect();
                self.draw(&format!("{} [{bar}] {text}", self.what));
            }
            ProgressStyle::Lines => info!("{}: {text}", self.what),
        }
    }

    fn clear(&self) {
        if self.style == ProgressStyle::Bar {
            self.draw("");
        }
    }

    /// Puts a text in the place of the last one. A terminal that is gone is no reason to stop working.
    fn draw(&self, text: &str) {
        let mut terminal = io::stderr().lock();
        let _ = write!(terminal, "\r\x1b[2K{text}\r").and_then(|()| terminal.flush());
    }
}

/// Whatever ended it, no half bar stays on the terminal.
impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn text(state: &State, total: Option<u64>, seconds: f64) -> String {
    let rate = rate(state.moved, seconds);
    let speed = Bytes(rate as u64);
    match total {
        Some(total) => {
            let left = total.saturating_sub(state.done) as f64 / rate.max(1.0);
            let percent = share(state.done, total);
            format!("{percent} % of {}, {speed}/s, {} left", Bytes(total), Span(left as u64))
        }
        None => format!("{}, {speed}/s", Bytes(state.done)),
    }
}

/// Percent, rounded down: 100 only when all is there.
fn share(done: u64, total: u64) -> u64 {
    if total == 0 {
        100
    } else {
        u64::try_from(u128::from(done.min(total)) * 100 / u128::from(total)).unwrap_or(100)
    }
}

fn rate(moved: u64, seconds: f64) -> f64 {
    moved as f64 / seconds.max(0.001)
}

/// An amount of data in the unit that fits, in powers of ten as networks and disks are measured.
struct Bytes(u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(formatter, "{} B", self.0),
            1_000..1_000_000 => write!(formatter, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(formatter, "{:.1} MB", bytes / 1e6),
            _ => write!(formatter, "{:.2} GB", bytes / 1e9),
        }
    }
}

/// Seconds, as people read a clock.
struct Span(u64);

impl std::fmt::Display for Span {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.0;
        match seconds {
            0..60 => write!(formatter, "{seconds} s"),
            60..3600 => write!(formatter, "{}:{:02} min", seconds / 60, seconds % 60),
            _ => write!(formatter, "{}:{:02} h", seconds / 3600, seconds % 3600 / 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(done: u64, moved: u64) -> State {
        State { done, moved, shown: Instant::now() }
    }

    #[test]
    fn the_text_has_percent_total_rate_and_time_left() {
        let text = text(&state(3_000_000_000, 1_000_000_000), Some(5_000_000_000), 10.0);
        assert_eq!(text, "60 % of 5.00 GB, 100.0 MB/s, 20 s left");
    }

    #[test]
    fn what_has_no_known_end_has_no_percent() {
        assert_eq!(text(&state(1500, 500), None, 1.0), "1.5 kB, 500 B/s");
    }

    #[test]
    fn a_hundred_percent_is_all_of_it() {
        assert_eq!(
            [share(999, 1000), share(1000, 1000), share(2000, 1000), share(0, 0)],
            [99, 100, 100, 100]
        );
    }

    #[test]
    fn times_are_read_like_a_clock() {
        assert_eq!([59, 61, 3725].map(|seconds| Span(seconds).to_string()), ["59 s", "1:01 min", "1:02 h"]);
    }
}
