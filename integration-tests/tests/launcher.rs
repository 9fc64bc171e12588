//! The launcher: starting, refusing to start, ending.

use std::net::TcpListener;

use anyhow::{Context, Result};
use integration_tests::fixtures;
use integration_tests::stack::{Stack, gone, run, run_at};
use nix::sys::signal::Signal;
use serde_json::json;

#[tokio::test]
async fn term_and_int_end_everything_cleanly() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut stack = Stack::demo().await?;
        let processes = stack.processes()?;
        assert_eq!(processes.len(), 3, "launcher, shard, router");
        stack.signal(signal)?;
        assert!(stack.ended().await?.success(), "{signal}: {}", stack.log()?);
        gone(&processes).await?;
        let left: Vec<_> = std::fs::read_dir(stack.temporary_directory())?.collect::<Result<_, _>>()?;
        assert_eq!(left.len(), 1, "only the log is left, not {left:?}");
    }
    Ok(())
}

#[tokio::test]
async fn running_requests_finish_before_the_end() -> Result<()> {
    let mut stack = Stack::demo().await?;
    let body =
        json!({"inputs": "Explain gradient descent in simple terms.", "parameters": {"max_new_tokens": 200}});
    let mut stream = stack.client().stream("/generate_stream", &body).await?;
    let mut last = stream.next().await?.context("a first token")?;
    stack.signal(Signal::SIGTERM)?;
    while let Some(event) = stream.next().await? {
        last = event;
    }
    assert!(last.contains("\"generated_text\":\""), "the stream was cut off after {last}");
    assert!(stack.ended().await?.success());
    Ok(())
}

#[tokio::test]
async fn nothing_outlives_a_killed_launcher() -> Result<()> {
    let stack = Stack::demo().await?;
    let processes = stack.processes()?;
    stack.signal(Signal::SIGKILL)?;
    gone(&processes[1..]).await
}

#[tokio::test]
async fn a_dead_shard_ends_the_launcher_with_an_error_if_it_is_told_so() -> Result<()> {
    let mut stack = Stack::start(&["--on-shard-failure", "exit"]).await?;
    let processes = stack.processes()?;
    nix::sys::signal::kill(processes[1], Signal::SIGKILL)?;
    assert_eq!(stack.ended().await?.code(), Some(1), "{}", stack.log()?);
    assert!(stack.log()?.contains("ShardFailed"), "{}", stack.log()?);
    gone(&processes).await
}

#[tokio::test]
async fn logs_are_json_when_asked_for() -> Result<()> {
    let stack = Stack::start(&["--json-output"]).await?;
    stack.greedy("What is the capital of France?", 10).await?;
    let log = stack.log()?;
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect::<Result<_>>()?;
    for message in ["Shard ready in", "Connected", "Success"] {
        let found =
            lines.iter().any(|line| line["message"].as_str().is_some_and(|text| text.starts_with(message)));
        assert!(found, "no line {message} in:\n{log}");
    }
    Ok(())
}

#[tokio::test]
async fn a_plan_names_every_derived_value_and_starts_nothing() -> Result<()> {
    let (status, text) = run(&["--plan"]).await?;
    assert!(status.success(), "{text}");
    for value in ["demo", "max-total-tokens", "max-batch-prefill-tokens", "threads", "block size"] {
        assert!(text.contains(value), "no {value} in:\n{text}");
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_start_ends_with_one_line_that_names_it() -> Result<()> {
    let empty = tempfile::tempdir()?;
    let broken = tempfile::tempdir()?;
    for entry in std::fs::read_dir(fixtures::directory("llama"))? {
        let entry = entry?;
        if entry.path().is_file() {
            std::fs::copy(entry.path(), broken.path().join(entry.file_name()))?;
        }
    }
    std::fs::write(broken.path().join("model.safetensors"), b"not a checkpoint")?;
    let empty = empty.path().to_str().context("a path in UTF-8")?;
    let broken = broken.path().to_str().context("a path in UTF-8")?;
    let cases: [(&[&str], &str, i32); 6] = [
        (&["--no-such-flag"], "--no-such-flag", 2),
        (&["--max-concurrent-requests", "many"], "many", 2),
        (&["--model-id", "/no/such/directory"], "/no/such/directory", 1),
        (&["--model-id", empty], empty, 1),
        (&["--model-id", broken], "model.safetensors", 1),
        (&["--quantize", "awq"], "quantize", 1),
    ];
    for (arguments, named, code) in cases {
        let (status, text) = run(arguments).await?;
        assert_eq!(status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(named), "{arguments:?} does not name {named}: {text}");
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    }
    Ok(())
}

#[tokio::test]
async fn a_port_in_use_is_named_before_anything_starts() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?;
    let (status, text) = run_at(address, &[]).await?;
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains(&address.port().to_string()), "{text}");
    assert!(!text.contains("Starting shard"), "{text}");
    Ok(())
}

#[tokio::test]
async fn the_readme_names_every_flag() -> Result<()> {
    let (_, help) = run(&["--help"]).await?;
    let readme = include_str!("../../README.md");
    let flags: Vec<&str> =
        help.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 2).collect();
    assert!(flags.len() > 40, "{help}");
    for flag in flags {
        let flag = flag.trim_matches(|letter: char| !letter.is_ascii_alphanumeric());
        assert!(readme.contains(&format!("--{flag}")), "the README does not name --{flag}");
    }
    Ok(())
}
