//! What the engine answers: the outcome of a step, as values of the domain.

use std::time::Duration;

use proto::units::{BatchId, RequestId, TokenCount, TokenId};

use crate::sampling::NotNumbers;

/// One step's outcome.
#[derive(Debug)]
pub struct StepReport {
    /// One per request that has a new token, in batch order.
    pub generations: Vec<Generation>,
    /// Requests that have ended without a further token, while the others went on.
    pub failures: Vec<Failure>,
    /// The batch, unless every request has stopped.
    pub batch: Option<BatchSummary>,
    /// How long it took.
    pub timings: Timings,
}

/// Durations of one step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Joining batches, if batches were joined.
    pub concat: Option<Duration>,
    /// Inputs to sampled tokens.
    pub forward: Duration,
    /// Text, stopping, assembling the answer.
    pub decode: Duration,
    /// The whole command.
    pub total: Duration,
}

/// What a router needs to know of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSummary {
    /// Its id.
    pub id: BatchId,
    /// Its requests, in order; those that stopped are among them until they are filtered out.
    pub requests: Vec<RequestId>,
    /// Cache tokens the requests reserve.
    pub tokens_max: TokenCount,
    /// Tokens of the next step.
    pub tokens_next: TokenCount,
}

/// Why a request has ended without a further token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The request.
    pub request: RequestId,
    /// Why.
    pub reason: NotNumbers,
}

/// A new token of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The request.
    pub request: RequestId,
    /// With the first token, if asked for.
    pub prompt: Option<PromptTokens>,
    /// The token; its text is what it adds to the text before.
    pub token: Token,
    /// The best alternatives, best first; empty unless asked for. Each has its text on its own.
    pub top: Vec<Token>,
    /// Set when the request has stopped.
    pub end: Option<GeneratedText>,
}

/// A token as it is reported.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its text.
    pub text: String,
    /// Whether it is control rather than text.
    pub special: bool,
}

/// A prompt with its log-probabilities. Parallel arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptTokens {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Of each token given those before it; NaN where nothing was computed: for the first, and for cached ones.
    pub logprobs: Vec<f32>,
    /// Of each token on its own.
    pub texts: Vec<String>,
}

/// All that a request has generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratedText {
    /// Without special tokens; a stop string is its end.
    pub text: String,
    /// Number of generated tokens.
    pub tokens: TokenCount,
    /// Why it stopped.
    pub reason: FinishReason,
    /// Set if random draws decided.
    pub seed: Option<u64>,
}

/// Why a request stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// As many tokens as were asked for.
    Length,
    /// The model ended the sequence.
    EndOfSequence,
    /// A stop string is complete.
    StopString,
}

/// What a warmed-up shard can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens of the whole cache.
    pub supported: TokenCount,
    /// Longest prompt.
    pub input_max: TokenCount,
    /// Longest prompt and output of one request.
    pub total_max: TokenCount,
}
