//! The shards as the batcher sees them: a plan goes in, tokens come out.
//!
//! - [`grpc`]: the real ones: one plan to every rank, each request answered by its owner.
//! - `client`: the connections, and one call to all ranks.
//! - `wire`: requests and answers as messages.
//! - [`warmup`]: the largest step, run once to measure.
//! - [`recovery`]: how shards are watched, and brought back when they fail.
//! - [`info`]: what the shards serve and understand.
//! - `scripted`: shards for tests, which hold the scheduler to the contract.
//!
//! What is absent: the queue, and who holds which block; a plan says all of it.

use std::future::Future;
use std::time::Duration;

use proto::units::{RequestId, TokenCount};
use thiserror::Error;

use crate::batching::{Capacity, FinishReason, PromptToken, Step, StepPlan};

mod client;
pub mod grpc;
pub mod info;
pub mod recovery;
pub mod warmup;
mod wire;

#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
pub(crate) mod scripted_server;
#[cfg(test)]
mod tests;

pub use client::{ShardAdapters, ShardHealth};
pub use grpc::{GrpcShards, connect};
pub use info::{Extensions, ShardInfo};
pub use recovery::Recovery;
pub use warmup::{Warm, WarmupLimits};

/// Something that carries out steps.
pub trait Shards: Send + 'static {
    /// Drops the rows that leave, then runs one pass over the others that the plan names.
    ///
    /// Errors when the pass was not made. All rows that the step touched ([`StepPlan::touches_running`]) are forgotten
    /// then, and those that wanted to join are not held.
    fn step(&mut self, plan: &StepPlan) -> impl Future<Output = Result<StepOutput, ShardError>> + Send;

    /// After a step that ended with `error` and lost everything: waits until there are shards again, which hold nothing.
    /// The size of their cache.
    ///
    /// Errors when there will be none.
    fn restore(&mut self, error: &ShardError) -> impl Future<Output = Result<Capacity, ShardError>> + Send;
}

/// What one step made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// In no particular order. A row whose prompt is not complete has none.
    pub generations: Vec<Generation>,
    /// Rows that have ended without a further token, while the others went on.
    pub failures: Vec<(RequestId, ShardError)>,
    /// Where the time went.
    pub timings: Timings,
}

/// What one row generated in one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The row.
    pub request: RequestId,
    /// Log-probabilities of the prompt, with the first token, if asked for.
    pub prompt: Option<Vec<PromptToken>>,
    /// Accepted guesses: tokens before the newest one. Empty without speculation.
    pub earlier: Vec<Step>,
    /// The newest token.
    pub newest: Step,
    /// Set if the row has stopped.
    pub end: Option<End>,
}

/// How a row stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The whole generated text.
    pub text: String,
    /// Generated tokens.
    pub tokens: TokenCount,
    /// Why it stopped.
    pub reason: FinishReason,
    /// The seed, if the request really sampled.
    pub seed: Option<u64>,
}

/// Where the time of a step went, as the slowest shard measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Dropping rows, as the router measured it.
    pub drops: Duration,
    /// Joining batches, if batches were joined.
    pub concat: Option<Duration>,
    /// Inputs to sampled tokens.
    pub forward: Duration,
    /// Text and stopping criteria.
    pub decode: Duration,
    /// The whole call.
    pub total: Duration,
}

/// A step, or another call, that the shards did not carry out.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ShardError {
    /// No connection, or it broke.
    #[error("Could not connect to Text Generation server: {0}")]
    Connection(String),
    /// The shard answered with an error.
    #[error("Server error: {0}")]
    Server(String),
    /// The shard would not carry a step out, and nothing has changed there.
    #[error("Server error: {0}")]
    Refused(String),
    /// A step does not come to its end.
    #[error("the model server hangs: {0}")]
    Hung(String),
    /// The shard ended this request, while others went on.
    #[error("Server error: {0}")]
    Request(String),
    /// There is no shard at all.
    #[error("Sharded results are empty")]
    Empty,
    /// The shard answered with something that the contract does not allow.
    #[error("Server error: unexpected answer: {0}")]
    Answer(String),
    /// A request that does not fit even into an empty cache.
    #[error("the request needs room for {need} tokens, but the cache holds {usable}")]
    Capacity {
        /// Tokens it may have to store.
        need: TokenCount,
        /// Tokens that requests can store.
        usable: TokenCount,
    },
    /// A prompt that no pass can take, and that the shards cannot cut.
    #[error("the prompt has {tokens} tokens, but a batch takes at most {limit} prompt tokens")]
    Prompt {
        /// Its length.
        tokens: TokenCount,
        /// `max_batch_prefill_tokens`.
        limit: TokenCount,
    },
    /// The client's time was over before the end.
    #[error("the request did not end within the {} s that it was given", .0.as_secs_f64())]
    Deadline(Duration),
    /// There are no shards any more, and nobody starts them again.
    #[error("the model server has failed for good: {0}")]
    Abandoned(String),
    /// The shards failed in steps of this request, the last time in one of its own.
    #[error("the model server failed twice while it computed this request: {0}")]
    Poisonous(String),
    /// A request asks for what the shards do not understand.
    #[error("`{0}` is not supported by this model server")]
    Unsupported(&'static str),
}

impl Generation {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.earlier.len() + 1
    }
}

impl ShardError {
    /// Whether the shards are as they were before.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}
