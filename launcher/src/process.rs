//! One child process: start, wait, stop. It does not outlive its handle.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::task::{Context, Poll};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use crate::plan::ChildCommand;

/// A running child, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts a child in a process group of its own, so that a Ctrl-C in the terminal reaches the launcher alone. Its
    /// output goes where the launcher's goes. To be called on a thread that lives as long as the launcher: the kernel
    /// takes the end of that thread for the end of the child's parent.
    ///
    /// Errors when the program cannot be started.
    pub fn spawn(name: impl Into<String>, plan: &ChildCommand) -> io::Result<Self> {
        let mut command = Command::new(&plan.program);
        command.args(&plan.arguments).stdin(Stdio::null()).process_group(0).kill_on_drop(true);
        for name in &plan.removed {
            command.env_remove(name);
        }
        for (name, value) in &plan.variables {
            command.env(name, value.reveal());
        }
        Ok(Self { name: name.into(), child: command.spawn()? })
    }

    /// Its process id; none once its end has been noticed.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Becomes ready when the child has ended; may be asked again and again.
    pub fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Ending> {
        pin!(self.child.wait()).poll(context).map(Ending::from)
    }

    /// Waits until the child has ended; may be asked again and again.
    pub async fn end(&mut self) -> Ending {
        poll_fn(|context| self.poll_end(context)).await
    }

    /// Asks the child to end. One that has ended is left alone.
    pub fn terminate(&self) {
        if self.child.id().is_some() {
            info!("Terminating {}", self.name);
            self.signal(Signal::SIGTERM);
        }
    }

    /// Waits for the end of the child until `deadline`, then kills it.
    pub async fn end_by(&mut self, deadline: Instant) {
        if self.child.id().is_none() {
            return;
        }
        match timeout_at(deadline, self.child.wait()).await {
            Ok(end) => info!("{} terminated with {}", self.name, Ending::from(end)),
            Err(_) => {
                warn!("{} has not ended in time and is killed", self.name);
                self.kill().await;
            }
        }
    }

    /// Has the child ended at once, without waiting for it.
    pub fn send_kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Ends the child at once.
    pub async fn kill(&mut self) {
        self.send_kill();
        // Nothing is left to be done when even this fails; dropping the handle tries again.
        let _ = self.child.wait().await;
    }

    /// Sends a signal to the child and what it may have started.
    fn signal(&self, signal: Signal) {
        // No id: it has ended and was waited for, so its number may be another process's by now.
        let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) else { return };
        if let Err(error) = killpg(Pid::from_raw(id), signal) {
            warn!("Cannot send {signal} to {}: {error}", self.name);
        }
    }
}

/// How a child ended.
#[derive(Debug)]
pub enum Ending {
    /// It exited or was killed.
    Status(ExitStatus),
    /// The system does not tell.
    Unknown(io::Error),
}

impl Ending {
    /// Whether the child did what it was started for.
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Status(status) if status.success())
    }

    /// Whether something outside of it, or a crash, ended it.
    pub fn is_by_signal(&self) -> bool {
        matches!(self, Self::Status(status) if status.signal().is_some())
    }
}

impl From<io::Result<ExitStatus>> for Ending {
    fn from(result: io::Result<ExitStatus>) -> Self {
        result.map_or_else(Self::Unknown, Self::Status)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self {
            Self::Status(status) => status,
            Self::Unknown(error) => return write!(formatter, "an unknown status ({error})"),
        };
        match (status.code(), status.signal()) {
            (Some(code), _) => write!(formatter, "exit code {code}"),
            (None, Some(number)) => match Signal::try_from(number) {
                Ok(signal) => write!(formatter, "signal {number} ({signal})"),
                Err(_) => write!(formatter, "signal {number}"),
            },
            (None, None) => write!(formatter, "{status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::plan::EnvValue;

    fn shell(script: &str) -> ChildCommand {
        ChildCommand {
            program: PathBuf::from("/bin/sh"),
            arguments: vec!["-c".into(), script.into()],
            variables: vec![("CARGO_PKG_NAME", EnvValue::Plain("kept".into()))],
            // Variables that cargo sets wherever tests run.
            removed: vec!["CARGO_MANIFEST_DIR".into(), "CARGO_PKG_NAME".into()],
        }
    }

    async fn ending(script: &str) -> String {
        let mut process = Process::spawn("test", &shell(script)).unwrap();
        process.end().await.to_string()
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn an_ending_says_the_code_or_the_signal() {
        runtime().block_on(async {
            assert_eq!(ending("exit 3").await, "exit code 3");
            assert_eq!(ending("kill -9 $$").await, "signal 9 (SIGKILL)");
        });
    }

    #[test]
    fn removed_variables_are_gone_and_given_ones_are_there() {
        runtime().block_on(async {
            let script =
                r#"test -z "$CARGO_MANIFEST_DIR" && test "$CARGO_PKG_NAME" = kept && test -n "$PATH""#;
            assert_eq!(ending(script).await, "exit code 0");
        });
    }

    #[test]
    fn a_child_leads_a_process_group_of_its_own() {
        runtime().block_on(async {
            let script = r#"test "$(cut -d ' ' -f 5 /proc/$$/stat)" = $$"#;
            assert_eq!(ending(script).await, "exit code 0");
        });
    }

    #[test]
    fn a_child_that_ignores_the_request_is_killed_at_the_deadline() {
        runtime().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let ready = directory.path().join("ready");
            let script = format!("trap '' TERM; : > '{}'; while :; do sleep 1; done", ready.display());
            let mut process = Process::spawn("test", &shell(&script)).unwrap();
            while !ready.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            process.terminate();
            process.end_by(Instant::now() + Duration::from_millis(50)).await;
            let end = process.end().await;
            assert_eq!(end.to_string(), "signal 9 (SIGKILL)");
        });
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        runtime().block_on(async {
            let command = ChildCommand { program: PathBuf::from("/no/such/program"), ..shell("") };
            assert_eq!(Process::spawn("test", &command).unwrap_err().kind(), io::ErrorKind::NotFound);
        });
    }
}
