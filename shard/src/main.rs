//! The shard as a program of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    shard::run_from(std::env::args_os())
}
