//! The router as a program of its own; the launcher offers the same as a subcommand.

use std::process::ExitCode;

fn main() -> ExitCode {
    router::run_from(std::env::args_os())
}
