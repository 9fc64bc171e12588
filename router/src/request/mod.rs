//! Requests: [`ValidRequest`] is proven, and can only come out of validation.
//!
//! - `native.rs`: the native routes' body as clients send it.
//! - `params.rs`: what every route's body is translated into.
//! - `terms.rs`: what headers say about a request.
//! - `validate.rs`: from there to a [`ValidRequest`], one function per rule.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::units::{TokenCount, TokenId};

use crate::adapters::Adapter;

pub(crate) mod native;
pub(crate) mod params;
pub(crate) mod terms;
pub(crate) mod validate;

/// A request that passed validation. Downstream, only the scheduler checks whether the shards can run it at all.
#[derive(Clone, Debug)]
pub struct ValidRequest {
    /// The prompt.
    pub prompt: Prompt,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// When to stop.
    pub stopping: Stopping,
    /// Whether log-probabilities of the prompt tokens are wanted.
    pub prompt_logprobs: bool,
    /// Best alternatives to report per generated token; 0 is none.
    pub top_n_tokens: u32,
    /// What changes its tokens; `None` is the base model. Held until the request has ended, so that nobody takes it away.
    pub adapter: Option<Arc<Adapter>>,
    /// How urgent it is.
    pub priority: Priority,
    /// When its client wants no answer any more.
    pub deadline: Option<Deadline>,
}

/// How urgent a request is among others: from 0 to 9, the most urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(u8);

impl Priority {
    /// The most urgent.
    pub const HIGHEST: Self = Self(9);
    /// What it may be, for those who got it wrong.
    pub(crate) const RANGE: &'static str = "a whole number from 0 to 9";

    /// `None` above 9.
    pub fn new(value: u8) -> Option<Self> {
        (value <= Self::HIGHEST.0).then_some(Self(value))
    }

    /// From 0 to 9.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    /// In the middle.
    fn default() -> Self {
        Self(5)
    }
}

/// The end of a client's patience.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// When it is over.
    pub at: Instant,
    /// How long it was.
    pub after: Duration,
}

impl ValidRequest {
    /// Stands for the weights that compute this request: the adapter's id on the wire, which no other adapter ever gets.
    /// Keys and values of equal tokens are equal only under the same one.
    pub fn adapter_key(&self) -> Option<&str> {
        self.adapter.as_deref().map(Adapter::wire_id)
    }
}

/// A prompt as text and as tokens.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// As the client sent it, or as the chat template made it.
    pub text: String,
    /// Its tokens after truncation, special tokens included. At least one.
    pub ids: Arc<[TokenId]>,
    /// Whether the tokenizer added its special tokens.
    pub add_special_tokens: bool,
}

impl Prompt {
    /// Number of tokens.
    pub fn length(&self) -> TokenCount {
        TokenCount(self.ids.len() as u32)
    }
}

/// How the next token is chosen. The neutral value of each field leaves the distribution alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Samples even if no other field asks for it.
    pub do_sample: bool,
    /// Divides the logits; neutral 1.
    pub temperature: f32,
    /// Keeps the k best tokens; neutral 0.
    pub top_k: u32,
    /// Keeps the smallest set of this mass; neutral 1.
    pub top_p: f32,
    /// Keeps the most typical set of this mass; neutral 1.
    pub typical_p: f32,
    /// Multiplicative, over prompt and output; neutral 1.
    pub repetition_penalty: f32,
    /// Times the share of the token in prompt and output (the native routes' meaning); neutral 0.
    pub frequency_penalty: f32,
    /// For every token generated before (OpenAI's meaning); neutral 0.
    pub presence_penalty: f32,
    /// Times the number of times the token was generated before (OpenAI's frequency penalty); neutral 0.
    pub count_penalty: f32,
    /// Keeps tokens at least this likely, relative to the likeliest; neutral 0.
    pub min_p: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Adds the green-list watermark.
    pub watermark: bool,
    /// Keys the random numbers.
    pub seed: u64,
}

/// When a request stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    /// At least 1; prompt and output fit into the model's limit.
    pub max_new_tokens: TokenCount,
    /// Texts that end the output.
    pub stop_sequences: Vec<String>,
    /// Goes on after an end-of-sequence token.
    pub ignore_eos_token: bool,
}
