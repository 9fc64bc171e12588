//! The shard as a process: what its launcher sees of it.

// Clippy's exception for tests covers `#[test]` functions, but not what they call.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_text-generation-shard");

fn checkpoint() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "integration-tests", "fixtures", "llama"].iter().collect()
}

fn serve(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).arg("serve").args(arguments).output().unwrap()
}

/// Starts a shard and waits until it says that it is ready. Its output is to be held on to.
fn start(uds_path: &str) -> (Child, impl Iterator<Item = String>) {
    let mut child = Command::new(PROGRAM)
        .arg("serve")
        .arg(checkpoint())
        .args(["--uds-path", uds_path, "--threads", "1", "--json-output"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let ready = lines.any(|line| line.contains("shard is ready"));
    assert!(ready, "{:?}", child.wait());
    (child, lines)
}

fn check_signal(signal: &str) {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("shard");
    let socket = dir.path().join("shard-0");
    let (mut child, output) = start(prefix.to_str().unwrap());
    UnixStream::connect(&socket).unwrap();
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!socket.exists());
    assert!(output.last().unwrap().contains("stopping"));
}

#[test]
fn a_signal_ends_the_shard_cleanly_and_its_socket_goes() {
    check_signal("-TERM");
    check_signal("-INT");
}

#[test]
fn what_cannot_be_served_is_one_line_and_exit_code_one() {
    let checkpoint = checkpoint();
    let checkpoint = checkpoint.to_str().unwrap();
    let empty = tempfile::tempdir().unwrap();
    for (arguments, expected) in [
        (&["/no/such/model"][..], "Error: shard 0: model directory `/no/such/model` does not exist\n"),
        (
            &[checkpoint, "--quantize", "awq"],
            "Error: shard 0: --quantize awq is not supported by this version\n",
        ),
        (&[empty.path().to_str().unwrap()], "config.json: No such file or directory (os error 2)\n"),
        (&[checkpoint, "--uds-path", "/no/such/place/shard"], "/no/such/place/shard-0: No such file"),
    ] {
        let output = serve(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected) && text.lines().count() == 1, "{text}");
    }
}
