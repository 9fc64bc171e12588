//! The signals that end the launcher.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals this close to the first one are its echo: `timeout` and terminals signal a process and then its group.
const ECHO: Duration = Duration::from_secs(1);

/// SIGTERM, SIGINT and SIGHUP. From its creation on they no longer end the process; they wait here to be noticed.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    first: Option<Instant>,
}

impl StopSignals {
    /// Takes the signals over. To be called inside of the runtime.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            first: None,
        })
    }

    /// Waits for the next signal and says its name.
    pub async fn next(&mut self) -> &'static str {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
        };
        self.first.get_or_insert_with(Instant::now);
        name
    }

    /// Waits for the signal of an impatient user, and says its name: while the launcher is ending, any signal that is not
    /// an echo of the one that began it.
    pub async fn impatient(&mut self) -> &'static str {
        let began = self.first;
        loop {
            let name = self.next().await;
            if began.is_none_or(|first| first.elapsed() >= ECHO) {
                return name;
            }
        }
    }
}
