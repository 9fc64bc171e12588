//! What a router and the launcher that supervises it tell each other: lines of text over a unix socket, which the launcher
//! listens on and whose path it gives to the router.
//!
//! | line | from | meaning |
//! |---|---|---|
//! | `ready` | router | HTTP is served, and the shards are warm |
//! | `progress` | router | a step has been made, the first one since the router or the shards were started |
//! | `restart <pid> <reason>` | router | the shard with this process id hangs or has failed inside; 0 when the router does not know which one it is |
//! | `abandon <reason>` | launcher | the shards will not come back: whoever waits for them has to be told |
//!
//! Both sides write a message with [`Display`](fmt::Display), a line feed behind it, and read with [`Lines`]. A line that
//! is none of these is for the log and for nothing else, so that either side may be of another version.

use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::str::FromStr;

/// Longest line that is read, in bytes, without its line feed.
pub const LINE_BYTES_MAX: usize = 4096;

/// Longest reason that is sent, in bytes. Leaves a line plenty of room for the words before it.
const REASON_BYTES_MAX: usize = 2048;

/// Most that an error shows of a line, in characters.
const SHOWN_CHARACTERS: usize = 100;

/// What a router tells its launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// HTTP is served, and the shards are warm.
    Ready,
    /// A step has been made, the first one since the router or the shards were started.
    Progress,
    /// The shards have to be started again.
    Restart {
        /// Process id of the one that gave the reason, if the router knows it.
        pid: Option<u32>,
        /// Why.
        reason: Reason,
    },
}

/// What a launcher tells its router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// The shards will not come back.
    Abandon {
        /// Why.
        reason: Reason,
    },
}

/// Some words on one line, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason(String);

/// A line that is no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLine {
    /// It has other words, or they are not UTF-8.
    #[error("`{0}` is no message")]
    Unknown(String),
    /// It has no end within [`LINE_BYTES_MAX`].
    #[error("a line of more than {LINE_BYTES_MAX} bytes is no message")]
    TooLong,
}

impl Reason {
    /// The text on one line: what breaks lines becomes blanks, and what is too long is cut off.
    pub fn new(text: &str) -> Self {
        let words = text.split(|letter: char| letter.is_control() || letter.is_whitespace());
        let mut line = words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        line.truncate(line.floor_char_boundary(REASON_BYTES_MAX));
        line.truncate(line.trim_end().len());
        if line.is_empty() { Self("no reason given".to_owned()) } else { Self(line) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => formatter.write_str("ready"),
            Self::Progress => formatter.write_str("progress"),
            Self::Restart { pid, reason } => write!(formatter, "restart {} {reason}", pid.unwrap_or(0)),
        }
    }
}

impl FromStr for Report {
    type Err = BadLine;

    fn from_str(line: &str) -> Result<Self, BadLine> {
        let restart = || {
            let rest = line.strip_prefix("restart ")?;
            let (pid, reason) = rest.split_once(' ').unwrap_or((rest, ""));
            let pid = Some(pid.parse().ok()?).filter(|pid| *pid != 0);
            Some(Self::Restart { pid, reason: Reason::new(reason) })
        };
        match line {
            "ready" => Ok(Self::Ready),
            "progress" => Ok(Self::Progress),
            _ => restart().ok_or_else(|| BadLine::unknown(line)),
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abandon { reason } => write!(formatter, "abandon {reason}"),
        }
    }
}

impl FromStr for Order {
    type Err = BadLine;

    fn from_str(line: &str) -> Result<Self, BadLine> {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("abandon", reason) => Ok(Self::Abandon { reason: Reason::new(reason) }),
            _ => Err(BadLine::unknown(line)),
        }
    }
}

impl BadLine {
    fn unknown(line: &str) -> Self {
        Self::Unknown(line.chars().take(SHOWN_CHARACTERS).collect::<String>().escape_debug().to_string())
    }
}

/// Makes messages of what arrives, in whatever pieces that does. Keeps at most one line.
#[derive(Debug)]
pub struct Lines<M> {
    /// The beginning of a line.
    begun: Vec<u8>,
    /// Whether that line is too long already; it is not kept then.
    too_long: bool,
    message: PhantomData<M>,
}

impl<M> Default for Lines<M> {
    fn default() -> Self {
        Self { begun: Vec::new(), too_long: false, message: PhantomData }
    }
}

impl<M: FromStr<Err = BadLine>> Lines<M> {
    /// Takes the next bytes; the lines that they end, in order.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Result<M, BadLine>> {
        let mut messages = Vec::new();
        let mut pieces = bytes.split(|byte| *byte == b'\n');
        // What follows the last line feed, if only nothing, begins the next line.
        let begins = pieces.next_back().unwrap_or_default();
        for piece in pieces {
            self.keep(piece);
            messages.push(self.end());
        }
        self.keep(begins);
        messages
    }

    fn keep(&mut self, piece: &[u8]) {
        self.too_long |= self.begun.len() + piece.len() > LINE_BYTES_MAX;
        if self.too_long {
            self.begun.clear();
        } else {
            self.begun.extend_from_slice(piece);
        }
    }

    fn end(&mut self) -> Result<M, BadLine> {
        let line = mem::take(&mut self.begun);
        if mem::take(&mut self.too_long) {
            return Err(BadLine::TooLong);
        }
        match str::from_utf8(&line) {
            Ok(line) => line.parse(),
            Err(_) => Err(BadLine::unknown(&String::from_utf8_lossy(&line))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restart(pid: Option<u32>, reason: &str) -> Report {
        Report::Restart { pid, reason: Reason::new(reason) }
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let reports = [
            (Report::Ready, "ready"),
            (Report::Progress, "progress"),
            (restart(Some(4711), "no answer within 60 s"), "restart 4711 no answer within 60 s"),
            (restart(None, "internal error: NaN"), "restart 0 internal error: NaN"),
        ];
        for (report, line) in reports {
            assert_eq!(report.to_string(), line);
            assert_eq!(line.parse(), Ok(report));
        }
        let order = Order::Abandon { reason: Reason::new("shard 0 ended with signal 9 (SIGKILL)") };
        assert_eq!(order.to_string(), "abandon shard 0 ended with signal 9 (SIGKILL)");
        assert_eq!(order.to_string().parse(), Ok(order));
    }

    #[test]
    fn a_reason_is_one_line_that_is_not_empty_and_fits() {
        assert_eq!(Reason::new(" a\r\n\tb\0c ").as_str(), "a b c");
        assert_eq!(Reason::new("\n").as_str(), "no reason given");
        let long = restart(Some(u32::MAX), &"é".repeat(LINE_BYTES_MAX));
        assert!(long.to_string().len() <= LINE_BYTES_MAX);
        assert_eq!(long.to_string().parse(), Ok(long));
        let cut_at_a_blank = restart(None, &"x ".repeat(LINE_BYTES_MAX));
        assert_eq!(cut_at_a_blank.to_string().parse(), Ok(cut_at_a_blank));
    }

    #[test]
    fn a_missing_reason_is_no_reason_to_do_nothing() {
        assert_eq!("restart 12".parse(), Ok(restart(Some(12), "no reason given")));
        assert_eq!("abandon".parse(), Ok(Order::Abandon { reason: Reason::new("") }));
    }

    #[test]
    fn other_lines_are_no_messages() {
        let lines =
            ["", "Ready", "ready ", "progress 1", "restart", "restart now", "restart -1 a", "abandon a"];
        for line in lines {
            assert_eq!(line.parse::<Report>(), Err(BadLine::Unknown(line.to_owned())));
        }
        assert_eq!("ready".parse::<Order>(), Err(BadLine::Unknown("ready".to_owned())));
        let error = format!("\x1b[2J{}", "x".repeat(1000)).parse::<Order>().unwrap_err().to_string();
        assert!(error.contains(r"\u{1b}") && error.len() < 200, "{error}");
    }

    #[test]
    fn messages_arrive_in_any_pieces() {
        let text = "ready\nprogress\nrestart 7 it hangs\n";
        let expected = [Ok(Report::Ready), Ok(Report::Progress), Ok(restart(Some(7), "it hangs"))];
        for size in 1..=text.len() {
            let mut lines = Lines::default();
            let read: Vec<_> = text.as_bytes().chunks(size).flat_map(|piece| lines.feed(piece)).collect();
            assert_eq!(read, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn garbage_is_an_error_per_line_and_what_follows_is_read() {
        let mut lines = Lines::<Report>::default();
        let read = lines.feed(b"\xff\xfe\nready\n\nprogress\nrea");
        let error = |text: &str| Err(BadLine::Unknown(text.to_owned()));
        assert_eq!(read, [error("\u{fffd}\u{fffd}"), Ok(Report::Ready), error(""), Ok(Report::Progress)]);
        assert_eq!(lines.feed(b"dy\n"), [Ok(Report::Ready)]);
    }

    #[test]
    fn a_line_without_an_end_is_not_kept() {
        let mut lines = Lines::<Report>::default();
        for _ in 0..1000 {
            assert_eq!(lines.feed(&[b'x'; 100]), []);
            assert!(lines.begun.len() <= LINE_BYTES_MAX);
        }
        assert_eq!(lines.feed(b"\nready\n"), [Err(BadLine::TooLong), Ok(Report::Ready)]);
    }
}
