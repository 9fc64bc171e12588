//! The launcher, as the router that it supervises sees it: reports go there, and the order to give up comes from there.

use std::future::pending;
use std::io;
use std::path::PathBuf;

use proto::supervision::{Lines, Order, Reason, Report};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

/// Reports on their way. There are a few per restart, and the launcher reads at once.
const REPORTS_WAITING: usize = 64;

/// Handle to the launcher, or to nobody where none supervises this router. Cheap to clone. No call here waits for the
/// launcher, and none fails.
#[derive(Clone, Debug)]
pub struct Supervisor {
    launcher: Option<Launcher>,
}

#[derive(Clone, Debug)]
struct Launcher {
    reports: mpsc::Sender<Report>,
    abandoned: watch::Receiver<Option<Reason>>,
}

impl Supervisor {
    /// Nobody supervises this router.
    pub fn none() -> Self {
        Self { launcher: None }
    }

    /// Whether somebody does.
    pub fn is_there(&self) -> bool {
        self.launcher.is_some()
    }

    /// Connects to the launcher that listens at `path`; without a path nobody supervises this router. Must be called inside
    /// a tokio runtime.
    ///
    /// Errors when nobody listens there; the error names the path.
    pub async fn connect(path: Option<PathBuf>) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self::none()) };
        let stream = UnixStream::connect(&path).await.map_err(|error| {
            io::Error::new(error.kind(), format!("the launcher's socket {}: {error}", path.display()))
        })?;
        let (read, write) = stream.into_split();
        let (reports, waiting) = mpsc::channel(REPORTS_WAITING);
        let (orders, abandoned) = watch::channel(None);
        tokio::spawn(send(write, waiting));
        tokio::spawn(listen(read, orders));
        Ok(Self { launcher: Some(Launcher { reports, abandoned }) })
    }

    /// HTTP is served, and the shards are warm. From now on this router, too, is started again when it ends unasked.
    pub fn ready(&self) {
        self.report(Report::Ready);
    }

    /// A step has been made, the first one since this router or its shards were started: it was worth starting them.
    pub fn progress(&self) {
        self.report(Report::Progress);
    }

    /// The shard with this process id hangs or has failed inside, one of them if none is known, and they all have to be
    /// started again. Of no consequence when they have been by now.
    pub fn restart(&self, pid: Option<u32>, reason: &str) {
        self.report(Report::Restart { pid, reason: Reason::new(reason) });
    }

    /// Waits until the launcher says that the shards will not come back, and returns its reason. Waits for ever when nobody
    /// supervises this router, or when the launcher is gone: its end is this process's end.
    pub async fn abandoned(&self) -> String {
        let Some(launcher) = &self.launcher else { return pending().await };
        let mut abandoned = launcher.abandoned.clone();
        let reason = abandoned.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason.as_str().to_owned(),
            None => pending().await,
        }
    }

    fn report(&self, report: Report) {
        let Some(launcher) = &self.launcher else { return };
        if let Err(error) = launcher.reports.try_send(report) {
            tracing::warn!("not reported to the launcher: {error}");
        }
    }
}

/// Ends when the launcher does, or once every handle is dropped and every report sent.
async fn send(mut launcher: OwnedWriteHalf, mut reports: mpsc::Receiver<Report>) {
    while let Some(report) = reports.recv().await {
        if let Err(error) = launcher.write_all(format!("{report}\n").as_bytes()).await {
            tracing::warn!("cannot report to the launcher: {error}");
            return;
        }
    }
}

/// Ends when the launcher does, or once every handle is dropped.
async fn listen(mut launcher: OwnedReadHalf, abandoned: watch::Sender<Option<Reason>>) {
    let mut lines = Lines::default();
    let mut bytes = [0; 1024];
    loop {
        let read = tokio::select! {
            read = launcher.read(&mut bytes) => read,
            () = abandoned.closed() => return,
        };
        let count = match read {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) => {
                tracing::warn!("cannot hear the launcher: {error}");
                return;
            }
        };
        for order in lines.feed(&bytes[..count]) {
            match order {
                Ok(Order::Abandon { reason }) => {
                    abandoned.send_replace(Some(reason));
                }
                Err(error) => tracing::warn!("from the launcher: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures::poll;
    use tempfile::TempDir;
    use tokio::net::UnixListener;

    use super::*;

    /// A supervisor, and the launcher's end of its connection.
    async fn supervised() -> (Supervisor, UnixStream, TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let supervisor = Supervisor::connect(Some(path)).await.unwrap();
        let (launcher, _) = listener.accept().await.unwrap();
        (supervisor, launcher, directory)
    }

    /// Whether the wait for an order goes on, once all that can happen has happened.
    async fn waits(supervisor: &Supervisor) -> bool {
        let mut abandoned = Box::pin(supervisor.abandoned());
        for _ in 0..100 {
            if poll!(&mut abandoned) != Poll::Pending {
                return false;
            }
            tokio::task::yield_now().await;
        }
        true
    }

    #[tokio::test]
    async fn reports_arrive_in_order_and_the_last_ones_after_the_last_handle() {
        let (supervisor, mut launcher, _directory) = supervised().await;
        supervisor.ready();
        supervisor.restart(Some(12), "no answer\nwithin 60 s");
        supervisor.clone().restart(None, "");
        supervisor.progress();
        drop(supervisor);
        let mut text = String::new();
        launcher.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "ready\nrestart 12 no answer within 60 s\nrestart 0 no reason given\nprogress\n");
    }

    #[tokio::test]
    async fn every_handle_hears_the_order_to_give_up_however_late_it_asks() {
        let (supervisor, mut launcher, _directory) = supervised().await;
        assert!(waits(&supervisor).await);
        launcher.write_all(b"make tea\nabandon shard 0 ended with ").await.unwrap();
        launcher.write_all(b"signal 9 (SIGKILL)\n").await.unwrap();
        let reason = "shard 0 ended with signal 9 (SIGKILL)";
        assert_eq!(supervisor.abandoned().await, reason);
        assert_eq!(supervisor.clone().abandoned().await, reason);
    }

    #[tokio::test]
    async fn a_launcher_that_is_gone_gives_no_orders_and_is_no_reason_to_fail() {
        let (supervisor, launcher, _directory) = supervised().await;
        drop(launcher);
        assert!(waits(&supervisor).await);
        for _ in 0..2 * REPORTS_WAITING {
            supervisor.progress();
        }
    }

    #[tokio::test]
    async fn a_launcher_that_does_not_read_is_not_waited_for() {
        let (supervisor, _launcher, _directory) = supervised().await;
        for _ in 0..2 * REPORTS_WAITING {
            supervisor.restart(None, &"x".repeat(10_000));
        }
    }

    #[tokio::test]
    async fn without_a_launcher_nothing_happens() {
        let supervisor = Supervisor::connect(None).await.unwrap();
        supervisor.ready();
        supervisor.progress();
        supervisor.restart(Some(1), "it hangs");
        assert!(waits(&supervisor).await);
    }

    #[tokio::test]
    async fn a_launcher_that_does_not_listen_is_named() {
        let error = Supervisor::connect(Some("/no/such/control".into())).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/no/such/control"), "{error}");
    }
}
