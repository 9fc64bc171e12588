//! The socket on which the router reports: see `proto::supervision` for the words.

use std::future::pending;
use std::io;
use std::path::Path;
use std::time::Duration;

use proto::supervision::{Lines, Order, Reason, Report};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::warn;

/// Reports that wait to be looked at. Who sends more waits; the supervision does not.
const REPORTS_WAITING: usize = 64;

/// Before the next try when the system has not let somebody in.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The launcher's end of the connections. Each router that is started makes one; all of them are heard, and hear.
#[derive(Debug)]
pub(super) struct Control {
    reports: mpsc::Receiver<Report>,
    orders: watch::Sender<Option<Order>>,
    listening: JoinHandle<()>,
}

impl Control {
    /// Listens at `path`. Must be called inside of the runtime.
    ///
    /// Errors when the system refuses.
    pub(super) fn listen(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let (sender, reports) = mpsc::channel(REPORTS_WAITING);
        let (orders, heard) = watch::channel(None);
        Ok(Self { reports, orders, listening: tokio::spawn(accept(listener, sender, heard)) })
    }

    /// Waits for the next report. Nothing is lost when the wait is given up.
    pub(super) async fn report(&mut self) -> Report {
        match self.reports.recv().await {
            Some(report) => report,
            None => pending().await,
        }
    }

    /// Tells every router that is connected, or will be, that the shards will not come back; whether there is one by now.
    pub(super) fn abandon(&self, reason: &str) -> bool {
        self.orders.send_replace(Some(Order::Abandon { reason: Reason::new(reason) }));
        // The one that accepts has an end too.
        self.orders.receiver_count() > 1
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn accept(
    listener: UnixListener,
    reports: mpsc::Sender<Report>,
    orders: watch::Receiver<Option<Order>>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, reports.clone(), orders.clone()));
                }
                Err(error) => {
                    warn!("A webserver cannot connect to the launcher: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Ends when the router closes its end. Hearing and speaking do not wait for each other.
async fn serve(
    mut stream: UnixStream,
    reports: mpsc::Sender<Report>,
    orders: watch::Receiver<Option<Order>>,
) {
    let (read, write) = stream.split();
    tokio::select! {
        () = hear(read, reports) => {}
        () = speak(write, orders) => {}
    }
}

async fn hear(mut router: ReadHalf<'_>, reports: mpsc::Sender<Report>) {
    let mut lines = Lines::default();
    let mut bytes = [0; 1024];
    // An error is an end as well: the router is gone, and its process tells why.
    while let Ok(count @ 1..) = router.read(&mut bytes).await {
        for report in lines.feed(&bytes[..count]) {
            match report {
                Ok(report) => {
                    if reports.send(report).await.is_err() {
                        return;
                    }
                }
                Err(error) => warn!("From the webserver: {error}"),
            }
        }
    }
}

async fn speak(mut router: WriteHalf<'_>, mut orders: watch::Receiver<Option<Order>>) {
    loop {
        let order = orders.borrow_and_update().as_ref().map(|order| format!("{order}\n"));
        if let Some(order) = order
            && router.write_all(order.as_bytes()).await.is_err()
        {
            return;
        }
        if orders.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::io::{AsyncBufReadExt as _, BufReader};

    use super::*;

    fn listen() -> (Control, TempDir) {
        let directory = tempfile::tempdir().unwrap();
        (Control::listen(&directory.path().join("control")).unwrap(), directory)
    }

    async fn connect(directory: &TempDir) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(directory.path().join("control")).await.unwrap())
    }

    async fn line(router: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        router.read_line(&mut line).await.unwrap();
        line
    }

    #[tokio::test]
    async fn every_connection_is_heard_and_what_is_no_report_is_skipped() {
        let (mut control, directory) = listen();
        let (mut old, mut new) = (connect(&directory).await, connect(&directory).await);
        old.write_all(b"ready\n\xff\nhello\n").await.unwrap();
        assert_eq!(control.report().await, Report::Ready);
        old.write_all(b"prog").await.unwrap();
        drop(old);
        new.write_all(b"restart 12 it hangs\n").await.unwrap();
        let restart = Report::Restart { pid: Some(12), reason: Reason::new("it hangs") };
        assert_eq!(control.report().await, restart);
    }

    #[tokio::test]
    async fn every_router_hears_the_order_to_give_up_the_late_one_too() {
        let (mut control, directory) = listen();
        assert!(!control.abandon("one"));
        let mut early = connect(&directory).await;
        assert_eq!(line(&mut early).await, "abandon one\n");
        assert!(control.abandon("two"));
        let mut late = connect(&directory).await;
        for router in [&mut early, &mut late] {
            assert_eq!(line(router).await, "abandon two\n");
        }
        late.write_all(b"progress\n").await.unwrap();
        assert_eq!(control.report().await, Report::Progress);
    }

    #[tokio::test]
    async fn a_router_that_talks_without_end_still_hears_and_others_are_let_in() {
        let (control, directory) = listen();
        let mut talker = connect(&directory).await;
        // Far more than anybody looks at.
        let _ = tokio::time::timeout(Duration::from_millis(50), async {
            loop {
                talker.write_all(b"progress\n").await.unwrap();
            }
        })
        .await;
        let mut other = connect(&directory).await;
        control.abandon("enough");
        assert_eq!(line(&mut talker).await, "abandon enough\n");
        assert_eq!(line(&mut other).await, "abandon enough\n");
    }
}
