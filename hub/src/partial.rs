//! A file that is still coming: the beginning of some contents, and their checksum so far.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use ring::digest::Context;

use crate::cache::create_parent;
use crate::checksum::{self, Checksum};
use crate::error::HubError;
use crate::listing::Metadata;
use crate::space;

/// The beginning of some contents, without a gap.
pub(crate) struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
    kind: Checksum,
    size: Option<u64>,
    /// None where nothing is promised, and where it takes the size to begin, which comes at the end.
    sum: Option<Context>,
}

impl Partial {
    /// Opens what an earlier download left at `path`, or begins anew.
    pub(crate) fn open(path: &Path, metadata: &Metadata) -> Result<Self, HubError> {
        create_parent(path)?;
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(HubError::io("open", path))?;
        let length = file.metadata().map_err(HubError::io("read", path))?.len();
        let kind = Checksum::of_etag(&metadata.etag);
        let mut partial = Self {
            path: path.to_owned(),
            file,
            length,
            kind,
            size: metadata.size,
            sum: begin(kind, metadata.size),
        };
        // More than there should be, or of unknown size: no way to tell where to go on.
        if partial.size.is_none_or(|size| partial.length > size) {
            partial.restart()?;
        }
        if let Some(sum) = partial.sum.as_mut().filter(|_| partial.length > 0) {
            checksum::read_into(sum, path).map_err(HubError::io("read", path))?;
        }
        Ok(partial)
    }

    /// Bytes that are there.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Bytes that are to come; none when unknown.
    pub(crate) fn rest(&self) -> Option<u64> {
        self.size.map(|size| size.saturating_sub(self.length))
    }

    /// Adds the bytes that follow. `what` is the file's name for errors.
    pub(crate) fn append(&mut self, bytes: &[u8], what: &str) -> Result<(), HubError> {
        let written = self.file.write_all(bytes);
        written.map_err(|error| space::write_error(error, &self.path, what, self.rest().unwrap_or(0)))?;
        self.length += bytes.len() as u64;
        if let Some(sum) = &mut self.sum {
            sum.update(bytes);
        }
        Ok(())
    }

    /// Forgets what is there.
    pub(crate) fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(HubError::io("empty", self.path.as_path()))?;
        self.length = 0;
        self.sum = begin(self.kind, self.size);
        Ok(())
    }

    /// Compares what is there with what was promised. Contents that are wrong are removed.
    ///
    /// Errors with what is wrong about them.
    pub(crate) fn verify(self, file: &str, etag: &str) -> Result<(), HubError> {
        let problem = match self.size {
            Some(expected) if expected != self.length => {
                Some(HubError::Size { file: file.to_owned(), expected, found: self.length })
            }
            _ => {
                self.kind.begin(self.length).map(|whole| self.sum_up(whole)).transpose()?.and_then(|found| {
                    let (algorithm, expected) = (self.kind.name(), etag.to_owned());
                    let wrong = HubError::Checksum {
                        file: file.to_owned(),
                        algorithm,
                        expected,
                        found: found.clone(),
                    };
                    Some(wrong).filter(|_| found != etag)
                })
            }
        };
        match problem {
            None => Ok(()),
            Some(problem) => {
                fs::remove_file(&self.path).map_err(HubError::io("remove", self.path.as_path()))?;
                Err(problem)
            }
        }
    }

    fn sum_up(&self, mut whole: Context) -> Result<String, HubError> {
        match &self.sum {
            Some(sum) => Ok(checksum::hex(sum.clone())),
            None => {
                let read = checksum::read_into(&mut whole, &self.path);
                read.map_err(HubError::io("read", self.path.as_path()))?;
                Ok(checksum::hex(whole))
            }
        }
    }
}

fn begin(kind: Checksum, size: Option<u64>) -> Option<Context> {
    match (kind, size) {
        (Checksum::GitSha1, None) => None,
        (kind, size) => kind.begin(size.unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `hello\n`.
    const GIT: &str = "ce013625030ba8dba906f756967f9e9ca394464a";

    fn open(directory: &Path, etag: &str, size: Option<u64>) -> Partial {
        Partial::open(&directory.join("p"), &Metadata { etag: etag.into(), size }).unwrap()
    }

    #[test]
    fn a_download_goes_on_where_it_was_left() {
        let directory = tempfile::tempdir().unwrap();
        open(directory.path(), GIT, Some(6)).append(b"hel", "f").unwrap();
        let mut partial = open(directory.path(), GIT, Some(6));
        assert_eq!((partial.length(), partial.rest()), (3, Some(3)));
        partial.append(b"lo\n", "f").unwrap();
        partial.verify("f", GIT).unwrap();
    }

    #[test]
    fn what_is_too_long_or_of_unknown_size_begins_anew() {
        let directory = tempfile::tempdir().unwrap();
        for size in [Some(2), None] {
            fs::write(directory.path().join("p"), "hel").unwrap();
            assert_eq!(open(directory.path(), GIT, size).length(), 0);
        }
    }

    #[test]
    fn a_size_that_comes_at_the_end_still_makes_a_sum() {
        let directory = tempfile::tempdir().unwrap();
        let mut partial = open(directory.path(), GIT, None);
        partial.append(b"hello\n", "f").unwrap();
        partial.verify("f", GIT).unwrap();
    }

    #[test]
    fn wrong_contents_are_named_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let mut partial = open(directory.path(), GIT, Some(6));
        partial.append(b"hellO\n", "model.bin").unwrap();
        let error = partial.verify("model.bin", GIT).unwrap_err().to_string();
        assert!(error.starts_with("model.bin: the git sha1") && error.contains(GIT), "{error}");
        assert!(!directory.path().join("p").exists());
    }

    #[test]
    fn an_etag_that_is_no_checksum_promises_the_size_alone() {
        let directory = tempfile::tempdir().unwrap();
        let mut partial = open(directory.path(), "v1-2", Some(6));
        partial.append(b"hello", "f").unwrap();
        assert!(matches!(partial.verify("f", "v1-2"), Err(HubError::Size { expected: 6, found: 5, .. })));
    }
}
