//! Sockets before they are used: the shards' files and the port of the API.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a shard's socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another server answers there.
    #[error("the socket {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// A file of another kind is in the way.
    #[error("{} is in the way of a shard's socket and is no socket itself", .0.display())]
    InTheWay(PathBuf),
    /// The directory for the socket is not there.
    #[error("the directory {} for a shard's socket does not exist", .0.display())]
    NoDirectory(PathBuf),
    /// The system does not let us look at it or remove it.
    #[error("cannot remove the old socket {}: {source}", path.display())]
    Stuck {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes room for a shard's socket: removes the file that an earlier process left.
///
/// Errors when the file is not a left-over socket, or its directory is not there.
pub fn clear(path: &Path) -> Result<(), SocketError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Err(SocketError::NoDirectory(parent.to_owned()));
    }
    let stuck = |source| SocketError::Stuck { path: path.to_owned(), source };
    let file_type = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(stuck(error)),
    };
    if !file_type.is_socket() {
        return Err(SocketError::InTheWay(path.to_owned()));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(SocketError::InUse(path.to_owned()));
    }
    fs::remove_file(path).map_err(stuck)
}

/// Waits until a shard's socket exists, which says that the shard is ready. Looks often at first, since small models
/// load at once, and then less and less: the look that finds it is late by a twentieth of the wait, at most 100 ms.
pub async fn appears(path: &Path) {
    let start = tokio::time::Instant::now();
    while !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        let pause = (start.elapsed() / 20).clamp(Duration::from_millis(2), Duration::from_millis(100));
        tokio::time::sleep(pause).await;
    }
}

/// Errors when the router could not listen on `address`.
pub fn check_free(address: SocketAddr) -> io::Result<()> {
    TcpListener::bind(address).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_that_nobody_listens_on_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shard-0");
        clear(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        clear(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shard-0");
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(clear(&path), Err(SocketError::InUse(_))));
        assert!(path.exists());
    }

    #[test]
    fn another_kind_of_file_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shard-0");
        fs::write(&path, "letters").unwrap();
        assert!(matches!(clear(&path), Err(SocketError::InTheWay(_))));
        assert!(matches!(clear(&directory.path().join("none/shard-0")), Err(SocketError::NoDirectory(_))));
        assert!(path.exists());
    }

    #[test]
    fn a_port_in_use_is_not_free() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(check_free(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        check_free(address).unwrap();
    }
}
