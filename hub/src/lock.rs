//! One process downloads a file, the others wait for it: a lock that the kernel lets go of when its holder dies, the
//! same that Python's `huggingface_hub` takes.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::cache::create_parent;
use crate::error::HubError;

/// How often a held lock is asked for.
const POLL: Duration = Duration::from_millis(50);

/// How often the log says that another process holds it.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Option<File>,
}

impl Lock {
    /// Takes the lock at `path`, waiting for as long as another process has it. `partial` is the file that grows
    /// meanwhile, `what` its name for the log.
    ///
    /// Errors when the lock's file cannot be made.
    pub(crate) fn acquire(path: &Path, what: &str, partial: &Path) -> Result<Self, HubError> {
        create_parent(path)?;
        let mut next_line = Instant::now();
        loop {
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
            let file = file.map_err(HubError::io("open", path))?;
            match file.try_lock() {
                Ok(()) if is_still_at(&file, path) => return Ok(Self { _file: Some(file) }),
                // Its holder removed it before letting go, so others lock another file of this name by now.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if Instant::now() >= next_line {
                        let bytes = fs::metadata(partial).map_or(0, |metadata| metadata.len());
                        info!("Waiting for another process that downloads {what} ({bytes} bytes so far)");
                        next_line = Instant::now() + LINE_EVERY;
                    }
                    thread::sleep(POLL);
                }
                Err(TryLockError::Error(error)) => return Self::without(path, &error),
            }
        }
    }

    /// Some network file systems have no locks. Two downloads at once then cost time, and checksums find what they spoil.
    fn without(path: &Path, error: &io::Error) -> Result<Self, HubError> {
        warn!("No lock at {}: {error}", path.display());
        Ok(Self { _file: None })
    }
}

fn is_still_at(file: &File, path: &Path) -> bool {
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (ours, theirs) = (file.metadata().map(place), fs::metadata(path).map(place));
    matches!((ours, theirs), (Ok(ours), Ok(theirs)) if ours == theirs)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_second_waits_for_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b.lock");
        let first = Lock::acquire(&path, "b", &path).unwrap();
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _second = Lock::acquire(&path, "b", &path).unwrap();
                sender.send("second").unwrap();
            });
            assert!(receiver.recv_timeout(POLL * 3).is_err(), "the lock is held");
            drop(first);
            assert_eq!(receiver.recv(), Ok("second"));
        });
    }

    #[test]
    fn a_lock_file_that_was_removed_by_its_holder_is_no_lock() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("b.lock");
        let first = Lock::acquire(&path, "b", &path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Lock::acquire(&path, "b", &path).unwrap();
        assert!(is_still_at(second._file.as_ref().unwrap(), &path));
        drop(first);
    }
}
