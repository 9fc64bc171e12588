//! The unix socket of one rank: there while the server is.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// A bound socket. Its file goes when the server, or this value, does.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a socket, removed on drop.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("{}: another process listens on this socket; stop it or choose another --uds-path", .0.display())]
    Taken(PathBuf),
    /// The system refuses.
    #[error("{}: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Socket {
    /// Binds the socket, in place of a file that a dead process has left. Must be called inside a runtime.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Bind { path: path.to_owned(), source };
        match UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::Taken(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Self { listener, file: SocketFile(path.to_owned()) })
    }

    /// The listener, and its file to hold on to.
    pub fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

/// Connecting to an ordinary file is refused as well, and that file is somebody's.
fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "socket file is gone already");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_lives_as_long_as_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard-0");
        let socket = Socket::bind(&path).unwrap();
        assert!(path.exists());
        assert!(matches!(Socket::bind(&path), Err(SocketError::Taken(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_a_dead_process_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard-0");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Socket::bind(&path).unwrap();
    }

    #[tokio::test]
    async fn a_directory_that_is_not_there_is_named() {
        let error = Socket::bind(Path::new("/nowhere/at/all-0")).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere/at/all-0: "), "{error}");
    }

    #[tokio::test]
    async fn an_ordinary_file_in_the_way_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shard-0");
        fs::write(&path, "somebody's").unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::Bind { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "somebody's");
    }
}
