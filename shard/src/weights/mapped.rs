//! A file as memory. The only unsafe code of this crate.
//!
//! Weights are read where the page cache holds them, so that a checkpoint is never copied, and several shards on one
//! machine share it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};

/// A file, mapped read-only. Its bytes stay valid for as long as this value lives.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the whole of `path`, and asks the system to start reading it.
    ///
    /// Errors when it is not a regular file (opening a pipe would block), or cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        if !path.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the map is read-only and owned by `Self`, which hands out only borrows of it. What nobody can rule
        // out is another process changing the file. We rely on checkpoints being immutable while they are served, as
        // the hub's cache keeps them (files named by content, replaced by renaming). If that is broken all the same:
        // names and offsets were copied out of the header and checked when it was opened, and weights are only ever
        // decoded as floats, for which every bit pattern is valid, so overwritten bytes give wrong numbers; after a
        // truncation the system ends this process with SIGBUS, which its supervisor treats like any other death.
        let map = unsafe { Mmap::map(&file)? };
        // A hint: where it is not supported, pages come in on first use.
        let _ = map.advise(Advice::WillNeed);
        Ok(Self { path: path.to_owned(), map })
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The contents.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_shows_the_bytes_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"weights").unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert_eq!(mapped.bytes(), b"weights");
        assert_eq!(mapped.path(), path);
    }

    #[test]
    fn an_empty_file_maps_to_no_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(MappedFile::open(file.path()).unwrap().bytes().is_empty());
    }

    #[test]
    fn a_directory_is_not_mapped() {
        let directory = tempfile::tempdir().unwrap();
        let error = MappedFile::open(directory.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
