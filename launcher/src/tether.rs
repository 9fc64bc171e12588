//! A child's tie to the launcher that started it: when the launcher dies, however it dies, so does the child.

use std::ffi::OsString;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{self, Pid};

/// The option that the launcher puts in front of a child's subcommand; not for people, so it is in no help text.
pub const CHILD_OF: &str = "--child-of";

/// Why a child would not go on.
#[derive(Debug, thiserror::Error)]
pub enum TetherError {
    /// The option came without the process id of a launcher.
    #[error("`{CHILD_OF}` needs the process id of the launcher")]
    NoPid,
    /// The kernel did not take the request.
    #[error("cannot tie this process to its launcher: {0}")]
    Refused(Errno),
    /// The launcher had died before the tie held.
    #[error("the launcher, process {0}, is gone")]
    LauncherGone(i32),
}

/// Takes `--child-of <PID>` out of the arguments, if it leads them, and has this process killed when that launcher
/// ends. To be called first thing on the main thread.
///
/// Errors when the launcher is already gone.
pub fn tie_to_launcher(arguments: &mut Vec<OsString>) -> Result<(), TetherError> {
    let Some(launcher) = take_launcher(arguments)? else { return Ok(()) };
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(TetherError::Refused)?;
    // The launcher may have died between the start of this process and the line above; no signal would come then.
    if unistd::getppid() != launcher {
        return Err(TetherError::LauncherGone(launcher.as_raw()));
    }
    Ok(())
}

fn take_launcher(arguments: &mut Vec<OsString>) -> Result<Option<Pid>, TetherError> {
    if arguments.get(1).is_none_or(|first| first != CHILD_OF) {
        return Ok(None);
    }
    let pid = arguments.get(2).and_then(|pid| pid.to_str()?.parse().ok()).ok_or(TetherError::NoPid)?;
    arguments.drain(1..3);
    Ok(Some(Pid::from_raw(pid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(words: &[&str]) -> (Result<Option<i32>, TetherError>, Vec<OsString>) {
        let mut arguments = words.iter().map(OsString::from).collect();
        (take_launcher(&mut arguments).map(|pid| pid.map(Pid::as_raw)), arguments)
    }

    #[test]
    fn the_option_is_taken_only_in_front_of_the_subcommand() {
        let (pid, rest) = take(&["launcher", "--child-of", "12", "shard", "serve"]);
        assert_eq!((pid.unwrap(), rest), (Some(12), vec!["launcher".into(), "shard".into(), "serve".into()]));

        let (pid, rest) = take(&["launcher", "shard", "--child-of", "12"]);
        assert_eq!((pid.unwrap(), rest.len()), (None, 4));
    }

    #[test]
    fn the_option_needs_a_process_id() {
        assert!(matches!(take(&["launcher", "--child-of"]).0, Err(TetherError::NoPid)));
        assert!(matches!(take(&["launcher", "--child-of", "me", "shard"]).0, Err(TetherError::NoPid)));
    }
}
