//! A Hub on loopback: two servers (the second one holds large files, as on the real one), repositories made of bytes or
//! of a rule, and faults on demand. It notes every request.
//!
//! - [`content`]: what files are made of.
//! - [`server`]: requests, ranges, redirects.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use http::HeaderMap;

pub mod content;
mod server;

pub use content::Content;

/// The commit that every branch of every repository is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of this size and more are large ones: they come from the second server, and their etag is a sha256.
pub const LARGE: u64 = 1 << 20;

/// A running Hub. It ends with the process.
#[derive(Clone, Debug)]
pub struct FakeHub {
    address: SocketAddr,
    state: Arc<State>,
}

/// Who may read a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Open,
    /// Who was granted access has this token; the others see that it exists.
    Gated(String),
    /// Who has this token; the others cannot tell whether it exists.
    Private(String),
}

/// A repository.
#[derive(Clone, Debug)]
pub struct Repository {
    /// Who may read it.
    pub access: Access,
    /// Its files by name.
    pub files: BTreeMap<String, Content>,
}

/// What goes wrong with a request whose path contains a text.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is answered with this status and these headers.
    Status(u16, Vec<(String, String)>),
    /// It is answered with this body in place of the file.
    Body(Vec<u8>),
    /// The connection ends before byte so many of the file.
    CutAt(u64),
    /// The answer does not say how long it is.
    NoLength,
    /// The range that was asked for is ignored.
    NoRanges,
    /// The byte at this place is wrong.
    WrongByte(u64),
    /// Byte so many of the file, and what follows, comes when [`FakeHub::release`] is called.
    StallAt(u64),
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Headers.
    pub headers: HeaderMap,
    /// Whether it came to the second server.
    pub elsewhere: bool,
}

impl Seen {
    /// A header's text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

#[derive(Debug)]
struct State {
    elsewhere: SocketAddr,
    repositories: Mutex<BTreeMap<String, Repository>>,
    /// Faults, each with a part of the path and the number of times that it is left to happen.
    faults: Mutex<Vec<(String, Fault, usize)>>,
    seen: Mutex<Vec<Seen>>,
    released: (Mutex<bool>, std::sync::Condvar),
}

impl FakeHub {
    /// Starts one without repositories.
    pub fn start() -> Result<Self> {
        let (hub, elsewhere) = (server::listen()?, server::listen()?);
        let state = Arc::new(State {
            elsewhere: elsewhere.local_addr()?,
            repositories: Mutex::default(),
            faults: Mutex::default(),
            seen: Mutex::default(),
            released: Default::default(),
        });
        let address = hub.local_addr()?;
        server::serve(hub, Arc::clone(&state), false);
        server::serve(elsewhere, Arc::clone(&state), true);
        Ok(Self { address, state })
    }

    /// What goes into `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds a repository that everybody may read.
    pub fn add(&self, id: &str, files: impl IntoIterator<Item = (impl Into<String>, Content)>) {
        let files = files.into_iter().map(|(name, content)| (name.into(), content)).collect();
        locked(&self.state.repositories).insert(id.to_owned(), Repository { access: Access::Open, files });
    }

    /// Says who may read a repository.
    pub fn restrict(&self, id: &str, access: Access) {
        if let Some(repository) = locked(&self.state.repositories).get_mut(id) {
            repository.access = access;
        }
    }

    /// Lets the next `times` requests whose path contains `part` go wrong.
    pub fn fail(&self, part: &str, fault: Fault, times: usize) {
        locked(&self.state.faults).push((part.to_owned(), fault, times));
    }

    /// Lets go on what stalls.
    pub fn release(&self) {
        *locked(&self.state.released.0) = true;
        self.state.released.1.notify_all();
    }

    /// Faults that have not happened as often as they should.
    pub fn faults_left(&self) -> usize {
        locked(&self.state.faults).iter().filter(|(_, _, times)| *times > 0).count()
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        locked(&self.state.seen).clone()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
