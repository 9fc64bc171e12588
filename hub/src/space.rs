//! Room on the disk: asked about before a download, and told about when it runs out all the same.

use std::io;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::error::HubError;

/// Bytes that can be written below a directory; none when the system does not tell.
fn available(directory: &Path) -> Option<u64> {
    // The directory itself may be still to come; what counts is the file system.
    let existing = directory.ancestors().find(|path| path.exists())?;
    let numbers = statvfs(existing).ok()?;
    Some(numbers.blocks_available().saturating_mul(numbers.fragment_size()))
}

/// Errors when `needed` bytes do not fit below `directory`.
pub(crate) fn require(directory: &Path, what: &str, needed: u64) -> Result<(), HubError> {
    match available(directory) {
        Some(available) if available < needed => Err(lack(directory, what, needed)),
        _ => Ok(()),
    }
}

/// A failed write as an error: of space when that is what failed.
pub(crate) fn write_error(error: io::Error, partial: &Path, what: &str, needed: u64) -> HubError {
    let directory = partial.parent().unwrap_or(partial);
    match error.kind() {
        // The last one is a limit of the process, which has the same cure.
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            lack(directory, what, needed)
        }
        _ => HubError::io("write", partial)(error),
    }
}

fn lack(directory: &Path, what: &str, needed: u64) -> HubError {
    HubError::Space {
        directory: directory.to_owned(),
        what: what.to_owned(),
        needed,
        available: available(directory).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_disk_has_is_refused_with_directory_and_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("still/to/come");
        require(&inside, "a", 1).unwrap();
        let error = require(&inside, "model.safetensors", u64::MAX).unwrap_err().to_string();
        assert!(error.contains("still/to/come") && error.contains("model.safetensors"), "{error}");
        assert!(error.contains(&u64::MAX.to_string()) && error.contains("are available"), "{error}");
    }

    #[test]
    fn a_full_disk_is_told_from_other_trouble() {
        let path = Path::new("/tmp/x.incomplete");
        let full = write_error(io::Error::from(io::ErrorKind::StorageFull), path, "x", 7);
        assert!(full.to_string().contains("not enough space in /tmp: x needs 7 bytes"), "{full}");
        let other = write_error(io::Error::from(io::ErrorKind::PermissionDenied), path, "x", 7);
        assert!(matches!(other, HubError::Io { .. }));
    }
}
