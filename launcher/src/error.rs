//! Why the launcher ended otherwise than it was asked to; each is one line for people and an exit code for programs.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use hub::HubError;

use crate::adapters::AdapterError;
use crate::model::ModelError;
use crate::plan::PlanError;
use crate::process::Ending;
use crate::socket::SocketError;

/// What ended the launcher. Those that TGI's launcher knows carry its name for them.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A variable of the environment that cannot be read.
    #[error("{0}")]
    Variable(String),
    /// `LOG_LEVEL` is neither a level nor a filter.
    #[error("LOG_LEVEL: {0}")]
    LogLevel(String),
    /// Arguments that contradict each other or ask for what is not there.
    #[error("{name}: {0}", name = .0.name())]
    Arguments(#[from] PlanError),
    /// The model's files are not all there.
    #[error("{0}")]
    Model(#[from] ModelError),
    /// An adapter's files are not there.
    #[error("{0}")]
    Adapter(#[from] AdapterError),
    /// The model cannot be found on the Hub or fetched from it.
    #[error("DownloadError: {0}")]
    Hub(#[from] HubError),
    /// The download could not be started.
    #[error("DownloadError: {0}")]
    DownloadCannotStart(io::Error),
    /// The download ended otherwise than it should.
    #[error("DownloadError: the download of `{id}` ended with {ending}")]
    DownloadFailed {
        /// The model or adapter.
        id: String,
        /// How it ended.
        ending: Ending,
    },
    /// The file for the chat template is not there.
    #[error("--tokenizer-config-path {} is not a file", .0.display())]
    NoTokenizerConfig(PathBuf),
    /// The router could not listen.
    #[error("cannot listen on {address} (--hostname, --port): {}", listen_reason(source, *address))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The private directory or what goes into it.
    #[error("cannot prepare a private directory in {}: {source}", path.display())]
    RunDirectory {
        /// The directory for temporary files.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The place for a shard's socket.
    #[error("ShardCannotStart: {0}")]
    Socket(#[from] SocketError),
    /// A shard could not be started.
    #[error("ShardCannotStart: shard {rank}: {source}")]
    ShardCannotStart {
        /// Its number.
        rank: usize,
        /// Why.
        source: io::Error,
    },
    /// A shard ended while it was loading.
    #[error("ShardCannotStart: shard {rank} ended with {ending} before it was ready")]
    ShardNotReady {
        /// Its number.
        rank: usize,
        /// How it ended.
        ending: Ending,
    },
    /// The shards cannot go on, and are not started again, or not any more.
    #[error("ShardFailed: {failure}{}", after(*restarts))]
    ShardFailed {
        /// What was the last to happen to them.
        failure: ShardFailure,
        /// How often in a row they had been started again.
        restarts: u32,
    },
    /// The router could not be started.
    #[error("WebserverCannotStart: {0}")]
    WebserverCannotStart(io::Error),
    /// The router ended without being asked to.
    #[error("WebserverFailed: the webserver ended with {ending}{}", after(*restarts))]
    WebserverFailed {
        /// How it ended.
        ending: Ending,
        /// How often in a row it had been started again.
        restarts: u32,
    },
    /// The system refused something basic.
    #[error("cannot {what}: {source}")]
    System {
        /// What it refused.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl LaunchError {
    /// What the launcher's exit code is: 2 for a variable that does not parse, as for a flag; otherwise 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Variable(_) | Self::LogLevel(_) => 2,
            _ => 1,
        }
    }
}

/// Why the shards cannot go on as they are.
#[derive(Debug, thiserror::Error)]
pub enum ShardFailure {
    /// One ended without being asked to.
    #[error("shard {rank} ended with {ending}")]
    Ended {
        /// Its number.
        rank: usize,
        /// How it ended.
        ending: Ending,
    },
    /// The router has given one up.
    #[error("{} was given up by the webserver: {reason}", which(*rank))]
    GivenUp {
        /// Its number, if the router knows.
        rank: Option<usize>,
        /// Why.
        reason: String,
    },
    /// They could not be started again.
    #[error("{0}")]
    NotStarted(Box<LaunchError>),
}

fn after(restarts: u32) -> String {
    match restarts {
        0 => String::new(),
        1 => ", after a restart".to_owned(),
        _ => format!(", after {restarts} restarts in a row"),
    }
}

fn which(rank: Option<usize>) -> String {
    rank.map_or_else(|| "a shard".to_owned(), |rank| format!("shard {rank}"))
}

fn listen_reason(source: &io::Error, address: SocketAddr) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!("port {} is in use", address.port()),
        _ => source.to_string(),
    }
}
