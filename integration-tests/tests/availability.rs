//! Probes and the end: what a load balancer sees of a server that starts, is overloaded, and stops.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use http::StatusCode;
use integration_tests::client::{Answer, Client};
use integration_tests::stack::{Stack, endless, free_address};
use integration_tests::{binary, fixtures};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

const CHAT: &str = "/v1/chat/completions";

/// More than the time that a server needs to notice a signal.
const PATIENCE: Duration = Duration::from_secs(60);

fn question() -> Value {
    json!({"inputs": "What is the capital of France?", "parameters": {"max_new_tokens": 5}})
}

/// Asks for the health until it is `status`; it may be 200 before.
async fn health_becomes(client: Client, status: &str) -> Result<()> {
    let begin = Instant::now();
    loop {
        let answer = client.get("/health").await?;
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            ensure!(answer.json()?["status"] == status, "{}", answer.body);
            return Ok(());
        }
        ensure!(begin.elapsed() < PATIENCE, "/health stays {}", answer.status);
    }
}

fn refused(answer: &Answer) -> Result<()> {
    ensure!(answer.status == StatusCode::SERVICE_UNAVAILABLE, "{}: {}", answer.status, answer.body);
    ensure!(answer.headers.get("retry-after").is_some_and(|value| value == "1"), "{:?}", answer.headers);
    ensure!(answer.json()?["error_type"] == "unavailable", "{}", answer.body);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_finishes_what_runs_and_refuses_what_comes() -> Result<()> {
    let mut stack = Stack::demo().await?;
    let client = stack.client();
    let tokens = 2000;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = client.stream(CHAT, &endless(tokens)).await?;
        stream.next().await?.context("a first token")?;
        streams.push(stream);
    }
    stack.signal(Signal::SIGTERM)?;
    health_becomes(client, "draining").await?;
    for (path, body) in [
        ("/generate", question()),
        ("/generate_stream", question()),
        (CHAT, endless(5)),
        ("/tokenize", question()),
    ] {
        refused(&client.post(path, &body).await?).context(path)?;
    }
    for mut stream in streams {
        let mut events = vec!["the first".to_owned()];
        while let Some(event) = stream.next().await? {
            events.push(event);
        }
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        assert_eq!(events.len(), tokens as usize);
        let last: Value = serde_json::from_str(events.last().context("a last event")?)?;
        assert_eq!(last["choices"][0]["finish_reason"], "length", "{last}");
    }
    assert_eq!(stack.ended().await?.code(), Some(0), "{}", stack.log()?);
    Ok(())
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_told_so() -> Result<()> {
    let mut stack = Stack::start(&["--graceful-termination-timeout", "0"]).await?;
    let mut stream = stack.client().stream(CHAT, &endless(2000)).await?;
    stream.next().await?.context("a first token")?;
    stack.signal(Signal::SIGTERM)?;
    let mut events = Vec::new();
    while let Some(event) = stream.next().await? {
        events.push(event);
    }
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let last: Value = serde_json::from_str(&events.pop().context("a last event")?)?;
    assert_eq!(last["error"]["http_status_code"], 503, "{last}");
    assert_eq!(stack.ended().await?.code(), Some(0), "{}", stack.log()?);
    Ok(())
}

/// A router whose shards never come.
struct Router {
    process: Child,
    client: Client,
    // Removed at the end.
    _folder: tempfile::TempDir,
}

impl Router {
    fn start() -> Result<Self> {
        let (address, folder) = (free_address()?, tempfile::tempdir()?);
        let mut command = command(&address.port().to_string(), folder.path());
        let process = command.spawn()?;
        Ok(Self { process, client: Client::new(address), _folder: folder })
    }
}

fn command(port: &str, folder: &Path) -> Command {
    let mut command = Command::new(binary::launcher());
    command.args(["router", "--hostname", "127.0.0.1", "--port", port, "--prometheus-port", "0"]);
    command.arg("--tokenizer-name").arg(fixtures::directory("llama"));
    command.arg("--master-shard-uds-path").arg(folder.join("shard-0"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

#[tokio::test]
async fn a_router_that_starts_says_so_on_every_route() -> Result<()> {
    let mut router = Router::start()?;
    let begin = Instant::now();
    let health = loop {
        if let Ok(answer) = router.client.get("/health").await {
            break answer;
        }
        ensure!(begin.elapsed() < PATIENCE, "the port is not opened");
    };
    assert_eq!(health.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(health.json()?["status"], "starting", "{}", health.body);
    refused(&router.client.post("/generate", &question()).await?)?;
    refused(&router.client.post("/nope", &json!("x".repeat(3_000_000))).await?)?;
    refused(&router.client.get("/metrics").await?)?;
    let pid = router.process.id().context("it runs")?;
    kill(Pid::from_raw(pid.try_into()?), Signal::SIGTERM)?;
    let status = tokio::time::timeout(PATIENCE, router.process.wait()).await??;
    assert_eq!(status.code(), Some(0));
    Ok(())
}

#[tokio::test]
async fn a_port_in_use_is_named_before_the_shards_are_waited_for() -> Result<()> {
    let (taken, folder) = (std::net::TcpListener::bind("127.0.0.1:0")?, tempfile::tempdir()?);
    let port = taken.local_addr()?.port().to_string();
    let output = command(&port, folder.path()).output();
    // The shards would be waited for much longer.
    let output = tokio::time::timeout(Duration::from_secs(30), output).await??;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{text}");
    Ok(())
}

/// Asks for an endless stream, and again when it is refused, after the time that the server says.
async fn insist(client: Client, until: Instant) -> Result<u32> {
    let mut refusals = 0;
    while Instant::now() < until {
        let mut stream = client.stream(CHAT, &endless(2000)).await?;
        if stream.status == StatusCode::TOO_MANY_REQUESTS {
            refusals += 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        ensure!(stream.status == StatusCode::OK, "{}", stream.status);
        while Instant::now() < until && stream.next().await?.is_some() {}
    }
    Ok(refusals)
}

/// Times of health checks, as another program would measure them that does nothing else: on a thread of their own.
fn probe_alone(client: Client, until: Instant) -> Result<Vec<Duration>> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(probe(client, until))
}

/// Times of health checks, each on a connection of its own.
async fn probe(client: Client, until: Instant) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    while Instant::now() < until {
        let begin = Instant::now();
        let answer = client.get("/health").await?;
        times.push(begin.elapsed());
        ensure!(answer.status == StatusCode::OK, "{}: {}", answer.status, answer.body);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    times.sort();
    Ok(times)
}

#[tokio::test(flavor = "multi_thread")]
async fn health_answers_at_ten_times_the_load_that_is_served() -> Result<()> {
    let stack = Stack::start(&["--max-concurrent-requests", "128"]).await?;
    let until = Instant::now() + Duration::from_secs(5);
    let clients = join_all((0..1280).map(|_| insist(stack.client(), until)));
    let client = stack.client();
    let (clients, times) =
        tokio::join!(clients, tokio::task::spawn_blocking(move || probe_alone(client, until)));
    let (times, refusals) = (times??, clients.into_iter().sum::<Result<u32>>()?);
    assert!(refusals > 1000, "only {refusals} requests were refused");
    let quantile = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let (median, most, longest) = (quantile(0.5), quantile(0.99), quantile(1.0));
    println!("{} checks: p50 {median:?}, p99 {most:?}, max {longest:?}; {refusals} refusals", times.len());
    assert!(longest < Duration::from_secs(1), "a health check took {longest:?}");
    Ok(())
}
