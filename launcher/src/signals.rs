//! The signals that end the launcher.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM, SIGINT and SIGHUP. From its creation on they no longer end the process; they wait here to be noticed.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    seen: usize,
}

impl StopSignals {
    /// Takes the signals over. To be called inside of the runtime.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            seen: 0,
        })
    }

    /// Waits for the next signal and says its name.
    pub async fn next(&mut self) -> &'static str {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
        };
        self.seen += 1;
        name
    }

    /// Waits for the second signal since the beginning, the sign of an impatient user, and says its name.
    pub async fn second(&mut self) -> &'static str {
        loop {
            let name = self.next().await;
            if self.seen >= 2 {
                return name;
            }
        }
    }
}
