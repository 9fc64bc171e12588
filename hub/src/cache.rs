//! One repository in the cache, in the layout of Python's `huggingface_hub`, so that each finds what the other fetched:
//!
//! ```text
//! models--org--name/blobs/<etag>                     contents, <etag>.incomplete while they come
//!                  /snapshots/<commit>/<file>        links to blobs: ../../blobs/<etag>
//!                  /refs/<revision>                  the commit of a branch or tag
//! .locks/models--org--name/<etag>.lock               held by who downloads
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tracing::debug;

use crate::error::HubError;
use crate::repo::{Source, is_plain_name};

/// The directories of one repository.
#[derive(Clone, Debug)]
pub(crate) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, source: &Source) -> Self {
        let folder = source.folder();
        Self { locks: cache.join(".locks").join(&folder), root: cache.join(folder) }
    }

    /// Where the contents are.
    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.blobs().join(etag)
    }

    /// The beginning of contents that are still to come.
    pub(crate) fn partial(&self, etag: &str) -> PathBuf {
        self.blobs().join(format!("{etag}.incomplete"))
    }

    pub(crate) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// The directory of a commit's files.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that a revision had when it was last asked for; none when it never was.
    pub(crate) fn commit_of(&self, source: &Source) -> Option<String> {
        if let Some(commit) = source.commit() {
            return Some(commit.to_owned());
        }
        let commit = fs::read_to_string(self.root.join("refs").join(source.revision())).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_plain_name(commit))
    }

    /// Notes the commit of a branch or tag.
    pub(crate) fn set_commit_of(&self, source: &Source, commit: &str) -> Result<(), HubError> {
        if source.revision() == commit || self.commit_of(source).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(source.revision());
        create_parent(&path)?;
        replace(&path, |new| fs::write(new, commit)).map_err(HubError::io("write", path.as_path()))
    }

    /// Makes a blob appear as a file of a commit.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        create_parent(&pointer)?;
        let up = "../".repeat(file.split('/').count() + 1);
        let target = format!("{up}blobs/{etag}");
        match replace(&pointer, |new| symlink(&target, new)) {
            Ok(()) => Ok(()),
            // A file system without links: the file itself goes there, as in Python.
            Err(error) if !pointer.exists() => {
                debug!("No link at {}: {error}; moving the file there", pointer.display());
                fs::rename(self.blob(etag), &pointer)
                    .map_err(HubError::io("move a download to", pointer.as_path()))
            }
            Err(error) => Err(HubError::io("link", pointer.as_path())(error)),
        }
    }
}

/// Puts something new in the place of a path at once: who looks sees the old or the new, never a half.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(new);
    // Left by a process of this number that was killed here.
    let _ = fs::remove_file(&new);
    make(&new)?;
    fs::rename(&new, path)
}

/// Creates the directory that a file goes into.
pub(crate) fn create_parent(path: &Path) -> Result<(), HubError> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(HubError::io("create", parent)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn repository() -> (tempfile::TempDir, Source, RepoCache) {
        let cache = tempfile::tempdir().unwrap();
        let source = Source::new("org/name", Some("refs/pr/1")).unwrap();
        let repository = RepoCache::new(cache.path(), &source);
        (cache, source, repository)
    }

    #[test]
    fn the_layout_is_that_of_python() {
        let (cache, _, repository) = repository();
        let inside = |path: PathBuf| path.strip_prefix(cache.path()).unwrap().to_str().unwrap().to_owned();
        assert_eq!(inside(repository.blob("e")), "models--org--name/blobs/e");
        assert_eq!(inside(repository.partial("e")), "models--org--name/blobs/e.incomplete");
        assert_eq!(inside(repository.snapshot("c")), "models--org--name/snapshots/c");
        assert_eq!(inside(repository.lock("e")), ".locks/models--org--name/e.lock");
    }

    #[test]
    fn a_link_leads_to_its_blob_from_any_depth() {
        let (_cache, _, repository) = repository();
        fs::create_dir_all(repository.blobs()).unwrap();
        fs::write(repository.blob("e"), "content").unwrap();
        for file in ["config.json", "additional_chat_templates/tool_use.jinja"] {
            for _ in 0..2 {
                repository.link(COMMIT, file, "e").unwrap();
                assert_eq!(fs::read(repository.snapshot(COMMIT).join(file)).unwrap(), b"content");
            }
        }
        let link = fs::read_link(repository.snapshot(COMMIT).join("config.json")).unwrap();
        assert_eq!(link, Path::new("../../blobs/e"));
    }

    #[test]
    fn a_branch_is_remembered_and_a_commit_needs_no_memory() {
        let (_cache, source, repository) = repository();
        assert_eq!(repository.commit_of(&source), None);
        repository.set_commit_of(&source, COMMIT).unwrap();
        assert_eq!(repository.commit_of(&source).as_deref(), Some(COMMIT));
        let exact = Source::new("org/name", Some(COMMIT)).unwrap();
        assert_eq!(repository.commit_of(&exact).as_deref(), Some(COMMIT));
    }
}
