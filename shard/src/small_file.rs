//! Reading small files that are not trusted: configurations, indexes, tokenizers.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// All of a regular file of at most `bytes_max` bytes. Errors when it is a pipe or a device, which might never end, or
/// longer.
pub(crate) fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {bytes_max} bytes"));
    let file = File::open(path)?;
    if file.metadata()?.len() > bytes_max {
        return Err(too_large());
    }
    // It may grow while it is read.
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max { Err(too_large()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_up_to_the_limit_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(read(&path, 2).unwrap(), b"{}");
        assert_eq!(read(&path, 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read(directory.path(), 9).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read(&directory.path().join("none"), 9).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
