//! `text-generation-launcher`: the launcher, and the processes that it starts.

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use launcher::tether;

/// The programs of this one file. A child is started with `--child-of <PID>` in front of its name.
fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if let Err(error) = tether::tie_to_launcher(&mut arguments) {
        eprintln!("Error: {error}");
        return ExitCode::FAILURE;
    }
    match arguments.get(1).and_then(|name| name.to_str()) {
        Some("router") => router::run_from(renamed(&arguments[1..])),
        Some("shard") => shard::run_from(renamed(&arguments[1..])),
        Some("doctor") => shard::doctor::run_from(renamed(&arguments[1..])),
        Some("download-weights") => launcher::download::run_from(renamed(&arguments[1..])),
        _ => launcher::run_from(arguments),
    }
}

/// The arguments of a subcommand, which calls itself in its help what the user has to type.
fn renamed(arguments: &[OsString]) -> Vec<OsString> {
    let mut renamed = arguments.to_vec();
    if let Some(name) = renamed.first_mut() {
        *name = [OsStr::new("text-generation-launcher "), name].into_iter().collect();
    }
    renamed
}
