//! Executes a plan: the downloads, then shards, then the router; watches over all of them; stops them in reverse order.

use std::fs;
use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::{error, info, info_span, warn};

use crate::error::LaunchError;
use crate::plan::{DownloadPlan, LaunchPlan, ShardPlan};
use crate::process::{Ending, Process};
use crate::signals::StopSignals;
use crate::socket;

/// How often the log says that a shard is still loading.
const WAITING_LINE_EVERY: Duration = Duration::from_secs(10);

/// The router ends the requests that are left when its time is up, and says so to their clients; this is its time to
/// say it, before it is killed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A download has nothing to put in order, so it ends at once; this is the time for a machine that is very busy.
const DOWNLOAD_END: Duration = Duration::from_secs(10);

/// Starts what the plan says and returns when a signal has ended it, after everything has stopped.
///
/// Errors when a child cannot be started or ends by itself; then, too, everything has stopped.
pub async fn run(plan: &LaunchPlan, signals: &mut StopSignals) -> Result<(), LaunchError> {
    let mut stack = Stack { plan, shards: Vec::new(), router: None };
    let outcome = stack.serve(signals).await;
    stack.shut_down(signals).await;
    outcome
}

/// The running children.
struct Stack<'a> {
    plan: &'a LaunchPlan,
    shards: Vec<Process>,
    router: Option<Process>,
}

impl Stack<'_> {
    /// From the first child's start until something ends.
    async fn serve(&mut self, signals: &mut StopSignals) -> Result<(), LaunchError> {
        for download in &self.plan.downloads {
            if !fetch(download, signals).await? {
                return Ok(());
            }
        }
        self.start_shards()?;
        tokio::select! {
            biased;
            signal = signals.next() => {
                info!("{signal}: stopping");
                return Ok(());
            }
            (rank, ending) = first_end(&mut self.shards) => {
                shard_span(rank).in_scope(|| error!("Shard {rank} could not start: {ending}"));
                return Err(LaunchError::ShardNotReady { rank, ending });
            }
            () = all_ready(&self.plan.shards) => {}
        }
        self.start_router()?;
        tokio::select! {
            biased;
            signal = signals.next() => {
                info!("{signal}: stopping");
                Ok(())
            }
            // Before the router: it may end because a shard did, which then is what there is to say.
            (rank, ending) = first_end(&mut self.shards) => {
                shard_span(rank).in_scope(|| error!("Shard {rank} crashed: {ending}"));
                Err(LaunchError::ShardFailed { rank, ending })
            }
            (_, ending) = first_end(self.router.as_mut_slice()) => {
                error!("Webserver Crashed: {ending}");
                Err(LaunchError::WebserverFailed(ending))
            }
        }
    }

    fn start_shards(&mut self) -> Result<(), LaunchError> {
        for ShardPlan { rank, socket, command } in &self.plan.shards {
            let rank = *rank;
            socket::clear(socket)?;
            shard_span(rank).in_scope(|| info!("Starting shard"));
            let process = Process::spawn(format!("shard {rank}"), command)
                .map_err(|source| LaunchError::ShardCannotStart { rank, source })?;
            self.shards.push(process);
        }
        Ok(())
    }

    fn start_router(&mut self) -> Result<(), LaunchError> {
        info!("Starting Webserver");
        let process =
            Process::spawn("webserver", &self.plan.router).map_err(LaunchError::WebserverCannotStart)?;
        self.router = Some(process);
        Ok(())
    }

    /// Stops the router, then the shards, and removes the sockets. An impatient signal kills what is left at once.
    async fn shut_down(&mut self, signals: &mut StopSignals) {
        tokio::select! {
            () = self.stop_in_order() => {}
            signal = signals.impatient() => {
                warn!("{signal} while ending: killing what still runs");
                self.kill().await;
            }
        }
        for shard in &self.plan.shards {
            // Most shards remove it themselves.
            let _ = fs::remove_file(&shard.socket);
        }
        if self.plan.shards.len() > 1 {
            let _ = fs::remove_file(&self.plan.group);
        }
    }

    async fn stop_in_order(&mut self) {
        let patience = self.plan.termination_timeout;
        if let Some(router) = &mut self.router {
            router.terminate();
            router.end_by(deadline(patience.saturating_add(LAST_WORDS))).await;
        }
        info!("Shutting down shards");
        for shard in &self.shards {
            shard.terminate();
        }
        let deadline = deadline(patience);
        for shard in &mut self.shards {
            shard.end_by(deadline).await;
        }
    }

    async fn kill(&mut self) {
        for process in self.router.iter_mut().chain(&mut self.shards) {
            process.kill().await;
        }
    }
}

/// Waits until the files of a repository are there; false when a signal has ended that. What has come by then stays in
/// the cache, and the next download goes on from it.
async fn fetch(download: &DownloadPlan, signals: &mut StopSignals) -> Result<bool, LaunchError> {
    let DownloadPlan { id, command } = download;
    info!("Starting check and download process for {id}");
    let mut process = Process::spawn("download", command).map_err(LaunchError::DownloadCannotStart)?;
    let ending = tokio::select! {
        biased;
        signal = signals.next() => {
            info!("{signal}: stopping");
            process.terminate();
            process.end_by(deadline(DOWNLOAD_END)).await;
            return Ok(false);
        }
        (_, ending) = first_end(std::slice::from_mut(&mut process)) => ending,
    };
    if !ending.is_success() {
        return Err(LaunchError::DownloadFailed { id: id.clone(), ending });
    }
    info!("Successfully downloaded weights for {id}");
    Ok(true)
}

/// Now and a while. A while beyond what the clock can count is a year.
fn deadline(patience: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
    Instant::now() + patience.min(YEAR)
}

/// Waits until one of the processes has ended, and says which. Without any it waits forever.
async fn first_end(processes: &mut [Process]) -> (usize, Ending) {
    poll_fn(|context| {
        for (index, process) in processes.iter_mut().enumerate() {
            if let Poll::Ready(ending) = process.poll_end(context) {
                return Poll::Ready((index, ending));
            }
        }
        Poll::Pending
    })
    .await
}

/// Waits until all of the shards are ready; each says so when it is.
async fn all_ready(shards: &[ShardPlan]) {
    let mut waits: Vec<_> = shards.iter().map(|shard| Box::pin(ready(shard))).collect();
    poll_fn(|context| {
        waits.retain_mut(|wait| wait.as_mut().poll(context).is_pending());
        if waits.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

async fn ready(shard: &ShardPlan) {
    let start = Instant::now();
    let mut waiting = interval_at(start + WAITING_LINE_EVERY, WAITING_LINE_EVERY);
    waiting.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut appears = std::pin::pin!(socket::appears(&shard.socket));
    loop {
        tokio::select! {
            () = &mut appears => break,
            _ = waiting.tick() => shard_span(shard.rank).in_scope(|| info!("Waiting for shard to be ready...")),
        }
    }
    shard_span(shard.rank).in_scope(|| info!("Shard ready in {:.3?}", start.elapsed()));
}

fn shard_span(rank: usize) -> tracing::Span {
    info_span!("shard-manager", rank)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::{Path, PathBuf};

    use nix::errno::Errno;
    use nix::sys::signal::kill;
    use nix::unistd::Pid;
    use tempfile::TempDir;

    use super::*;
    use crate::plan::{ChildCommand, testing};

    /// A shell in `directory` that writes its process id into the file `name` and then does as told.
    fn shell(directory: &Path, name: &str, script: &str) -> ChildCommand {
        ChildCommand {
            program: PathBuf::from("/bin/sh"),
            // Renamed, so that who sees the file sees the whole number. The word after the script is its `$0`.
            arguments: vec![
                "-c".into(),
                format!(r#"cd "$0"; echo $$ > {name}.new; mv {name}.new {name}; {script}"#).into(),
                directory.into(),
            ],
            variables: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// Runs a shard and a router that are shell scripts. The shard's socket appears when the shard runs.
    fn run_scripts(shard: &str, router: &str, becomes_ready: bool) -> (String, TempDir) {
        run_shards(&[shard], router, becomes_ready)
    }

    /// Runs shards, which call themselves `shard`, `shard-1` and so on, and a router.
    fn run_shards(shards: &[&str], router: &str, becomes_ready: bool) -> (String, TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let count = format!("--num-shard={}", shards.len());
        let mut plan = testing::plan(&["--graceful-termination-timeout=5", &count]);
        let name = |rank| if rank == 0 { "shard".to_owned() } else { format!("shard-{rank}") };
        for (shard, script) in plan.shards.iter_mut().zip(shards) {
            shard.socket = directory.path().join(format!("socket-{}", shard.rank));
            shard.command = shell(directory.path(), &name(shard.rank), script);
        }
        plan.group = directory.path().join("socket-group");
        plan.router = shell(directory.path(), "router", router);

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let outcome = runtime.block_on(async {
            let mut signals = StopSignals::listen().unwrap();
            let listen = async {
                let mut listeners = Vec::new();
                for shard in &plan.shards {
                    while !becomes_ready || !directory.path().join(name(shard.rank)).exists() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    listeners.push(UnixListener::bind(&shard.socket).unwrap());
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                outcome = run(&plan, &mut signals) => outcome,
                () = listen => unreachable!("it listens forever"),
            }
        });
        (outcome.expect_err("no signal came").to_string(), directory)
    }

    fn has_ended(directory: &TempDir, name: &str) -> bool {
        let pid = fs::read_to_string(directory.path().join(name)).unwrap().trim().parse().unwrap();
        kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)
    }

    const FOREVER: &str = "exec sleep 600";

    #[test]
    fn a_shard_that_ends_while_loading_cannot_start_and_there_is_no_router() {
        let (error, directory) = run_scripts("exit 3", FOREVER, false);
        assert_eq!(error, "ShardCannotStart: shard 0 ended with exit code 3 before it was ready");
        assert!(!directory.path().join("router").exists());
    }

    #[test]
    fn a_router_that_ends_takes_the_shards_with_it() {
        let (error, directory) = run_scripts(FOREVER, "exit 0", true);
        assert_eq!(error, "WebserverFailed: the webserver ended with exit code 0");
        assert!(has_ended(&directory, "shard"));
        assert!(!directory.path().join("socket-0").exists());
    }

    #[test]
    fn a_shard_that_dies_while_serving_takes_the_router_with_it() {
        // The shard dies as soon as the router runs.
        let shard = "while ! [ -e router ]; do sleep 0.01; done; kill -9 $$";
        let (error, directory) = run_scripts(shard, FOREVER, true);
        assert_eq!(error, "ShardFailed: shard 0 ended with signal 9 (SIGKILL)");
        assert!(has_ended(&directory, "router"));
    }

    #[test]
    fn of_several_shards_the_one_that_dies_takes_all_with_it() {
        let dies = "echo > socket-group; while ! [ -e router ]; do sleep 0.01; done; kill -9 $$";
        let (error, directory) = run_shards(&[FOREVER, dies, FOREVER], FOREVER, true);
        assert_eq!(error, "ShardFailed: shard 1 ended with signal 9 (SIGKILL)");
        for name in ["shard", "shard-2", "router"] {
            assert!(has_ended(&directory, name), "{name}");
        }
        for file in ["socket-0", "socket-1", "socket-2", "socket-group"] {
            assert!(!directory.path().join(file).exists(), "{file}");
        }
    }

    #[test]
    fn the_router_waits_for_every_shard() {
        // The last one ends before any is ready, but not before the others run.
        let last = "while ! [ -e shard ] || ! [ -e shard-1 ]; do sleep 0.01; done; exit 4";
        let (error, directory) = run_shards(&[FOREVER, FOREVER, last], FOREVER, false);
        assert_eq!(error, "ShardCannotStart: shard 2 ended with exit code 4 before it was ready");
        assert!(!directory.path().join("router").exists());
        assert!(has_ended(&directory, "shard") && has_ended(&directory, "shard-1"));
    }
}
