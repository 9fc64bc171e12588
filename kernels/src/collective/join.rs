//! How ranks meet: rank 0 makes a file, whole before anybody can see it, and the others look for it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::shared::{Failure, Identity, Shared, file_len, is_held};
use super::{GroupError, GroupSpec};

/// How often to look for a file that is not there yet.
const GLANCE: Duration = Duration::from_millis(5);

/// The file at its path, for others to find. Dropping it takes the file away.
#[derive(Debug)]
pub(super) struct Published(PathBuf);

impl Drop for Published {
    fn drop(&mut self) {
        // If it is gone already, all the better.
        let _ = fs::remove_file(&self.0);
    }
}

/// The shared memory of the group of `spec`, with the lock of its rank held, and for rank 0 the file to take away again.
pub(super) fn meet(
    spec: &GroupSpec,
    deadline: Instant,
    timeout: Duration,
) -> Result<(Shared, Option<Published>), GroupError> {
    if spec.rank == 0 {
        let (shared, published) = create(spec)?;
        return Ok((shared, Some(published)));
    }
    loop {
        if let Some(shared) = find(spec)? {
            return Ok((shared, None));
        }
        if Instant::now() >= deadline {
            let (path, rank) = (spec.path.clone(), spec.rank);
            return Err(GroupError::Timeout { path, rank, missing: vec![0], waited: timeout });
        }
        std::thread::sleep(GLANCE);
    }
}

/// Makes the file beside its place, takes the lock of rank 0, and moves it there.
fn create(spec: &GroupSpec) -> Result<(Shared, Published), GroupError> {
    let path = &spec.path;
    if let Some(file) = open(path)?
        && is_held(&file, 0).map_err(|source| failed(path, "look for its rank 0", source))?
    {
        return Err(GroupError::InUse { path: path.clone() });
    }
    let beside = beside(path);
    let file = create_new(&beside).map_err(|source| failed(&beside, "create", source))?;
    // From here on, whatever fails leaves nothing behind.
    let temporary = Published(beside);
    let len = file_len(spec.world) as u64;
    let identity = Identity::new(spec.world).to_bytes();
    // Reserved, not only announced: a write to a page that the disk has no room for would end the process.
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, len as i64)
        .map_err(io::Error::from)
        .and_then(|()| file.write_all_at(&identity, 0))
        .map_err(|source| failed(&temporary.0, "write", source))?;
    let shared = Shared::map(file, spec.world).map_err(|source| failed(&temporary.0, "map", source))?;
    lock(&shared, spec)?;
    fs::rename(&temporary.0, path).map_err(|source| failed(path, "put in place", source))?;
    Ok((shared, Published(path.clone())))
}

/// A name in the same directory that no other process uses, and none that lives has used before.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

/// Creates a file for this user alone. One of that name can only be from a process that is gone.
fn create_new(path: &Path) -> io::Result<File> {
    let create = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    match create() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            fs::remove_file(path)?;
            create()
        }
        result => result,
    }
}

/// Opens the file of a group. None when there is none.
fn open(path: &Path) -> Result<Option<File>, GroupError> {
    let options = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    match OpenOptions::new().read(true).write(true).custom_flags(options).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed(path, "open", source)),
    }
}

/// Joins as a rank that is not 0. None when there is no file yet, or only one whose rank 0 is gone.
fn find(spec: &GroupSpec) -> Result<Option<Shared>, GroupError> {
    let path = &spec.path;
    let Some(file) = open(path)? else { return Ok(None) };
    let foreign = |reason: &str| GroupError::Foreign { path: path.clone(), reason: reason.to_owned() };
    let metadata = file.metadata().map_err(|source| failed(path, "look at", source))?;
    if !metadata.is_file() {
        return Err(foreign("not a regular file"));
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(foreign("it belongs to another user"));
    }
    if !is_held(&file, 0).map_err(|source| failed(path, "look for its rank 0", source))? {
        return Ok(None);
    }
    let mut bytes = [0; Identity::LEN];
    file.read_exact_at(&mut bytes, 0).map_err(|source| failed(path, "read", source))?;
    let theirs = Identity::from_bytes(&bytes).ok_or_else(|| foreign("it does not start as one"))?;
    let ours = Identity::new(spec.world);
    if theirs.build != ours.build {
        let (path, rank) = (path.clone(), spec.rank);
        return Err(GroupError::Build { path, rank, ours: ours.build, theirs: theirs.build });
    }
    if theirs.world == 0 || theirs.world > GroupSpec::WORLD_MAX {
        return Err(foreign("it is for no possible number of ranks"));
    }
    let shared = Shared::map(file, theirs.world).map_err(|source| failed(path, "map", source))?;
    if theirs.world != ours.world {
        // The others need not wait for somebody who will not come.
        shared.fail(Failure::Aborted(spec.rank));
        let (path, rank) = (path.clone(), spec.rank);
        return Err(GroupError::World { path, rank, ours: ours.world, theirs: theirs.world });
    }
    lock(&shared, spec)?;
    Ok(Some(shared))
}

/// Takes the lock of this rank.
fn lock(shared: &Shared, spec: &GroupSpec) -> Result<(), GroupError> {
    let path = &spec.path;
    if shared.lock(spec.rank).map_err(|source| failed(path, "lock", source))? {
        Ok(())
    } else {
        Err(GroupError::RankTaken { path: path.clone(), rank: spec.rank })
    }
}

fn failed(path: &Path, what: &'static str, source: io::Error) -> GroupError {
    GroupError::Io { path: path.to_owned(), what, source }
}
