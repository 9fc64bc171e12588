//! A running server: the real launcher, its shard and its router.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::binary;
use crate::client::Client;

/// How long a start or a stop may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Variables that a launcher gets from the tests. The last ones choose what all tests run on.
const KEPT: [&str; 6] =
    ["PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "DEVICE", "DTYPE", "BATCH_INVARIANT"];

/// How often readiness is asked for. Short, because the time to ready is itself of interest.
const POLL: Duration = Duration::from_millis(5);

/// A running server. Dropping it kills the launcher, and with it everything it started.
#[derive(Debug)]
pub struct Stack {
    launcher: Child,
    log: PathBuf,
    directory: tempfile::TempDir,
    address: SocketAddr,
    /// From the start of the process to the first 200 of `/health`.
    pub ready_in: Duration,
}

impl Stack {
    /// Starts the embedded demo model and waits until it is ready.
    pub async fn demo() -> Result<Self> {
        Self::start(&[]).await
    }

    /// Starts a launcher with these arguments and waits until it is ready.
    pub async fn start(arguments: &[&str]) -> Result<Self> {
        Self::start_with(arguments, &[]).await
    }

    /// [`Stack::start`], with these variables in its environment.
    pub async fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Self> {
        Self::launch(None, arguments, variables).await
    }

    /// [`Stack::start`], with another launcher, if one is given.
    pub async fn start_as(launcher: Option<&str>, arguments: &[&str]) -> Result<Self> {
        Self::launch(launcher, arguments, &[]).await
    }

    async fn launch(launcher: Option<&str>, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let log = directory.path().join("log");
        let address = free_address()?;
        let mut command = match launcher {
            Some(launcher) => command_of(Path::new(launcher), address),
            None => command(address),
        };
        command.args(arguments).env("TMPDIR", directory.path()).envs(variables.iter().copied());
        let output = std::fs::File::create(&log)?;
        command.stdout(output.try_clone()?).stderr(output);
        let begin = Instant::now();
        let launcher = command.spawn()?;
        let mut stack = Self { launcher, log, directory, address, ready_in: Duration::ZERO };
        stack.wait_until_ready(begin).await?;
        Ok(stack)
    }

    async fn wait_until_ready(&mut self, begin: Instant) -> Result<()> {
        loop {
            if let Ok(answer) = self.client().get("/health").await {
                if answer.status.is_success() {
                    self.ready_in = begin.elapsed();
                    return Ok(());
                }
                ensure!(answer.json()?["status"] == "starting", "/health says {}", answer.body);
            }
            if let Some(status) = self.launcher.try_wait()? {
                bail!("the launcher ended with {status}:\n{}", self.log()?);
            }
            ensure!(begin.elapsed() < PATIENCE, "not ready in time:\n{}", self.log()?);
            tokio::time::sleep(POLL).await;
        }
    }

    /// A client of this server.
    pub fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The directory that this server takes for its temporary files.
    pub fn temporary_directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// What it has logged so far.
    pub fn log(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).context("the log of the launcher")
    }

    /// The processes it consists of, launcher first.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let launcher = Pid::from_raw(self.launcher.id().context("the launcher has ended")?.try_into()?);
        let mut all = vec![launcher];
        all.extend(children(launcher)?);
        Ok(all)
    }

    /// The processes of the shards that run now, in the order in which they were started.
    pub fn shards(&self) -> Result<Vec<Pid>> {
        let is_shard = |pid: &Pid| {
            let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.split('\0').any(|word| word == "shard")
        };
        Ok(self.processes()?.into_iter().skip(1).filter(is_shard).collect())
    }

    /// Sends a signal to the launcher.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.processes()?[0], signal)?)
    }

    /// Waits until the launcher has ended by itself.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let status = tokio::time::timeout(PATIENCE, self.launcher.wait()).await;
        Ok(status
            .with_context(|| format!("the launcher does not end:\n{}", self.log().unwrap_or_default()))??)
    }

    /// One series of `/metrics`, such as `tgi_queue_size`; labels as they are printed.
    pub async fn metric(&self, series: &str) -> Result<f64> {
        let text = self.client().get("/metrics").await?.body;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no series {series} in:\n{text}"))?.parse()?)
    }

    /// Waits until nothing waits, nothing runs and every cache block is free.
    pub async fn idle(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            let mut busy = 0.0;
            for series in ["tgi_queue_size", "tgi_batch_current_size", "tgi_kv_cache_utilization"] {
                busy += self.metric(series).await?;
            }
            if busy == 0.0 {
                return Ok(());
            }
            ensure!(begin.elapsed() < PATIENCE, "not idle:\n{}", self.client().get("/metrics").await?.body);
            tokio::time::sleep(POLL).await;
        }
    }

    /// `/generate`, greedy, with these many new tokens, and what came out with its details.
    pub async fn greedy(&self, inputs: &str, max_new_tokens: u32) -> Result<Value> {
        let parameters = serde_json::json!({"max_new_tokens": max_new_tokens, "details": true});
        let body = serde_json::json!({"inputs": inputs, "parameters": parameters});
        self.client().generate("/generate", &body).await
    }
}

/// A streamed chat with the demo model that ends only at its limit: its two end-of-sequence tokens are ruled out. For
/// `/v1/chat/completions`.
pub fn endless(max_tokens: u32) -> Value {
    serde_json::json!({
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": max_tokens, "temperature": 0, "logit_bias": {"0": -100, "2": -100}, "stream": true,
    })
}

/// A launcher command that listens on `address` and takes nothing from the environment of the tests.
pub fn command(address: SocketAddr) -> Command {
    command_of(binary::launcher(), address)
}

fn command_of(launcher: &Path, address: SocketAddr) -> Command {
    let mut command = Command::new(launcher);
    command.env_clear();
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.args(["--hostname", &address.ip().to_string(), "--port", &address.port().to_string()]);
    command.args(["--prometheus-port", "0"]);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs a launcher that is expected to end by itself, and returns its status and all it printed.
pub async fn run(arguments: &[&str]) -> Result<(ExitStatus, String)> {
    run_at(free_address()?, arguments).await
}

/// [`run`], told to listen on `address`.
pub async fn run_at(address: SocketAddr, arguments: &[&str]) -> Result<(ExitStatus, String)> {
    let mut command = command(address);
    command.args(arguments);
    let output =
        tokio::time::timeout(PATIENCE, command.output()).await.context("the launcher does not end")??;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status, String::from_utf8(text)?))
}

/// A loopback address that was free a moment ago.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// The direct children of a process.
pub fn children(parent: Pid) -> Result<Vec<Pid>> {
    let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    text.split_whitespace().map(|pid| Ok(Pid::from_raw(pid.parse()?))).collect()
}

/// Waits until none of these processes exists.
pub async fn gone(processes: &[Pid]) -> Result<()> {
    let begin = Instant::now();
    while processes.iter().any(|pid| alive(*pid)) {
        ensure!(begin.elapsed() < PATIENCE, "{processes:?} are still there");
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Whether a process exists and is not merely waiting for its parent to take note of its end.
fn alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    !matches!(state, None | Some(b'Z'))
}
