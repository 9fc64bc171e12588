//! The launcher's private directory: sockets and the demo model's files. Gone when the launcher ends; what a killed
//! launcher left behind, the next one removes.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;
use tracing::{info, warn};

/// What the names begin with; the launcher's process id and six random characters follow.
const PREFIX: &str = "text-generation-launcher-";

/// A file in the directory that its launcher keeps locked.
const LOCK: &str = "lock";

/// A directory that only this user can enter. Dropping it removes it with all it holds.
#[derive(Debug)]
pub struct RunDir {
    directory: TempDir,
    /// Locked as long as this launcher lives. Process ids alone would not do: containers that share a temporary
    /// directory have the same ones.
    _lock: File,
}

impl RunDir {
    /// Creates the directory inside of `temporary` for the launcher `pid`.
    pub fn create(temporary: &Path, pid: u32) -> io::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{pid}-"))
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(temporary)?;
        let lock = File::create(directory.path().join(LOCK))?;
        lock.try_lock()?;
        Ok(Self { directory, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// What the path of the directory would look like, for a plan that is only printed.
pub fn likely_path(temporary: &Path, pid: u32) -> PathBuf {
    temporary.join(format!("{PREFIX}{pid}-XXXXXX"))
}

/// Removes the directories in `temporary` that dead launchers of this user left behind. What cannot be removed stays,
/// with a line in the log: it is in nobody's way.
pub fn sweep(temporary: &Path, own_pid: u32) {
    let Ok(entries) = fs::read_dir(temporary) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if launcher_of(&path).is_none_or(|pid| !is_left_behind(&path, pid, own_pid)) {
            continue;
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => info!("Removed {}, left behind by a launcher that was killed", path.display()),
            Err(error) => warn!("Cannot remove {}, left behind by a launcher: {error}", path.display()),
        }
    }
}

/// The launcher that a directory's name speaks of.
fn launcher_of(path: &Path) -> Option<u32> {
    let (pid, _) = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn is_left_behind(path: &Path, pid: u32, own_pid: u32) -> bool {
    let ours = fs::symlink_metadata(path)
        .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == geteuid().as_raw());
    // A process with the own id is this one, and this one has no directory yet.
    ours && (pid == own_pid || !is_alive(pid)) && !is_locked(&path.join(LOCK))
}

fn is_alive(pid: u32) -> bool {
    i32::try_from(pid).is_ok_and(|pid| kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH))
}

/// Whether a launcher holds the lock. One that died before it made the file holds none.
fn is_locked(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|file| file.try_lock().is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No process has it: the kernel's largest is 2^22.
    const DEAD: u32 = i32::MAX as u32;

    fn left_behind(temporary: &Path, name: &str) -> PathBuf {
        let path = temporary.join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(LOCK), "").unwrap();
        fs::write(path.join("shard-0"), "").unwrap();
        path
    }

    #[test]
    fn the_directory_is_private_carries_the_pid_and_goes_with_its_owner() {
        let temporary = tempfile::tempdir().unwrap();
        let run_dir = RunDir::create(temporary.path(), 42).unwrap();
        let path = run_dir.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert_eq!(launcher_of(&path), Some(42));
        drop(run_dir);
        assert!(!path.exists());
    }

    #[test]
    fn what_dead_launchers_left_behind_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let dead = left_behind(temporary.path(), &format!("{PREFIX}{DEAD}-abcdef"));
        let own = left_behind(temporary.path(), &format!("{PREFIX}{}-abcdef", std::process::id()));
        sweep(temporary.path(), std::process::id());
        assert!(!dead.exists());
        // In a container, every launcher may be process 1.
        assert!(!own.exists());
    }

    #[test]
    fn what_belongs_to_the_living_or_to_others_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let parent =
            left_behind(temporary.path(), &format!("{PREFIX}{}-abcdef", std::os::unix::process::parent_id()));
        let other = left_behind(temporary.path(), "text-generation-notes");
        let locked = RunDir::create(temporary.path(), DEAD).unwrap();
        let file = temporary.path().join(format!("{PREFIX}{DEAD}-ffffff"));
        fs::write(&file, "").unwrap();

        sweep(temporary.path(), std::process::id());
        assert!(parent.exists() && other.exists() && locked.path().exists() && file.exists());
    }

    #[test]
    fn a_link_is_not_followed() {
        let temporary = tempfile::tempdir().unwrap();
        let target = left_behind(temporary.path(), "precious");
        std::os::unix::fs::symlink(&target, temporary.path().join(format!("{PREFIX}{DEAD}-abcdef"))).unwrap();
        sweep(temporary.path(), std::process::id());
        assert!(target.join("shard-0").exists());
    }
}
