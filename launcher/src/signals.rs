//! The signals that end the launcher.

use std::future::pending;
use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Signals this close to the first one are its echo: `timeout` and terminals signal a process and then its group.
const ECHO: Duration = Duration::from_secs(1);

/// Signals that wait to be noticed. More of them say nothing new.
const WAITING: usize = 8;

/// SIGTERM, SIGINT and SIGHUP. From its creation on they no longer end the process; they wait here to be noticed.
#[derive(Debug)]
pub struct StopSignals {
    names: mpsc::Receiver<&'static str>,
    first: Option<Instant>,
}

impl StopSignals {
    /// Takes the signals over. To be called inside of the runtime.
    pub fn listen() -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let (sender, names) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                    _ = hangup.recv() => "SIGHUP",
                };
                if sender.send(name).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self::named(names))
    }

    /// Signals that somebody else tells of.
    pub fn named(names: mpsc::Receiver<&'static str>) -> Self {
        Self { names, first: None }
    }

    /// Waits for the next signal and says its name.
    pub async fn next(&mut self) -> &'static str {
        let Some(name) = self.names.recv().await else { return pending().await };
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
