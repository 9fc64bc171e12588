//! A file as memory. The only unsafe code of this crate.
//!
//! Weights are read where the page cache holds them, so that a checkpoint is never copied, and several shards on one
//! machine share it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};

/// Smallest page of any system that we run on.
const PAGE_BYTES: usize = 4096;

/// A file, mapped read-only. Its bytes stay valid for as long as this value lives.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    Map(Mmap),
    /// Of a part that could not be used as it lies in the file.
    Copy(Vec<u8>),
}

impl MappedFile {
    /// Maps the whole of `path`. Nothing is read before it is used, or asked for by [`super::prefetch`].
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
        Ok(Self { path: path.to_owned(), contents: Contents::Map(map) })
    }

    /// Bytes that were taken from the file at `path` and rearranged.
    pub(super) fn copied(path: &Path, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), contents: Contents::Copy(bytes) }
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The contents.
    pub fn bytes(&self) -> &[u8] {
        match &self.contents {
            Contents::Map(map) => map,
            Contents::Copy(bytes) => bytes,
        }
    }

    /// Asks the system to start reading these bytes. A hint: nothing depends on it.
    pub(super) fn read_ahead(&self, range: Range<usize>) {
        if let Contents::Map(map) = &self.contents {
            let _ = map.advise_range(Advice::WillNeed, range.start, range.len());
        }
    }

    /// Returns when these bytes are in memory and this process can reach them without a page fault.
    ///
    /// Errors when the file cannot be read, or has become shorter.
    pub(super) fn populate(&self, range: Range<usize>) -> io::Result<()> {
        let Contents::Map(map) = &self.contents else { return Ok(()) };
        #[cfg(target_os = "linux")]
        loop {
            match map.advise_range(Advice::PopulateRead, range.start, range.len()) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Before Linux 5.14.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            }
        }
        for page in map[range].chunks(PAGE_BYTES) {
            std::hint::black_box(page.first());
        }
        Ok(())
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
