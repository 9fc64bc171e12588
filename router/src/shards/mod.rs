//! The shards as the batcher sees them.

use thiserror::Error;

/// A step, or another call, that the shards did not carry out.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ShardError {
    /// No connection, or it broke.
    #[error("Could not connect to Text Generation server: {0}")]
    Connection(String),
    /// The shard answered with an error.
    #[error("Server error: {0}")]
    Server(String),
    /// There is no shard at all.
    #[error("Sharded results are empty")]
    Empty,
}
